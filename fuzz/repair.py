"""Take a delta file apart, and put it together again with correct lengths, checksums, digests and seal.

A reader refuses nearly every random change at a checksum. These functions mend the checksums after a change, so that
the changed bytes reach the code that decodes them. They follow spec/deltafmt-v1.md, sections 4 to 8, and take any
input. They do not ask the reader: a file that the reader wrongly refuses, or another reader wrongly takes, is mended
as well as any other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import msgpack
import xxhash
import zstandard
from blake3 import blake3

from deltafmt.container.chunks import ChunkCompressor, ChunkReader
from deltafmt.errors import DeltafmtError
from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry
from deltafmt.terms.buffers import raw_bytes, views
from deltafmt.terms.codecs import term_codec
from deltafmt.terms.registry import parse_layout

# Raw bytes of a section that are decoded or made at most.
LARGEST_SECTION = 1 << 20
DECODE_ERRORS = (ValueError, OverflowError, RecursionError, msgpack.exceptions.UnpackException)
SHAPE_ERRORS = (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError)

_HEADER = struct.Struct("<8sIIQQ24s")
_TRAILER = struct.Struct("<QQQ32s32s")


@dataclass
class Header:
    """The fields of a header."""

    version: int = c.FORMAT_VERSION
    size: int = c.HEADER_SIZE
    incompatible: int = 0
    compatible: int = 0
    reserved: bytes = bytes(24)

    def encode(self) -> bytes:
        """Return the 64 bytes, with the checksum that fits them."""
        body = _HEADER.pack(c.HEADER_MAGIC, self.version, self.size, self.incompatible, self.compatible, self.reserved)
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@dataclass
class Parts:
    """A file in pieces.

    Attributes:
        header: the fields of the header.
        sections: the stored bytes of each section.
        index: the decoded index; every tensor entry and every description of a scaled tensor is decoded as well.
    """

    header: Header = field(default_factory=Header)
    sections: list[bytearray] = field(default_factory=list)
    index: Any = None

    def raw(self, number: int) -> bytes | None:
        """Return the raw bytes of a section; None if it cannot be decoded or is large."""
        try:
            row, stored = self.index["sections"][number], self.sections[number]
            if row["codec"] == c.CODEC_STORED:
                return bytes(stored)
            if not 0 <= row["raw_length"] <= LARGEST_SECTION:
                return None
            return bytes(ChunkReader(memoryview(stored), row["raw_length"], "").read(0, row["raw_length"]))
        except (*SHAPE_ERRORS, DeltafmtError, struct.error, zstandard.ZstdError, MemoryError):
            return None

    def set_raw(self, number: int, raw: bytes) -> None:
        """Give a section other raw bytes, stored as its row of the index says."""
        row = self.index["sections"][number]
        row["raw_length"] = len(raw)
        self.sections[number] = bytearray(raw) if row["codec"] == c.CODEC_STORED else compress(raw)


def split(data: bytes) -> Parts | None:
    """Take a file apart; return None if its trailer or index cannot be read."""
    if len(data) < c.SECTION_ALIGNMENT + c.TRAILER_SIZE:
        return None
    start = index_start(data)
    try:
        index = msgpack.unpackb(data[start : -c.TRAILER_SIZE], strict_map_key=False)
        rows = [(row["offset"], row["length"]) for row in index["sections"]]
        for key in ("tensors", "scaled"):
            if key in index:
                index[key] = {name: decode_entry(entry) for name, entry in index[key].items()}
        header = Header(*_HEADER.unpack(data[: _HEADER.size])[1:])
        return Parts(header, [bytearray(data[offset : offset + length]) for offset, length in rows], index)
    except (*DECODE_ERRORS, *SHAPE_ERRORS):
        return None


def index_start(data: bytes) -> int:
    """Return where a file's trailer says that the index begins."""
    return int.from_bytes(data[-c.TRAILER_SIZE : -c.TRAILER_SIZE + 8], "little")


def decode_entry(entry: Any) -> Any:
    """Return a decoded tensor entry, or the entry itself if it cannot be decoded."""
    try:
        return msgpack.unpackb(entry, strict_map_key=False)
    except (*DECODE_ERRORS, TypeError):
        return entry


