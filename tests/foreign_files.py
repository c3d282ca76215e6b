"""Patches of other programs, written and applied without the package: the libraries' plain calls, no bounds.

They follow what is documented of the formats; docs/how-to/convert.md names the documents.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import xxhash
import zstandard

from conftest import Raw, Tensors, read_file, safetensors_bytes

INDEX = "model.safetensors.index.json"
WIDTHS = {"F64": 8, "C64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}


def checksum(algorithm: str, data: bytes) -> str:
    """Return what a shard's metadata say of a tensor's new bytes."""
    if algorithm == "adler32":
        return f"{zlib.adler32(data):08x}"
    return {"xxh3-128": xxhash.xxh3_128, "blake3": blake3.blake3}[algorithm](data).hexdigest()


def encoded(encoding: str, old: bytes, new: bytes) -> bytes:
    """Return the differences of one tensor, before they are compressed."""
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    if encoding == "xor":
        return (before ^ after).tobytes()
    places = np.flatnonzero(before != after)
    return len(places).to_bytes(4, "little") + places.astype("<u4").tobytes() + after[places].tobytes()


def compressed(data: bytes, **options: Any) -> bytes:
    """Return one zstd frame."""
    return zstandard.ZstdCompressor(level=1, **options).compress(data)


def index_of(version: str, base: str, encoding: str, algorithm: str, **others: Any) -> dict[str, Any]:
    """Return the metadata of an index."""
    return {
        "version": version,
        "base_version": base,
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": algorithm,
        **others,
    }


def write_version_folder(
    folder: Path,
    a: Tensors,
    b: Tensors,
    *,
    encoding: str = "xor",
    algorithm: str = "xxh3-128",
    version: str = "000001",
    base: str = "000000",
    shards: int = 1,
    frames: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, Any] | None = None,
    checksums: Mapping[str, str | None] | None = None,
) -> Path:
    """Write a version folder; the last three arguments replace what would be there."""
    folder.mkdir(parents=True)
    names = [name for name in b if a[name].data != b[name].data]
    weight_map = {}
    for number in range(shards if names else 0):
        members = names[number::shards]
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        held, sums = {}, {}
        for name in members:
            data = (frames or {}).get(name) or compressed(encoded(encoding, a[name].data, b[name].data))
            held[name] = Raw("U8", (len(data),), data)
            told = (checksums or {}).get(name, checksum(algorithm, b[name].data))
            if told is not None:
                sums[name] = told
            weight_map[name] = file
        (folder / file).write_bytes(safetensors_bytes(held, sums))
    found = index_of(version, base, encoding, algorithm) if metadata is None else dict(metadata)
    (folder / INDEX).write_text(json.dumps({"metadata": found, "weight_map": weight_map}))
    return folder


def apply_version_folder(folder: Path, a: Tensors) -> Tensors:
    """Return what a version folder gives, checksums compared, as an engine's pull would."""
    metadata = json.loads((folder / INDEX).read_text())["metadata"]
    assert list(metadata) == ["version", "base_version", "delta_encoding", "compression_format", "checksum_format"]
    found = dict(a)
    for path in sorted(folder.glob("*.safetensors")):
        tensors, header = read_file(path)
        for name, held in tensors.items():
            old = np.frombuffer(a[name].data, np.uint8).copy()
            data = np.frombuffer(zstandard.ZstdDecompressor().decompress(held.data), np.uint8)
            if metadata["delta_encoding"] == "xor":
                old ^= data
            else:
                count = int.from_bytes(data[:4].tobytes(), "little")
                old[np.frombuffer(data[4 : 4 + 4 * count].tobytes(), "<u4")] = data[4 + 4 * count :]
            assert checksum(metadata["checksum_format"], old.tobytes()) == header["__metadata__"][name]
            found[name] = Raw(a[name].dtype, a[name].shape, old.tobytes())
    return found


def sparse_tensors(a: Tensors, b: Tensors) -> Tensors:
    """Return indices and values of every changed tensor."""
    found = {}
    for name, new in b.items():
        unit = f"V{WIDTHS.get(new.dtype, 1)}"
        before, after = np.frombuffer(a[name].data, unit), np.frombuffer(new.data, unit)
        (places,) = np.nonzero(before != after)
        if places.size:
            found[f"{name}.indices"] = Raw("I32", (places.size,), places.astype("<i4").tobytes())
            found[f"{name}.values"] = Raw(new.dtype, (places.size,), after[places].tobytes())
    return found


def sparse_metadata(names: Sequence[str], **others: str) -> dict[str, str]:
    """Return the metadata of a sparse patch."""
    return {"sparse": "True", "model_version": "1", "changed_params": json.dumps(list(names)), **others}


def state_sha256(tensors: Tensors) -> str:
    """Return the SHA-256 of a state: the bytes of its tensors in the order of their names."""
    return hashlib.sha256(b"".join(tensors[name].data for name in sorted(tensors))).hexdigest()


def write_sparse_file(path: Path, a: Tensors, b: Tensors, **others: str) -> Path:
    """Write a sparse patch."""
    tensors = sparse_tensors(a, b)
    names = [name.removesuffix(".indices") for name in tensors if name.endswith(".indices")]
    path.write_bytes(safetensors_bytes(tensors, sparse_metadata(names, **others)))
    return path


def apply_sparse_file(path: Path, a: Tensors) -> Tensors:
    """Return what a sparse patch gives."""
    tensors, header = read_file(path)
    found = dict(a)
    for name in json.loads(header["__metadata__"]["changed_params"]):
        unit = f"V{WIDTHS.get(a[name].dtype, 1)}"
        new = np.frombuffer(a[name].data, unit).copy()
        new[np.frombuffer(tensors[f"{name}.indices"].data, "<i4")] = np.frombuffer(tensors[f"{name}.values"].data, unit)
        found[name] = Raw(a[name].dtype, a[name].shape, new.tobytes())
    assert len(tensors) == 2 * len(json.loads(header["__metadata__"]["changed_params"]))
    return found
