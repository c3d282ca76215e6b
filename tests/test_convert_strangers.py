"""``deltafmt convert`` refuses patches of strangers that break their format, or are for another base: in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Cli, Raw, Tensors, normal, nudge, read_file, refused, safetensors_bytes, write_folder
from foreign_files import (
    INDEX,
    compressed,
    encoded,
    sparse_metadata,
    write_version_folder,
)

FILES = {"config.json": b'{"model_type": "llama"}'}
A: Tensors = {"a.weight": normal(1, (6, 8)), "b.weight": normal(2, (4, 8), "F32"), "c.weight": normal(3, (5,))}
B: Tensors = {name: nudge(tensor, 9) for name, tensor in A.items()} | {"c.weight": A["c.weight"]}
SHARD = "model-00000-of-00001.safetensors"
XOR = encoded("xor", A["a.weight"].data, B["a.weight"].data)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pair") / "base", A, files=FILES)


def overwritten(count: int, places: list[int], values: bytes) -> bytes:
    return compressed(count.to_bytes(4, "little") + np.array(places, "<u4").tobytes() + values)


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def rewritten(folder: Path, change: Callable[[Tensors, dict[str, str]], object]) -> None:
    tensors, header = read_file(folder / SHARD)
    change(tensors, header["__metadata__"])
    (folder / SHARD).write_bytes(safetensors_bytes(tensors, header["__metadata__"]))


FRAMES = {
    "not a frame": (b"nothing of the kind", 3, 'tensor "a.weight": not a zstd frame'),
    "cut": (compressed(XOR)[:-2], 3, 'tensor "a.weight": it is not one whole zstd frame'),
    "two frames": (compressed(XOR) * 2, 3, "bytes follow a zstd frame"),
    "longer": (compressed(XOR + b"\0"), 4, "wrong base", "a zstd frame declares 97 bytes, not 96"),
    "longer, not declared": (compressed(XOR + bytes(10**6), write_content_size=False), 3, "has more content"),
    "shorter, not declared": (compressed(XOR[:-7], write_content_size=False), 3, "a zstd frame ends 7 bytes early"),
    "empty blocks": (b"\x28\xb5\x2f\xfd\x20\x60" + bytes(30_000), 3, "a zstd frame has more than 4,096 blocks"),
    "other bits": (compressed(XOR[::-1]), 4, "its new bytes have another checksum: the base is not version 000000"),
}
OVERWRITES = {
    "more positions than bytes": (overwritten(97, [], b""), 3, "97 positions are more than the 96 bytes of the tensor"),
    "another length": (overwritten(2, [1], b"x"), 3, "a zstd frame declares 9 bytes, not 14"),
    "outside": (overwritten(2, [1, 96], b"xy"), 3, 'tensor "a.weight": position 96 lies outside the tensor'),
    "repeated": (overwritten(2, [7, 7], b"xy"), 3, "position 7 stands twice, and they must ascend"),
    "out of order": (overwritten(3, [1, 9, 4], b"xyz"), 3, "position 4 stands behind 9, and they must ascend"),
    "no number": (compressed(b"ab"), 3, "2 bytes change more than the 96 of the tensor"),
    "much more": (compressed(bytes(10**6)), 3, "1,000,000 bytes change more than the 96 of the tensor"),
    "nothing in it": (compressed(b"", write_content_size=False), 3, "a zstd frame ends 4 bytes early"),
    "empty blocks": (b"\x28\xb5\x2f\xfd\x20\x60" + bytes(30_000), 3, "a zstd frame has more than 4,096 blocks"),
    "no values": (overwritten(2, [1, 2], b""), 3, "a zstd frame declares 12 bytes, not 14"),
}


@pytest.mark.parametrize(
    ("encoding", "case"), [*(("xor", case) for case in FRAMES), *(("overwrite", case) for case in OVERWRITES)]
)
def test_frames_of_strangers(tmp_path: Path, cli: Cli, base: Path, encoding: str, case: str) -> None:
    frame, code, *parts = (FRAMES if encoding == "xor" else OVERWRITES)[case]
    assert isinstance(frame, bytes)
    assert isinstance(code, int)
    patch = write_version_folder(tmp_path / "v", A, B, encoding=encoding, frames={"a.weight": frame})
    refused(cli("convert", patch, "-o", tmp_path / "d.deltafmt", "--base", base), code, *map(str, parts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v"]


FOLDERS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "unknown key": (
        lambda f: edited(f, lambda index: index["metadata"].update(scale="2")),
        3,
        "the key 'scale' of its metadata is not known",
    ),
    "missing key": (
        lambda f: edited(f, lambda index: index["metadata"].pop("base_version")),
        3,
        "its metadata have no base_version",
    ),
    "a number": (
        lambda f: edited(f, lambda index: index["metadata"].update(version=1)),
        3,
        "version is 1, not a short",
    ),
    "its own base": (
        lambda f: edited(f, lambda index: index["metadata"].update(base_version="000001")),
        3,
        "version 000001 cannot be made on version 000001",
    ),
    "encoding": (
        lambda f: edited(f, lambda index: index["metadata"].update(delta_encoding="add")),
        3,
        "delta_encoding is 'add', and only xor, overwrite can be read",
    ),
    "compression": (
        lambda f: edited(f, lambda index: index["metadata"].update(compression_format="lz4")),
        3,
        "compression_format is 'lz4'",
    ),
    "checksum": (
        lambda f: edited(f, lambda index: index["metadata"].update(checksum_format="crc32")),
        3,
        "checksum_format is 'crc32'",
    ),
    "no encoding": (
        lambda f: edited(f, lambda index: index["metadata"].pop("delta_encoding")),
        3,
        "it is a whole checkpoint; pack it against the base with the method exact",
    ),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), 3, "the index is not valid"),
    "a key twice": (lambda f: (f / INDEX).write_text('{"metadata": {}, "metadata": {}}'), 3, "a key stands twice"),
    "no index": (lambda f: (f / INDEX).unlink(), 3, "it is a whole checkpoint"),
    "outside": (
        lambda f: edited(f, lambda index: index["weight_map"].update({"a.weight": "../x.safetensors"})),
        3,
        "is not a file beside the index",
    ),
    "missing shard": (lambda f: (f / SHARD).unlink(), 5, f"{SHARD} is missing"),
    "another shard": (
        lambda f: (f / "old.safetensors").write_bytes((f / SHARD).read_bytes()),
        3,
        "it does not name old.safetensors, which lies beside it",
    ),
    "twice": (
        lambda f: (
            (f / "z.safetensors").write_bytes((f / SHARD).read_bytes()),
            edited(f, lambda index: index["weight_map"].update({"b.weight": "z.safetensors"})),
        ),
        3,
        "does not say that it is here",
    ),
    "not in the shard": (
        lambda f: edited(f, lambda index: index["weight_map"].update({"d.weight": SHARD})),
        3,
        f'tensor "d.weight" is not in {SHARD}',
    ),
    "not in the map": (
        lambda f: edited(f, lambda index: index["weight_map"].pop("a.weight")),
        3,
        f"{INDEX} does not say that it is here",
    ),
    "another dtype": (
        lambda f: rewritten(f, lambda tensors, _: tensors.update({"a.weight": normal(1, (3,))})),
        3,
        "BF16 [3] is not a row of compressed bytes",
    ),
    "no checksum": (lambda f: rewritten(f, lambda _, sums: sums.pop("a.weight")), 3, "it has no checksum"),
    "half a checksum": (
        lambda f: rewritten(f, lambda _, sums: sums.update({"a.weight": "ab"})),
        3,
        "'ab' is not a checksum of xxh3-128",
    ),
    "wrong checksum": (
        lambda f: rewritten(f, lambda _, sums: sums.update({"a.weight": "0" * 32})),
        4,
        'tensor "a.weight": its new bytes have another checksum',
    ),
    "cut shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]), 3, "it may be truncated"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_version_folders_of_strangers(tmp_path: Path, cli: Cli, base: Path, case: str) -> None:
    change, code, part = FOLDERS[case]
    patch = write_version_folder(tmp_path / "v", A, B)
    change(patch)
    refused(cli("convert", patch, "-o", tmp_path / "d.deltafmt", "--base", base), code, part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v"]


def test_a_tensor_in_two_shards(tmp_path: Path, cli: Cli, base: Path) -> None:
    patch = write_version_folder(tmp_path / "v", A, B, shards=2)
    first, second = sorted(patch.glob("*.safetensors"))
    (tensors, header), (more, others) = read_file(first), read_file(second)
    second.write_bytes(safetensors_bytes(more | tensors, others["__metadata__"] | header["__metadata__"]))
    refused(
        cli("convert", patch, "-o", tmp_path / "d", "--base", base), 3, "it is in", "applied twice it would be wrong"
    )


def test_bases_that_are_another_version(tmp_path: Path, cli: Cli, base: Path) -> None:
    patch = write_version_folder(tmp_path / "v", A, B)
    other = write_folder(tmp_path / "other", A | {"a.weight": nudge(A["a.weight"], 5)})
    refused(cli("convert", patch, "-o", tmp_path / "d", "--base", other), 4, "the base is not version 000000")
    lacking = write_folder(tmp_path / "lacking", {"b.weight": A["b.weight"]})
    message = 'changes a tensor "a.weight", and it has none of this name'
    refused(cli("convert", patch, "-o", tmp_path / "d", "--base", lacking), 4, message)
    short = write_folder(tmp_path / "short", A | {"a.weight": normal(1, (5, 8))})
    refused(cli("convert", patch, "-o", tmp_path / "d", "--base", short), 4, "declares 96 bytes, not 80")
    noted = write_folder(tmp_path / "noted", A)
    (noted / ".weight_sync").mkdir()
    note = noted / ".weight_sync" / "state.json"
    note.write_text('{"version": "000004"}')
    message = f"was made on version 000000, and the checkpoint {noted} is version 000004"
    refused(cli("convert", patch, "-o", tmp_path / "d", "--base", noted), 4, "wrong base version", message)
    note.write_text("{}")
    refused(cli("convert", patch, "-o", tmp_path / "d", "--base", noted), 3, "it names no version")
    note.write_text('{"version": "000000"}')
    assert cli("convert", patch, "-o", tmp_path / "d.deltafmt", "--base", noted).code == 0


def indices(*numbers: int, dtype: str = "I32") -> Raw:
    return Raw(dtype, (len(numbers),), np.array(numbers, "<i4" if dtype == "I32" else "<i8").tobytes())


SPARSE: dict[str, tuple[Callable[[Tensors, dict[str, str]], object], int, str]] = {
    "no values": (lambda t, _: t.pop("a.weight.values"), 3, 'tensor "a.weight": its .values are missing'),
    "no indices": (lambda t, _: t.pop("a.weight.indices"), 3, 'tensor "a.weight": its .indices are missing'),
    "64 bits": (
        lambda t, _: t.update({"a.weight.indices": indices(1, dtype="I64")}),
        3,
        "its indices are I64, not I32",
    ),
    "lengths": (
        lambda t, _: t.update({"a.weight.indices": indices(1, 2)}),
        3,
        "indices and values of the shapes [2] and [1] are not two rows alike",
    ),
    "outside": (
        lambda t, _: t.update({"a.weight.indices": indices(48)}),
        3,
        "index 48 lies outside the tensor, which has 48",
    ),
    "negative": (lambda t, _: t.update({"a.weight.indices": indices(-1)}), 3, "index -1 lies outside"),
    "repeated": (lambda t, _: t.update(pair(indices(3, 3))), 3, "index 3 stands twice"),
    "out of order": (lambda t, _: t.update(pair(indices(3, 1))), 3, "index 1 stands behind 3"),
    "too many": (lambda t, _: t.update(pair(indices(*range(49)))), 3, "49 indices are more than the 48 elements"),
    "another dtype": (
        lambda t, _: t.update({"a.weight.values": normal(1, (1,), "F16")}),
        4,
        'tensor "a.weight" is BF16, and its new values',
    ),
    "a name of none": (
        lambda t, _: t.update({"scale": normal(1, (1,))}),
        3,
        "neither .indices nor .values of a tensor",
    ),
    "names": (lambda _, m: m.update(changed_params='["b.weight"]'), 3, "changed_params does not name the tensors"),
    "no list": (lambda _, m: m.update(changed_params="a.weight"), 3, "changed_params does not name the tensors"),
    "not sparse": (lambda _, m: m.update(sparse="False"), 3, "sparse is 'False', and only 'True' can be read"),
    "coded": (lambda _, m: m.update(encoding="gap_delta"), 3, "encoding is 'gap_delta'"),
    "unknown key": (lambda _, m: m.update(scale="2"), 3, "the key 'scale' of its metadata is not known"),
    "another state": (lambda _, m: m.update(checksum_sha256="0" * 64), 4, "the new state has another SHA-256"),
    "no state": (lambda _, m: m.update(checksum_sha256=""), 3, "checksum_sha256 is '', not a SHA-256"),
    "half a state": (lambda _, m: m.update(checksum_sha256="ab"), 3, "checksum_sha256 is 'ab', not a SHA-256"),
    "another model": (
        lambda t, m: (
            t.update({f"z.{end}": t.pop(f"a.weight.{end}") for end in ("indices", "values")}),
            m.pop("changed_params"),
        ),
        4,
        'changes a tensor "z", and it has none of this name',
    ),
}


def pair(places: Raw) -> Tensors:
    return {"a.weight.indices": places, "a.weight.values": normal(1, places.shape)}


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_files_of_strangers(tmp_path: Path, cli: Cli, base: Path, case: str) -> None:
    change, code, part = SPARSE[case]
    tensors, metadata = pair(indices(1)), sparse_metadata(["a.weight"])
    change(tensors, metadata)
    patch = tmp_path / "p.safetensors"
    patch.write_bytes(safetensors_bytes(tensors, metadata))
    refused(cli("convert", patch, "-o", tmp_path / "d.deltafmt", "--base", base), code, part)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
