"""Checkpoints that are read: every way to lay out shards, every wrong file, every dtype."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import (
    SMALL_FILES,
    Pair,
    Raw,
    Tensors,
    normal,
    nudge,
    plain,
    read_folder,
    safetensors_bytes,
    small_tensors,
    with_header,
    write_folder,
)
from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.errors import InvalidFileError, StorageError


def _layout(folder: Path, tensors: Tensors, how: str) -> Path:
    """Write ``tensors`` in one of several layouts and return what names the checkpoint."""
    names = list(tensors)
    if how == "file":
        folder.mkdir()
        path = folder / "model.safetensors"
        path.write_bytes(safetensors_bytes(tensors))
        return path
    if how == "folder":
        return write_folder(folder, tensors)
    if how == "reversed":
        return write_folder(folder, {name: tensors[name] for name in reversed(names)})
    if how == "two shards":
        return write_folder(folder, tensors, [names[:3], names[3:]])
    if how == "interleaved":
        return write_folder(folder, tensors, [names[1::2], names[::2]])
    if how == "one each":
        return write_folder(folder, tensors, [[name] for name in names])
    assert how == "no index"
    write_folder(folder, tensors, [names[:2], names[2:]])
    (folder / "model.safetensors.index.json").unlink()
    return folder


LAYOUTS = ("file", "folder", "reversed", "two shards", "interleaved", "one each", "no index")


@pytest.fixture(scope="module")
def plain_delta(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give the delta file of the small pair without attachments."""
    folder = tmp_path_factory.mktemp("plain")
    a, b = small_tensors()
    out = folder / "out.deltafmt"
    deltafmt.pack(_layout(folder / "a", a, "file"), _layout(folder / "b", b, "file"), out, base_name="a")
    return out.read_bytes()


@pytest.mark.parametrize("side", ["base", "finetuned", "both"])
@pytest.mark.parametrize("how", LAYOUTS)
def test_the_layout_of_shards_does_not_reach_the_delta(tmp_path: Path, plain_delta: bytes, how: str, side: str) -> None:
    a, b = small_tensors()
    base = _layout(tmp_path / "a", a, how if side != "finetuned" else "folder")
    finetuned = _layout(tmp_path / "b", b, how if side != "base" else "folder")
    deltafmt.pack(base, finetuned, tmp_path / "out.deltafmt", base_name="a")
    assert (tmp_path / "out.deltafmt").read_bytes() == plain_delta


@pytest.mark.parametrize("how", LAYOUTS)
def test_any_layout_of_the_base_unpacks_to_the_same_file(tmp_path: Path, plain_delta: bytes, how: str) -> None:
    delta = tmp_path / "d.deltafmt"
    delta.write_bytes(plain_delta)
    a, b = small_tensors()
    deltafmt.unpack(write_folder(tmp_path / "plain", a), delta, tmp_path / "expected")
    deltafmt.unpack(_layout(tmp_path / "a", a, how), delta, tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "expected" / "model.safetensors").read_bytes()
    found = read_folder(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    for exact in ("model.layers.0.norm.weight", "model.layers.0.frozen.weight", "position_ids"):
        assert found[exact] == b[exact]
    assert found["model.layers.0.up.weight"].data != a["model.layers.0.up.weight"].data


def test_a_folder_gives_its_tensors_in_natural_order_and_its_small_files(small: Pair) -> None:
    checkpoint = Checkpoint(small.finetuned)
    names = list(checkpoint.tensors)
    assert names.index("model.layers.0.up.weight") < names.index("model.layers.10.up.weight")
    assert sorted(["l.10", "l.2", "l.1.b", "l.1.a"], key=natural_key) == ["l.1.a", "l.1.b", "l.2", "l.10"]
    assert set(checkpoint.files) == set(SMALL_FILES)
    assert checkpoint.nbytes == sum(len(tensor.data) for tensor in small.b.values())
    assert checkpoint.file_bytes == os.path.getsize(small.finetuned / "model.safetensors")
    for name, tensor in small.b.items():
        assert b"".join(bytes(piece) for piece in checkpoint.tensors[name].pieces()) == tensor.data


def test_model_safetensors_wins_over_other_weights_in_the_folder(tmp_path: Path) -> None:
    a, _ = small_tensors()
    folder = write_folder(tmp_path / "a", a)
    (folder / "training_state.safetensors").write_bytes(safetensors_bytes({"other": normal(1, (2, 2))}))
    assert set(Checkpoint(folder).tensors) == set(a)


GOOD = {"w": normal(1, (4, 4)), "v": normal(2, (3,))}


def _header(**changes: object) -> bytes:
    """Return a file of one 4x4 BF16 tensor whose header entry has some values changed."""
    entry: dict[str, object] = {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 32], **changes}
    return with_header(json.dumps({"w": entry}).encode(), bytes(32))