def encode_index(index: Any) -> bytes | None:
    """Return the bytes of an index whose entries are decoded; None if it cannot be encoded."""
    try:
        if isinstance(index, dict):
            packed = {key: packed_entries(index[key]) for key in ("tensors", "scaled") if key in index}
            index = {**index, **packed}
        return bytes(msgpack.packb(ordered(index)))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def packed_entries(entries: Any) -> Any:
    """Return a map whose values that are maps are encoded."""
    if not isinstance(entries, dict):
        return entries
    return {
        name: msgpack.packb(ordered(entry)) if isinstance(entry, dict) else entry for name, entry in entries.items()
    }


def ordered(obj: Any) -> Any:
    """Return an object with the string keys of its maps sorted."""
    if isinstance(obj, dict):
        return {key: ordered(obj[key]) for key in sorted(obj, key=order)}
    return [ordered(value) for value in obj] if isinstance(obj, list) else obj


def order(key: Any) -> Any:
    """Return what keys are sorted by: strings by their characters, all others behind them."""
    return (0, key) if isinstance(key, str) else (1, repr(key))


def join(
    parts: Parts, *, places: bool = True, digests: bool = True, trailer: dict[str, Any] | None = None
) -> bytes | None:
    """Put a file together and seal it; return None if the index cannot be encoded.

    Args:
        parts: the pieces of the file. What is mended is mended in them.
        places: correct the offsets, lengths and checksums of the sections first.
        digests: correct the digests of tensors and attachments first, and give the file the content id of its content.
        trailer: fields of the trailer to get other values, see :func:`seal`.
    """
    header = parts.header.encode()
    body = bytearray(header.ljust(c.SECTION_ALIGNMENT, b"\0"))
    for number, stored in enumerate(parts.sections):
        if places:
            mend_place(parts, number, len(body))
        body += stored
        body += bytes(-len(body) % c.SECTION_ALIGNMENT)
    identity = bytes(32)
    if digests:
        mend_digests(parts)
        identity = content_identity(parts.index)
    if places and digests:
        body = mended_end(parts, body)
    encoded = encode_index(parts.index)
    return None if encoded is None else seal(bytes(body), encoded, identity, **(trailer or {}))


def mended_end(parts: Parts, body: bytearray) -> bytearray:
    """Return header and sections with the end of the served part that the index asks for (section 17.7)."""
    try:
        rows = parts.index["sections"]
        number = [row["kind"] for row in rows].index(c.SECTION_KIND_SERVED)
        served = {key: value for key, value in parts.index.items() if key != "files"}
        served["sections"] = rows[:number]
        served["tensors"] = {
            name: {key: value for key, value in entry.items() if key != "exact"}
            for name, entry in served["tensors"].items()
        }
        start, encoded = rows[number]["offset"], encode_index(served)
        if encoded is None:
            return body
        parts.sections[number] = bytearray(seal(bytes(body[:start]), encoded, content_identity(served))[start:])
    except SHAPE_ERRORS:
        return body
    body = body[:start]
    for behind in range(number, len(parts.sections)):
        mend_place(parts, behind, len(body))
        body += parts.sections[behind]
        body += bytes(-len(body) % c.SECTION_ALIGNMENT)
    return body


def mend_place(parts: Parts, number: int, offset: int) -> None:
    """Correct a section's row of the index, if there is one."""
    try:
        row, stored = parts.index["sections"][number], parts.sections[number]
        row.update(offset=offset, length=len(stored), checksum=xxhash.xxh3_128_digest(stored))
        if row["codec"] == c.CODEC_STORED:
            row["raw_length"] = len(stored)
    except SHAPE_ERRORS:
        pass


def mend_digests(parts: Parts) -> None:
    """Correct the digests of tensors and attachments, as far as their bytes can be found."""
    raws: dict[int, bytes | None] = {}

    def bytes_at(reference: Any) -> bytes:
        number, offset, length = reference
        if number not in raws:
            raws[number] = parts.raw(number)
        raw = raws[number]
        if raw is None or not 0 <= offset <= offset + length <= len(raw):
            raise ValueError
        return raw[offset : offset + length]

    index = parts.index if isinstance(parts.index, dict) else {}
    for key in ("attachments", "tensors"):
        held = index.get(key)
        for name, entry in held.items() if isinstance(held, dict) else ():
            try:
                if "digest" not in entry:
                    continue
                if key == "attachments":
                    entry["digest"] = blake3(bytes_at(entry["data"])).digest()
                else:
                    entry["digest"] = payload_digest(name, entry, index["layouts"], bytes_at)
            except SHAPE_ERRORS:
                continue


