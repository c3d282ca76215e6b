"""8-bit floats with scales: the values of all codes, blocks of any size, tensors that are computed as they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Raw, raw, safetensors_bytes
from deltafmt.checkpoint.dequantized import DequantizedTensor
from deltafmt.checkpoint.float8 import dequantize, values_of_codes
from deltafmt.checkpoint.fp8 import block_of
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor

TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


@pytest.mark.parametrize("dtype", TORCH)
def test_every_code_has_the_value_that_torch_gives(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(values_of_codes(dtype), codes.view(TORCH[dtype]).float().numpy())


def test_a_scale_of_bytes_is_a_power_of_two() -> None:
    np.testing.assert_array_equal(values_of_codes("U8"), values_of_codes("F8_E8M0"))


def test_products_are_rounded_as_torch_rounds_them() -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), 64)
    scales = np.random.default_rng(1).standard_normal(len(codes)).astype(np.float32)
    for dtype in ("F8_E4M3", "F8_E5M2"):
        wide = torch.from_numpy(codes.copy()).view(TORCH[dtype]).float() * torch.from_numpy(scales)
        expected = wide.to(torch.bfloat16).view(torch.uint16).numpy()
        found = dequantize(codes, dtype, scales)
        numbers = ~np.isnan(wide.numpy())
        np.testing.assert_array_equal(found[numbers], expected[numbers])
        assert set(found[~numbers]) == {0x7FC0}


@st.composite
def scaled(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Draw a shape, the sizes of a block, and the dtype of the scales."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 40)) for _ in range(rank))
    block = tuple(draw(st.integers(1, size + 3)) for size in shape)
    return shape, block, draw(st.sampled_from(["F32", "BF16", "F16", "F8_E8M0", "U8"]))


def reference(codes: np.ndarray, scales: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """Return the values as the specification says: each element with the scale of its block."""
    places = np.indices(codes.shape)
    wide = scales[tuple(index // step for index, step in zip(places, block, strict=True))]
    values = torch.from_numpy(values_of_codes("F8_E4M3")[codes]) * torch.from_numpy(wide.astype(np.float32))
    return values.to(torch.bfloat16).view(torch.int16).numpy().astype(np.uint16)


@settings(deadline=None, max_examples=60)
@given(scaled(), st.integers(0, 2**32 - 1), st.data())
def test_any_block_and_any_piece(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[tuple[int, ...], tuple[int, ...], str],
    seed: int,
    data: st.DataObject,
) -> None:
    shape, block, dtype = drawn
    rng = np.random.default_rng(seed)
    grid = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    codes = rng.integers(0, 127, shape, np.uint8)
    if dtype in ("F8_E8M0", "U8"):
        held = rng.integers(110, 140, grid, np.uint8)
        scales, stored = values_of_codes(dtype)[held], Raw(dtype, grid, held.tobytes())
    else:
        stored = raw(rng.uniform(0.01, 2, grid).astype(np.float32), dtype)
        scales = stored.floats().reshape(grid)
    path = tmp_path_factory.mktemp("scaled") / "x.safetensors"
    path.write_bytes(safetensors_bytes({"w": Raw("F8_E4M3", shape, codes.tobytes()), "s": stored}))
    file = SafetensorsFile(path)
    tensor = DequantizedTensor.of(file.tensors["w"], file.tensors["s"], block)
    expected = reference(codes, scales, block).tobytes()
    assert b"".join(bytes(piece) for piece in tensor.pieces()) == expected
    start = data.draw(st.integers(0, tensor.nbytes - 1))
    length = data.draw(st.integers(1, tensor.nbytes - start))
    with tensor.pages(start, length) as view:
        assert bytes(view) == expected[start : start + length]
    first = data.draw(st.integers(0, tensor.rows - 1))
    with tensor.row_range(first, tensor.rows) as rows:
        assert rows.tobytes() == expected[2 * first * tensor.columns :]
    file.close()


def opened(folder: Path, tensors: dict[str, Raw]) -> dict[str, Tensor]:
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(safetensors_bytes(tensors))
    return SafetensorsFile(folder / "x.safetensors").tensors


def test_a_tensor_of_many_pieces_is_that_of_its_values(tmp_path: Path) -> None:
    """Larger than what is computed at once, and than what is read at once."""
    rng = np.random.default_rng(3)
    codes = Raw("F8_E4M3", (4100, 1100), rng.integers(0, 127, 4100 * 1100, np.uint8).tobytes())
    scales = raw(rng.uniform(0.01, 2, (33, 9)).astype(np.float32), "F32")
    held = opened(tmp_path / "a", {"w": codes, "s": scales})
    tensor = DequantizedTensor.of(held["w"], held["s"], (128, 128))
    wide = np.kron(scales.floats().reshape(33, 9), np.ones((128, 128), np.float32))[:4100, :1100]
    meant = dequantize(np.frombuffer(codes.data, np.uint8).reshape(4100, 1100), "F8_E4M3", wide)
    plain = opened(tmp_path / "b", {"w": Raw("BF16", (4100, 1100), meant.tobytes())})["w"]
    assert tensor.fingerprint() == plain.fingerprint()
    assert tensor.equals(plain)
    assert plain.equals(tensor)
    assert tensor.equals(DequantizedTensor.of(held["w"], held["s"], (128, 128)))
    assert not tensor.equals(DequantizedTensor.of(held["w"], None, (4100, 1100)))
    assert tensor.head(4096) == plain.head(4096)


@pytest.mark.parametrize(
    ("shape", "scales", "configured", "block"),
    [
        ((512, 384), (), [], (512, 384)),
        ((512, 384), (1,), [], (512, 384)),
        ((512, 384), (512, 1), [], (1, 384)),
        ((512, 384), (512,), [], (1, 384)),
        ((512, 384), (4, 3), [], (128, 128)),
        ((500, 300), (4, 3), [], (128, 128)),
        ((192, 256), (2, 2), [(128, 128)], (128, 128)),
        ((192, 256), (3, 4), [(64, 64)], (64, 64)),
        ((192, 256), (3, 4), [], (64, 64)),
        ((512, 384), (4, 1, 3, 1), [], (128, 128)),
        ((512, 384), (512, 12), [(1, 32)], (1, 32)),
        ((8, 256, 128), (8, 2, 1), [], (1, 128, 128)),
        ((8, 256, 128), (8,), [], (1, 256, 128)),
        ((8, 256, 128), (8, 1, 128), [], (1, 256, 1)),
        ((500, 300), (7, 3), [], None),
        ((128, 160), (4, 4), [], None),
        ((128, 160), (4, 4), [(32, 48)], (32, 48)),
        ((512, 384), (3, 2, 1), [], None),
    ],
)
def test_the_block_that_shapes_tell(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    configured: list[tuple[int, int]],
    block: tuple[int, ...] | None,
) -> None:
    assert block_of(shape, scales, configured) == block
