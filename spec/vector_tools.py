"""Tools of the test vectors' generators: registering one, making a term, changing a file behind its seal."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgpack
import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from deltafmt.container import frame
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.index.sections import Attachment
from deltafmt.terms.buffers import blank, raw_bytes
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.nm.layout import NMLayout

VECTORS: dict[str, bytes] = {}

Maker = Callable[[], bytes]
MakeArrays = Callable[..., TermArrays]
MakePositions = Callable[[NMLayout, int, int, int], NDArray[np.uint8]]

# What makes up the content of a term of each kind: (layout, rows, columns, seed) to arrays.
ARRAYS: dict[str, MakeArrays] = {}


def makes_arrays(kind: str) -> Callable[[MakeArrays], MakeArrays]:
    """Register what makes up the content of terms of a kind."""

    def register(make: MakeArrays) -> MakeArrays:
        ARRAYS[kind] = make
        return make

    return register


# What makes up the positions of an index encoding: (layout, seed, mask rows, groups) to positions.
POSITIONS: dict[str, MakePositions] = {}


def makes_positions(index: str) -> Callable[[MakePositions], MakePositions]:
    """Register what makes up the positions of an index encoding that cannot hold any."""

    def register(make: MakePositions) -> MakePositions:
        POSITIONS[index] = make
        return make

    return register


def vector(
    expect: str, comment: str, error: str = "", restored: Mapping[str, tuple[bytes, bytes]] = MappingProxyType({})
) -> Callable[[Maker], Maker]:
    """Register a generator; its name is the vector's. ``restored`` has the bytes of base and fine-tune by tensor."""

    def register(make: Maker) -> Maker:
        data = make()
        lines = [f"expect: {expect}", f"comment: {comment}"]
        if error:
            lines.append(f"error: {error}")
        if expect == "ok":
            with DeltaFile(io.BytesIO(data)) as delta:
                lines.append(f"content_id: {delta.content_id}")
                for name in delta:
                    if delta.resolve(name).action == "add":
                        digest = hashlib.sha256(delta.delta(name).tobytes()).hexdigest()
                        lines.append(f"delta.{name}: {digest}")
        for name, (base, finetuned) in restored.items():
            lines += [f"base.{name}: {base.hex()}", f"restored.{name}: {hashlib.sha256(finetuned).hexdigest()}"]
        head = "\n".join(lines) + "\n\n"
        VECTORS[make.__name__.replace("_", "-")] = head.encode() + zlib.compress(data, 9)
        return make

    return register


def fields(count: int, top: int, salt: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return fields from 0 to ``top`` that look random and need no generator to reproduce."""
    return ((np.arange(count, dtype=np.uint64) * 2654435761 + salt >> np.uint64(7)) % (top + 1)).astype(np.uint8)


def coded(coding: Coding, rows: int, columns: int, scales: int, salt: int) -> LowbitArrays:
    """Return made-up codes, zero points, and ``scales`` scales for each row."""
    zero_points = fields(rows * scales, coding.top, salt + 1).reshape(rows, scales)
    return LowbitArrays(
        fields(rows * columns, coding.top, salt).reshape(rows, columns),
        (1 + np.arange(rows * scales, dtype=np.float32)).reshape(rows, scales) / 256,
        zero_points if coding.has_zero_points else None,
    )


def add_term(writer: ContainerWriter, layout: TermLayout, rows: int, columns: int, seed: int) -> tuple[Term, bytes]:
    """Write a term with made-up content; return it and its payload's digest."""
    seed = seed if layout.seeded else 0
    arrays = ARRAYS[layout.kind](layout, rows, columns, seed)
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    digest = blake3()
    refs = {}
    for name, array in packed.items():
        refs[name] = writer.add(raw_bytes(array))
        digest.update(raw_bytes(codec.digested_form(name, array)))
    return Term(writer.layout_number(layout), layout, seed, refs, slots), digest.digest()


def one_tensor(layout: TermLayout, rows: int, columns: int, profile: str = "hot", seed: int = 7) -> bytes:
    """Return a file with one BF16 tensor ``w``."""
    out = io.BytesIO()
    writer = ContainerWriter(out, profile)
    term, digest = add_term(writer, layout, rows, columns, seed)
    base = BaseRef(bytes(32), "BF16", (rows, columns))
    writer.finish([TensorEntry("w", "add", "BF16", (rows, columns), base, digest, None, (term,))])
    return out.getvalue()


def summed(*layouts: TermLayout, rows: int, columns: int) -> bytes:
    """Return a file with one F32 tensor ``w`` of several terms."""
    out = io.BytesIO()
    writer = ContainerWriter(out)
    digest = blake3()
    terms = []
    for layout in layouts:
        term, _ = add_term(writer, layout, rows, columns, 11)
        terms.append(term)
        for ref in term.buffers.values():
            digest.update(out.getvalue()[4096 + ref.offset :][: ref.length])
    base = BaseRef(bytes(32), "F32", (rows, columns))
    writer.finish([TensorEntry("w", "add", "F32", (rows, columns), base, digest.digest(), None, tuple(terms))])
    return out.getvalue()


def one_attachment(name: str) -> bytes:
    """Return a file with one attachment and no tensor."""
    out = io.BytesIO()
    writer = ContainerWriter(out)
    ref = writer.add(b"x", c.SECTION_KIND_ATTACHMENTS)
    writer.finish([], attachments={name: Attachment(ref, blake3(b"x").digest())})
    return out.getvalue()


def simple() -> bytes:
    """Return the file that most bad vectors start from: 40 rows of 50 columns, 2:8, 4 bits."""
    return one_tensor(NMLayout(2, 8, 4, share=4), 40, 50)


def parts(data: bytes) -> tuple[bytes, Any]:
    """Split a file into the bytes before the index, and the decoded index."""
    offset = int.from_bytes(data[-c.TRAILER_SIZE :][:8], "little")
    length = int.from_bytes(data[-c.TRAILER_SIZE :][8:16], "little")
    index = msgpack.unpackb(data[offset : offset + length])
    index["tensors"] = {name: msgpack.unpackb(entry) for name, entry in index["tensors"].items()}
    return data[:offset], index


def encode(index: Any) -> bytes:
    """Encode an index that :func:`parts` has decoded; the keys keep their order."""
    tensors = {name: msgpack.packb(entry) for name, entry in index["tensors"].items()}
    return msgpack.packb({key: tensors if key == "tensors" else value for key, value in index.items()})


def join(body: bytes, index: bytes, content_id: bytes) -> bytes:
    """Return a file: a body, an index behind it, and the trailer that fits them."""
    return body + index + frame.encode_trailer(body[: c.HEADER_SIZE], index, len(body), content_id)


def change(data: bytes, edit: Callable[[Any], object]) -> bytes:
    """Edit the decoded index and seal the file again."""
    body, index = parts(data)
    edit(index)
    return join(body, encode(index), data[-104:-72])


def change_buffer(data: bytes, buffer: str, position: int, value: int) -> bytes:
    """Set a byte of a buffer of tensor ``w``; mend the section's checksum and the seal."""
    body, index = parts(data)
    section, offset, _ = index["tensors"]["w"]["terms"][0]["buffers"][buffer]
    row = index["sections"][section]
    patched = bytearray(body)
    patched[row["offset"] + offset + position] = value
    row["checksum"] = xxhash.xxh3_128_digest(bytes(patched[row["offset"] : row["offset"] + row["length"]]))
    return join(bytes(patched), encode(index), data[-104:-72])