def payload_digest(name: str, entry: dict[str, Any], layouts: list[Any], bytes_at: Any) -> bytes:
    """Return the digest of a tensor's payload (section 7.6): its buffers in the order of their names, then its data."""
    digest = blake3()
    for number, term in enumerate(entry.get("terms", ())):
        held = {key: bytes_at(term["buffers"][key]) for key in sorted(term["buffers"])}
        if layouts[term["layout"]].get("index") == "rank":
            held = plain_buffers(name, entry, layouts, number, held)
        for data in held.values():
            digest.update(data)
    if "data" in entry:
        digest.update(bytes_at(entry["data"]))
    return digest.digest()


def plain_buffers(
    name: str, entry: dict[str, Any], layouts: list[Any], number: int, held: dict[str, bytes]
) -> dict[str, bytes]:
    """Return a term's buffers with a ``rank`` index in its ``fixed`` form, as far as it has one."""
    try:
        served = {key: value for key, value in entry.items() if key != "exact"}
        parsed = TensorEntry.from_obj(name, served, tuple(parse_layout(layout, "") for layout in layouts))
        term = parsed.terms[number]
        codec = term_codec(term.layout, parsed.delta_rows, parsed.columns, term.seed, term.slots)
        arrays = views(term.layout, *codec.shape, {key: memoryview(data) for key, data in held.items()}, term.slots)
        return {
            key: b"".join(bytes(raw_bytes(piece)) for piece in codec.digested_pieces(key, array))
            for key, array in arrays.items()
        }
    except (*SHAPE_ERRORS, DeltafmtError, MemoryError):
        return held


def content_identity(index: Any) -> bytes:
    """Return the content id of an index (section 7.6); zeros if it has none."""
    try:
        said = {
            "attachments": {name: entry["digest"] for name, entry in index["attachments"].items()},
            **(
                {"files": {name: file["digest"] for name, file in index["files"].items()}} if index.get("files") else {}
            ),
            "metadata": index["metadata"],
            **({"parent": index["parent"]} if "parent" in index else {}),
            "removed": index["removed"],
            **({"scaled": index["scaled"]} if "scaled" in index else {}),
            "tensors": {name: semantic_entry(entry, index["layouts"]) for name, entry in index["tensors"].items()},
        }
        return blake3(msgpack.packb(ordered(said))).digest()
    except (*SHAPE_ERRORS, RecursionError):
        return bytes(32)


def semantic_entry(entry: dict[str, Any], layouts: list[Any]) -> dict[str, Any]:
    """Return an entry without the places of its bytes."""
    said = {key: value for key, value in entry.items() if key != "data"}
    if "exact" in said:
        said["exact"] = {"digest": said["exact"]["digest"]}
    if "terms" in said:
        said["terms"] = [
            {**term, "layout": plain_layout(layouts[term["layout"]]), "buffers": None} for term in said["terms"]
        ]
        for term in said["terms"]:
            del term["buffers"]
    return said


def plain_layout(layout: dict[str, Any]) -> dict[str, Any]:
    """Return a layout with ``fixed`` in place of ``rank``."""
    return {**layout, "index": "fixed"} if layout.get("index") == "rank" else layout


def seal(body: bytes, index: bytes, identity: bytes = bytes(32), **other: Any) -> bytes:
    """Return header and sections, index and a trailer that fits them.

    Args:
        body: header and sections.
        index: the encoded index.
        identity: the content id.
        other: values of fields of the trailer that do not fit: ``offset``, ``length``, ``total``, ``reserved``.
    """
    offset, length = other.get("offset", len(body)), other.get("length", len(index))
    total = other.get("total", len(body) + len(index) + c.TRAILER_SIZE)
    covered = _TRAILER.pack(offset, length, total, identity, other.get("reserved", bytes(32)))
    digest = blake3(body[: c.HEADER_SIZE] + index + covered).digest()
    return body + index + covered + digest + c.TRAILER_MAGIC


def reseal_index(data: bytes, index: bytes) -> bytes:
    """Return a file with other index bytes and a seal that fits them."""
    return seal(data[: index_start(data)], index, data[-c.TRAILER_SIZE + 24 : -c.TRAILER_SIZE + 56])


def compress(raw: bytes) -> bytearray:
    """Return the stored bytes of a zstd section."""
    compressor = ChunkCompressor()
    return bytearray(b"".join([*compressor.feed(raw), *compressor.finish()]))