def _two(first: list[int], second: list[int]) -> bytes:
    """Return a file of two 4x4 BF16 tensors at given places of 64 bytes."""
    entries = {
        name: {"dtype": "BF16", "shape": [4, 4], "data_offsets": offsets}
        for name, offsets in (("v", first), ("w", second))
    }
    return with_header(json.dumps(entries).encode(), bytes(64))


WRONG_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header length only": struct.pack("<Q", 0),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "huge header length": struct.pack("<Q", 2**63) + b"{}" * 100,
    "header of all ones": b"\xff" * 64,
    "not JSON": with_header(b"{'w': 1}"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "a list": with_header(b"[]"),
    "nested too deeply": with_header(b"[" * 200_000),
    "cut in the data": safetensors_bytes(GOOD)[:-1],
    "cut in the header": safetensors_bytes(GOOD)[:40],
    "end before begin": _header(data_offsets=[32, 0]),
    "negative begin": _header(data_offsets=[-32, 0]),
    "beyond the file": _header(data_offsets=[32, 64]),
    "far beyond the file": _header(data_offsets=[2**62, 2**62 + 32]),
    "too few bytes": _header(data_offsets=[0, 30]),
    "too many bytes": _header(shape=[4, 3]),
    "three offsets": _header(data_offsets=[0, 32, 32]),
    "fractional offsets": _header(data_offsets=[0.0, 32.0]),
    "offsets as text": _header(data_offsets=["0", "32"]),
    "unknown dtype": _header(dtype="F13"),
    "dtype in lower case": _header(dtype="bf16"),
    "dtype is a list": _header(dtype=["BF16"]),
    "dtype is null": _header(dtype=None),
    "negative size": _header(shape=[-4, -4]),
    "fractional size": _header(shape=[4.0, 4]),
    "shape is a number": _header(shape=16),
    "shape is text": _header(shape="44"),
    "shape holds truth values": _header(shape=[True, 16]),
    "nine dimensions": _header(shape=[1, 1, 1, 1, 1, 1, 1, 4, 4]),
    "sizes that overflow": _header(shape=[2**32, 2**32]),
    "an entry that is a list": with_header(b'{"w": []}'),
    "an entry without a dtype": with_header(b'{"w": {"shape": [], "data_offsets": [0, 2]}}', bytes(2)),
    "the same name twice": with_header(
        b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        b' "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"x",
    ),
    "two tensors in one place": _two([0, 32], [0, 32]),
    "two tensors that overlap": _two([0, 32], [16, 48]),
    "no tensor": with_header(b"{}"),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_safetensors_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(WRONG_FILES[what])
    with pytest.raises(InvalidFileError, match=r"bad\.safetensors") as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value)


def test_the_unchanged_header_of_the_wrong_files_is_right(tmp_path: Path) -> None:
    for number, content in enumerate((_header(), _two([0, 32], [32, 64]), safetensors_bytes(GOOD))):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        assert "w" in Checkpoint(path).tensors


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidFileError, match=r"no \.safetensors weights"):
        Checkpoint(tmp_path)


def test_a_folder_with_a_pickle_only_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(InvalidFileError, match=r"pytorch_model\.bin cannot be read, convert it to safetensors"):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    a, _ = small_tensors()
    names = list(a)
    folder = write_folder(tmp_path / "a", a, [names[:3], names[3:]])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((StorageError, InvalidFileError), match=r"model-00002-of-00002\.safetensors"):
        Checkpoint(folder)


WRONG_INDEXES = {
    "not JSON": b"{",
    "not UTF-8": b'{"weight_map": {"\xff": "x"}}',
    "no weight map": b'{"metadata": {}}',
    "a list as weight map": b'{"weight_map": []}',
    "a list": b"[]",
    "nested too deeply": b"[" * 200_000,
    "outside the folder": b'{"weight_map": {"w": "../model.safetensors"}}',
    "an absolute path": b'{"weight_map": {"w": "/model.safetensors"}}',
    "the folder above": b'{"weight_map": {"w": ".."}}',
    "no name": b'{"weight_map": {"w": ""}}',
    "a tensor that its shard lacks": b'{"weight_map": {"other": "one.safetensors"}}',
    "a tensor in the wrong shard": b'{"weight_map": {"w": "two.safetensors", "z": "one.safetensors"}}',
    "no tensor": b'{"weight_map": {}}',
}


