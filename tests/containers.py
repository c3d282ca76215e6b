"""Small containers for tests: writing them, taking them apart, putting an edited index back behind a right seal."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from blake3 import blake3
from hypothesis import strategies as st

from deltafmt.container import frame
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry
from deltafmt.terms.floats import narrow

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
FILE_NAMES = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?\.json", fullmatch=True)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write float32 arrays as BF16, without the safetensors library."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = narrow(values.astype(np.float32), "BF16").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def replacement(writer: ContainerWriter, name: str, data: bytes) -> TensorEntry:
    """Write bytes as a U8 tensor that replaces the base's."""
    ref = writer.add(data)
    writer.boundary()
    return TensorEntry(name, "replace", "U8", (len(data),), digest=blake3(data).digest(), data=ref)


def write_container(
    tensors: dict[str, bytes], attachments: dict[str, bytes] | None = None, profile: str = "hot", **rest: Any
) -> bytes:
    """Write a container of replacements and attachments."""
    sink = io.BytesIO()
    writer = ContainerWriter(sink, profile)
    entries = [replacement(writer, name, data) for name, data in tensors.items()]
    attached = {name: writer.attach(data) for name, data in (attachments or {}).items()}
    identity = writer.finish(entries, attachments=attached, **rest)
    assert Container(io.BytesIO(sink.getvalue())).content_id == identity
    return sink.getvalue()


def index_of(data: bytes) -> Any:
    """Decode the index of a container."""
    offset, length = struct.unpack_from("<QQ", data, len(data) - c.TRAILER_SIZE)
    return msgpack.unpackb(data[offset : offset + length])


def sealed(data: bytes, index: bytes, header: bytes | None = None) -> bytes:
    """Put another index (and header) into a container, with a trailer that fits them."""
    offset, _ = struct.unpack_from("<QQ", data, len(data) - c.TRAILER_SIZE)
    header = data[: c.HEADER_SIZE] if header is None else header
    body = header + data[c.HEADER_SIZE : offset] + index
    return body + frame.encode_trailer(header, index, offset, data[-c.TRAILER_SIZE :][24:56])


def edited(data: bytes, edit: Callable[[Any], object]) -> bytes:
    """Change the index of a container, its tensor entries decoded, and seal it again."""
    index = index_of(data)
    index["tensors"] = {name: msgpack.unpackb(entry) for name, entry in index["tensors"].items()}
    edit(index)
    tensors = index.get("tensors")
    if type(tensors) is dict:
        index["tensors"] = {name: msgpack.packb(entry) for name, entry in tensors.items()}
    return sealed(data, msgpack.packb(index))
