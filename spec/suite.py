"""Reading the vectors: what a file says, and whether this package's reader finds it (specification, section 16)."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import deltafmt
from deltafmt.delta import DeltaFile
from deltafmt.errors import DeltafmtError, InvalidFileError, UnsupportedError, WrongBaseError
from deltafmt.pipeline.verify import verify

FOLDER = Path(__file__).resolve().parent / "vectors"


@dataclass(frozen=True)
class Vector:
    """One vector.

    Attributes:
        name: its file's name, without the ending.
        keys: the lines of its head.
        data: the delta file.
        base: dtype, shape and bytes of every tensor of its base, by name.
    """

    name: str
    keys: dict[str, str]
    data: bytes
    base: dict[str, tuple[str, list[int], bytes]] = field(default_factory=dict)

    def digests(self, kind: str) -> dict[str, str]:
        """Return the SHA-256 of every ``delta`` or ``tensor`` that the vector names."""
        return {key[len(kind) + 1 :]: value for key, value in self.keys.items() if key.startswith(f"{kind}.")}


def parsed(name: str, content: bytes) -> Vector:
    """Return the vector that a file holds."""
    head, _, body = content.partition(b"\n\n")
    keys = dict(line.split(": ", 1) for line in head.decode().split("\n"))
    vector = Vector(name, keys, zlib.decompress(body))
    for key, value in vector.digests("base").items():
        dtype, sizes, data = value.split(" ")
        vector.base[key] = dtype, [int(size) for size in sizes.split(",") if size], bytes.fromhex(data)
    return vector


def load(name: str) -> Vector:
    """Read a vector from the folder."""
    return parsed(name, (FOLDER / f"{name}.vec").read_bytes())


def problem(vector: Vector) -> str | None:
    """Return in what this package's reader differs from a vector; None if it finds what it should."""
    expect = vector.keys["expect"]
    try:
        found = verify(io.BytesIO(vector.data)).content_id  # type: ignore[arg-type]
    except InvalidFileError as error:
        kind = "unsupported" if isinstance(error, UnsupportedError) else "invalid"
        return None if kind == expect else f"{kind}: {error}"
    if expect != "ok":
        return "accepted"
    if found != vector.keys["content_id"]:
        return f"content id {found}"
    try:
        return _matrices(vector) or (_applied(vector) if vector.base else None)
    except DeltafmtError as error:
        return f"reading: {error}"


def _matrices(vector: Vector) -> str | None:
    with DeltaFile(io.BytesIO(vector.data)) as delta:
        found = {
            name: hashlib.sha256(delta.delta(name).tobytes()).hexdigest()
            for name in delta
            if delta.resolve(name).action == "add"
        }
    wrong = sorted(name for name, digest in vector.digests("delta").items() if found.get(name) != digest)
    return f"delta of {wrong[0]}" if wrong else None if len(found) == len(vector.digests("delta")) else "tensors"


def _applied(vector: Vector) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("base.safetensors", "x.deltafmt", "out")]
        paths[0].write_bytes(safetensors(vector.base))
        paths[1].write_bytes(vector.data)
        refused = vector.keys.get("apply") == "refuse"
        try:
            with DeltaFile(paths[1]) as delta:
                links = delta.container.parent is not None
            if links:
                deltafmt.apply(paths[0], [paths[1]], paths[2], threads=1)
            else:
                deltafmt.unpack(*paths, threads=1)
        except (WrongBaseError, InvalidFileError) as error:
            return None if refused else f"unpacking: {error}"
        if refused:
            return "applied"
        data = (paths[2] / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, row in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, stop = row["data_offsets"]
            found[name] = hashlib.sha256(data[8 + size :][start:stop]).hexdigest()
    wanted = vector.digests("tensor")
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return f"fine-tuned tensor {wrong[0]}" if wrong else None


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return tensors as a file of safetensors."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + b"".join(data for _, _, data in tensors.values())
