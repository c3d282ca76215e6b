"""The header and the trailer, the two fixed-size ends of a file (spec/deltafmt-v1.md, sections 4 and 8)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash
from blake3 import blake3

from deltafmt.errors import InvalidFileError, UnsupportedError
from deltafmt.format import constants as c

_HEADER = struct.Struct("<8sIIQQ24sQ")
_TRAILER = struct.Struct("<QQQ32s32s32s8s")
_COVERED = 88  # bytes of the trailer that its own digest covers

assert _HEADER.size == c.HEADER_SIZE
assert _TRAILER.size == c.TRAILER_SIZE


def encode_header(version: int = c.FORMAT_VERSION, incompatible: int = 0, compatible: int = 0) -> bytes:
    """Return the 64 bytes of a header."""
    body = _HEADER.pack(c.HEADER_MAGIC, version, c.HEADER_SIZE, incompatible, compatible, bytes(24), 0)[:56]
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def check_header(data: bytes) -> int:
    """Check a header and return its incompatible features, all of which this reader knows.

    Raises:
        UnsupportedError: the file needs a newer reader, or a feature that this reader lacks.
        InvalidFileError: the bytes are not a valid header.
    """
    if not data.startswith(c.HEADER_MAGIC):
        if data[1:4] == c.HEADER_MAGIC[1:4]:
            raise InvalidFileError(f"the magic {data[:8].hex()} is damaged, as by a transfer in text mode")
        raise InvalidFileError(f"not a deltafmt file: it starts with {data[:8].hex() or 'nothing'}")
    if len(data) < c.HEADER_SIZE:
        raise InvalidFileError(f"the file ends inside the header, after {len(data)} bytes")
    _, version, size, incompatible, _, reserved, checksum = _HEADER.unpack(data)
    found = xxhash.xxh3_64_intdigest(data[:56])
    if found != checksum:
        raise InvalidFileError(f"the header's checksum is {checksum:016x}, its bytes give {found:016x}")
    if version > c.FORMAT_VERSION:
        raise UnsupportedError(f"the file needs a reader of version {version}, this one reads {c.FORMAT_VERSION}")
    if version == 0:
        raise InvalidFileError("the header asks for reader version 0, which never existed")
    unknown = incompatible & ~c.KNOWN_FEATURES
    if unknown:
        names = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise UnsupportedError(f"the file uses incompatible features that this reader lacks: bit {names}")
    if size != c.HEADER_SIZE or any(reserved):
        raise InvalidFileError("reserved bytes of the header are not as required")
    return int(incompatible)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last 128 bytes of a file."""

    index_offset: int
    index_length: int
    file_length: int
    content_id: bytes
    digest: bytes


def encode_trailer(header: bytes, index: bytes, index_offset: int, content_id: bytes) -> bytes:
    """Return the 128 bytes of a trailer for the index at ``index_offset``."""
    length = index_offset + len(index) + c.TRAILER_SIZE
    covered = _TRAILER.pack(index_offset, len(index), length, content_id, bytes(32), bytes(32), b"")[:_COVERED]
    return covered + _seal(header, index, covered) + c.TRAILER_MAGIC


def decode_trailer(data: bytes, file_length: int) -> Trailer:
    """Return the trailer in ``data``, after checking its fields against the file's length.

    Raises:
        InvalidFileError: the file is truncated, bytes follow the trailer, or a field is wrong.
    """
    if len(data) < c.TRAILER_SIZE or not data.endswith(c.TRAILER_MAGIC):
        raise InvalidFileError("no trailer at the end: the file is truncated, or something follows it")
    offset, length, total, content_id, reserved, digest, _ = _TRAILER.unpack(data)
    if total != file_length:
        raise InvalidFileError(f"the trailer speaks of {total} bytes, the file has {file_length}")
    if length > c.MAX_INDEX_BYTES:
        raise InvalidFileError(f"an index of {length} bytes is over the limit of {c.MAX_INDEX_BYTES}")
    if offset + length + c.TRAILER_SIZE != file_length or offset < c.SECTION_ALIGNMENT or offset % c.SECTION_ALIGNMENT:
        raise InvalidFileError(f"an index of {length} bytes at {offset} does not end where the trailer starts")
    if any(reserved):
        raise InvalidFileError("reserved bytes of the trailer are not zero")
    return Trailer(offset, length, total, content_id, digest)


def check_seal(header: bytes, index: bytes | memoryview, trailer_bytes: bytes, trailer: Trailer) -> None:
    """Check the BLAKE3 of header, index and trailer.

    Raises:
        InvalidFileError: the digest differs.
    """
    if _seal(header, index, trailer_bytes[:_COVERED]) != trailer.digest:
        raise InvalidFileError("the digest of header, index and trailer does not match: the file is damaged")


def _seal(header: bytes, index: bytes | memoryview, covered: bytes) -> bytes:
    hasher = blake3(header)
    hasher.update(index)
    hasher.update(covered)
    return hasher.digest()