@pytest.mark.parametrize("what", WRONG_INDEXES)
def test_a_wrong_index_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder.parent / "model.safetensors").write_bytes(safetensors_bytes(GOOD))
    (folder / "one.safetensors").write_bytes(safetensors_bytes(GOOD))
    (folder / "two.safetensors").write_bytes(safetensors_bytes({"z": normal(3, (2, 2))}))
    (folder / "model.safetensors.index.json").write_bytes(WRONG_INDEXES[what])
    with pytest.raises(InvalidFileError):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_without_an_index_is_refused(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(safetensors_bytes(GOOD))
    with pytest.raises(InvalidFileError, match=f'"(w|v)" is in {names[0]} and {names[1]}'):
        Checkpoint(tmp_path)


def _every_dtype() -> Tensors:
    rng = np.random.default_rng(7)
    found = {
        "bool": plain(rng.random(37) < 0.5),
        "u8": plain(rng.integers(0, 256, (3, 5), np.uint8)),
        "i8": plain(rng.integers(-128, 128, (3, 5), np.int8)),
        "i16": plain(rng.integers(-9, 9, (7, 3), np.int16)),
        "i32": plain(rng.integers(-9, 9, (2, 2), np.int32)),
        "i64": plain(rng.integers(-9, 9, (64, 64), np.int64)),
        "f64": plain(rng.normal(size=(9, 33))),
        "f32": plain(rng.normal(size=(5,)).astype(np.float32)),
        "f16": plain(rng.normal(size=(5,)).astype(np.float16)),
        "bf16": normal(8, (5,)),
        "c64": Raw("C64", (3,), rng.bytes(24)),
        "u16": Raw("U16", (3,), rng.bytes(6)),
        "u32": Raw("U32", (3,), rng.bytes(12)),
        "u64": Raw("U64", (3,), rng.bytes(24)),
        "f4": Raw("F4", (4, 6), rng.bytes(12)),
    }
    for dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        found[dtype.lower()] = Raw(dtype, (16, 32), rng.bytes(512))  # every bit pattern, NaN included
    return found


def test_dtypes_without_a_delta_pass_bit_for_bit(tmp_path: Path) -> None:
    b = _every_dtype()
    flipped = {name: Raw(t.dtype, t.shape, bytes(byte ^ 1 for byte in t.data)) for name, t in b.items()}
    unchanged = {name: t for i, (name, t) in enumerate(b.items()) if i % 3 == 0}
    base = write_folder(tmp_path / "base", {**flipped, **unchanged})
    finetuned = write_folder(tmp_path / "ft", b)
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", quantized="exact")
    assert result.actions == {"replace": len(b) - len(unchanged), "same": len(unchanged)}
    assert set(result.kept) >= {name for name in ("u8", "i8", "f64", "f8_e5m2") if name not in unchanged}
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    assert read_folder(tmp_path / "out") == b


def test_a_change_of_dtype_to_fp8_passes_bit_for_bit(tmp_path: Path) -> None:
    a = {"anchor": normal(1, (32, 32)), "w": normal(2, (16, 16))}
    b = {"anchor": nudge(a["anchor"], 3), "w": Raw("F8_E4M3", (16, 16), bytes(range(256)))}
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b)
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", quantized="exact")
    assert "w" in result.kept
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    assert read_folder(tmp_path / "out")["w"] == b["w"]


def test_an_unaligned_file_is_read_right(tmp_path: Path) -> None:
    a, b = small_tensors()
    odd = {"aaa": Raw("U8", (3,), b"xyz")}
    paths = tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors"
    for path, tensors in zip(paths, ({**odd, **a}, {**odd, **b}), strict=True):
        path.parent.mkdir()
        path.write_bytes(safetensors_bytes(tensors))
    deltafmt.pack(*paths, tmp_path / "odd.deltafmt", base_name="")
    even = write_folder(tmp_path / "even a", {**a, **odd}), write_folder(tmp_path / "even b", {**b, **odd})
    deltafmt.pack(*even, tmp_path / "even.deltafmt", base_name="")
    assert (tmp_path / "odd.deltafmt").read_bytes() == (tmp_path / "even.deltafmt").read_bytes()
    deltafmt.unpack(paths[0], tmp_path / "odd.deltafmt", tmp_path / "out")
    deltafmt.unpack(even[0], tmp_path / "odd.deltafmt", tmp_path / "out2")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "out2")
