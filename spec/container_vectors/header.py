"""Vectors of the header (section 4)."""

from __future__ import annotations

from draft import MAGIC, Draft, header
from vector_tools import simple, small, vector


def with_header(head: bytes) -> bytes:
    """Return a small file with another header."""
    draft = Draft.of(small())
    draft.header = head
    return draft.build()


@vector("invalid", "an empty file", "the file is empty")
def empty_file() -> bytes:
    return b""


@vector("invalid", "some other file", "not a deltafmt file")
def foreign() -> bytes:
    return b"PK\x03\x04" + bytes(200)


@vector("invalid", "CR LF became LF on the way", "text mode")
def text_mode() -> bytes:
    return simple().replace(b"\r\n", b"\n", 1)


@vector("invalid", "the file ends inside the header", "ends inside the header")
def header_cut() -> bytes:
    return small()[:40]


@vector("invalid", "the first byte of the magic is another", "text mode")
def magic_first_byte() -> bytes:
    return with_header(header(magic=b"\x8a" + MAGIC[1:]))


@vector("invalid", "the last byte of the magic is another", "text mode")
def magic_last_byte() -> bytes:
    return with_header(header(magic=MAGIC[:-1] + b"\x0b"))


@vector("invalid", "the header's checksum does not match", "checksum")
def header_checksum() -> bytes:
    head = header()
    return with_header(head[:-1] + bytes([head[-1] ^ 1]))


@vector("unsupported", "the file asks for a reader of version 2", "version 2")
def newer_version() -> bytes:
    return with_header(header(version=2))


@vector("invalid", "the file asks for a reader of version 2, and the header's checksum does not match", "checksum")
def newer_version_damaged() -> bytes:
    head = header(version=2)
    return with_header(head[:-1] + bytes([head[-1] ^ 1]))


@vector("invalid", "the file asks for a reader of version 0", "version 0")
def version_0() -> bytes:
    return with_header(header(version=0))


@vector("unsupported", "incompatible feature bit 9 is set", "bit 9")
def incompatible_bit() -> bytes:
    return with_header(header(incompatible=1 << 9))


@vector("unsupported", "the highest incompatible feature bit is set", "bit 63")
def incompatible_bit_63() -> bytes:
    return with_header(header(incompatible=1 << 63))


@vector("ok", "all compatible feature bits are set, which a reader ignores")
def compatible_bit() -> bytes:
    return with_header(header(compatible=2**64 - 1))


@vector("ok", "all incompatible features of version 1 are set, and none is used: a writer should not do so")
def unused_features() -> bytes:
    return with_header(header(incompatible=7))


@vector("invalid", "the header says that it has 65 bytes", "reserved bytes of the header")
def header_size() -> bytes:
    return with_header(header(size=65))


@vector("invalid", "the first reserved byte of the header is set", "reserved bytes of the header")
def header_reserved_first() -> bytes:
    return with_header(header(reserved=b"\1" + bytes(23)))


@vector("invalid", "the last reserved byte of the header is set", "reserved bytes of the header")
def header_reserved_last() -> bytes:
    return with_header(header(reserved=bytes(23) + b"\1"))


# The order of checks decides between "invalid" and "unsupported".
for _name, _what, _head in (
    ("of-another-size", "has a header of 128 bytes", header(version=2, size=128)),
    ("with-reserved", "uses reserved bytes", header(version=2, reserved=b"\1" + bytes(23))),
    ("with-bits", "has incompatible bit 9", header(version=2, incompatible=1 << 9)),
):
    _comment = f"the file asks for a reader of version 2, and {_what}"
    vector("unsupported", _comment, "version 2", f"newer-version-{_name}")(lambda head=_head: with_header(head))  # type: ignore[misc]


@vector("unsupported", "incompatible bit 63 is set, and reserved bytes are used", "bit 63")
def incompatible_bit_with_reserved() -> bytes:
    return with_header(header(incompatible=1 << 63, reserved=b"\1" + bytes(23)))


@vector("invalid", "the file asks for version 0, and incompatible bit 9 is set", "version 0")
def version_0_with_bits() -> bytes:
    return with_header(header(version=0, incompatible=1 << 9))
