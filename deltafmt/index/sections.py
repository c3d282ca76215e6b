"""Sections as the index lists them, references to buffers, attachments (spec/deltafmt-v1.md, sections 5 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltafmt.format import constants as c
from deltafmt.format.checks import Where, check_bytes, check_fields, check_uint, fail
from deltafmt.index.file_names import is_program, is_safe_path, is_weight_file

DIGEST_BYTES = 32
CHECKSUM_BYTES = 16


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the file: a run of stored bytes that starts on a 4096-byte boundary.

    Attributes:
        kind: one of :data:`deltafmt.format.constants.SECTION_KINDS`.
        codec: ``CODEC_STORED`` or ``CODEC_ZSTD``.
        offset: the section's first byte in the file.
        length: the number of stored bytes.
        raw_length: the number of raw bytes, after decoding.
        checksum: the XXH3-128 of the stored bytes, big-endian.
    """

    kind: int
    codec: int
    offset: int
    length: int
    raw_length: int
    checksum: bytes

    KEYS = ("checksum", "codec", "kind", "length", "offset", "raw_length")

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> Section:
        """Return one section of the index, after checking it."""
        checksum, codec, kind, length, offset, raw_length = check_fields(obj, where, cls.KEYS)
        check_bytes(checksum, (where, ".checksum"), CHECKSUM_BYTES)
        if type(codec) is not int or codec not in c.CODECS:
            fail((where, ".codec"), f"unknown codec {codec!r}")
        if type(kind) is not int or kind not in c.SECTION_KINDS:
            fail((where, ".kind"), f"unknown section kind {kind!r}")
        check_uint(length, (where, ".length"))
        check_uint(offset, (where, ".offset"))
        check_uint(raw_length, (where, ".raw_length"))
        if codec == c.CODEC_STORED and raw_length != length:
            fail((where, ".raw_length"), f"a stored section has equal lengths, not {length} and {raw_length}")
        if codec == c.CODEC_ZSTD:
            if kind == c.SECTION_KIND_EXACT:
                fail((where, ".codec"), "a section of exact tensors is stored as it is")
            if kind == c.SECTION_KIND_SERVED:
                fail((where, ".codec"), "the index and trailer of a served part are stored as they are")
            if not raw_length and length:
                fail((where, ".length"), f"a section of no raw bytes stores none, not {length}")
            chunks = -(-raw_length // c.ZSTD_CHUNK)
            if chunks * (4 + c.ZSTD_MIN_FRAME) > length:
                fail((where, ".raw_length"), f"{length} bytes cannot hold the {chunks} frames of {raw_length} bytes")
        return cls(kind, codec, offset, length, raw_length, checksum)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {
            "checksum": self.checksum,
            "codec": self.codec,
            "kind": self.kind,
            "length": self.length,
            "offset": self.offset,
            "raw_length": self.raw_length,
        }


@dataclass(frozen=True, slots=True)
class BufferRef:
    """A run of raw bytes in a section: ``[section, offset, length]``."""

    section: int
    offset: int
    length: int

    @classmethod
    def from_obj(cls, obj: Any, where: Where, alignment: int = c.BUFFER_ALIGNMENT) -> BufferRef:
        """Return a reference, after checking it; the container checks that its section exists and is large enough."""
        if type(obj) is not list or len(obj) != 3:
            fail(where, "a buffer is a list of section, offset and length")
        section, offset, length = obj
        check_uint(section, where)
        check_uint(offset, where)
        check_uint(length, where)
        if offset % alignment:
            fail(where, f"offset {offset} is not a multiple of {alignment}")
        return cls(section, offset, length)

    def to_obj(self) -> list[int]:
        """Return the index's form."""
        return [self.section, self.offset, self.length]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A small file that travels with the delta: its bytes and their BLAKE3."""

    data: BufferRef
    digest: bytes

    KEYS = ("data", "digest")

    @classmethod
    def from_obj(cls, name: str, obj: Any) -> Attachment:
        """Return an attachment, after checking it; its name must be a plain relative path."""
        where = ('attachments["', name, '"]')
        data, digest = check_fields(obj, where, cls.KEYS)
        if not is_safe_path(name):
            fail(where, "not a plain relative path")
        if is_weight_file(name):
            fail(where, "a name for weights")
        if is_program(name):
            fail(where, "a name for a program, or for an adapter's configuration, which a loader would follow")
        return cls(BufferRef.from_obj(data, (where, ".data")), check_bytes(digest, (where, ".digest"), DIGEST_BYTES))

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {"data": self.data.to_obj(), "digest": self.digest}
