"""Convolutions: the kernel [O, I, h, w] is a matrix of O rows, for every method, in the file and in a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import write_safetensors
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.pipeline.plan import leading_dimensions
from deltafmt.terms.floats import widen

SHAPES = {
    "conv.weight": (48, 32, 3, 3),
    "patch.weight": (40, 3, 2, 14, 14),
    "one.weight": (64, 16, 5),
    "experts.weight": (3, 40, 64),
    "linear.weight": (48, 64),
}
METHODS = [
    "rtn:bits=4",
    "deltadq:nm=4:16",
    "deltadq:nm=3:10,index=fixed",
    "bitdelta",
    "svd:rank=4",
    "delta-come",
    "dare",
]


def values(seed: int, grown: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((shape[0] + grown, *shape[1:])) * 0.05 for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a fine-tune with convolutions, stacked experts and a matrix."""
    folder = tmp_path_factory.mktemp("leading")
    base, change = values(1), values(2)
    for side, tensors in (("base", base), ("ft", {name: base[name] + 0.02 * change[name] for name in base})):
        (folder / side).mkdir()
        write_safetensors(folder / side / "model.safetensors", tensors)
    return folder / "base", folder / "ft"


@pytest.mark.parametrize(
    ("shape", "leading"),
    [
        ((48, 32, 3, 3), 1),
        ((40, 3, 2, 14, 14), 1),
        ((64, 16, 5), 1),
        ((3, 40, 64), None),
        ((4, 320, 3, 3), None),
        ((48, 3), None),
        ((5,), None),
    ],
)
def test_which_tensors_have_leading_dimensions(shape: tuple[int, ...], leading: int | None) -> None:
    assert leading_dimensions(shape) == leading


@pytest.mark.parametrize("spelling", METHODS)
@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_kernels_are_packed_as_matrices(pair: tuple[Path, Path], tmp_path: Path, spelling: str, profile: str) -> None:
    out = tmp_path / "d.deltafmt"
    method = deltafmt.methods.parse(spelling)
    deltafmt.pack(*pair, out, method=method, profile=profile)
    deltafmt.verify(out, pair[0])
    with deltafmt.open(out) as delta:
        for name, shape in SHAPES.items():
            entry = delta[name]
            leads = len(shape) > 2 and shape[-1] < 32
            assert entry.shape == shape
            if entry.action == "add":
                assert entry.leading == (1 if leads else None)
                assert (entry.rows, entry.columns) == (
                    (shape[0], int(np.prod(shape[1:]))) if leads else (int(np.prod(shape[:-1])), shape[-1])
                )
                assert delta.delta(name).shape == shape
        # Otherwise the file would say so little that an earlier reader could take it for one of its own.
        assert delta.container.features & 2
    deltafmt.unpack(pair[0], out, tmp_path / "out")
    again = tmp_path / "again.deltafmt"
    deltafmt.repack(out, again, profile="cold" if profile == "hot" else "hot")
    assert deltafmt.verify(again).content_id == deltafmt.verify(out).content_id


@pytest.mark.situation("the kernels of convolutions, `[O, I, h, w]`")
def test_a_kernel_has_the_codes_of_its_matrix(pair: tuple[Path, Path], tmp_path: Path) -> None:
    flat = []
    for side in pair:
        with Checkpoint(side) as checkpoint:
            tensor = checkpoint.tensors["conv.weight"].as_matrix(1)
            with tensor.row_range(0, 48) as rows:
                flat.append(widen(rows.copy(), tensor.dtype))
    for number, side in enumerate(("base", "ft")):
        (tmp_path / side).mkdir()
        write_safetensors(tmp_path / side / "model.safetensors", {"conv.weight": flat[number]})
    method = deltafmt.methods.RTN(4)
    deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "flat.deltafmt", method=method)
    deltafmt.pack(*pair, tmp_path / "kernel.deltafmt", method=method)
    with deltafmt.open(tmp_path / "flat.deltafmt") as one, deltafmt.open(tmp_path / "kernel.deltafmt") as other:
        expected, found = one.buffers("conv.weight"), other.buffers("conv.weight")
        assert expected.keys() == found.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


def test_a_kernel_that_gained_filters(tmp_path: Path) -> None:
    base, grown = values(1), values(1, grown=8)
    for name, array in base.items():
        grown[name][: len(array)] = array + 0.001
    for side, tensors in (("base", base), ("ft", grown)):
        (tmp_path / side).mkdir()
        write_safetensors(tmp_path / side / "model.safetensors", {"conv.weight": tensors["conv.weight"]})
    out = tmp_path / "d.deltafmt"
    deltafmt.pack(tmp_path / "base", tmp_path / "ft", out, method=deltafmt.methods.RTN(4))
    with deltafmt.open(out) as delta:
        assert (delta["conv.weight"].delta_rows, delta["conv.weight"].rows) == (48, 56)
    deltafmt.unpack(tmp_path / "base", out, tmp_path / "out")
