"""Writing a container in one pass (spec/deltafmt-v1.md, sections 3 to 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypedDict, Unpack

import xxhash
from blake3 import blake3

from deltafmt.container import canonical, frame
from deltafmt.container.chunks import ChunkCompressor
from deltafmt.container.content import content_id
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.format.choices import check_choice
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.scaled import ScaledRef
from deltafmt.index.sections import Attachment, BufferRef, Section
from deltafmt.output import Bytes
from deltafmt.terms.layout import TermLayout

SECTION_TARGET = 4 * 1024 * 1024


class Sink(Protocol):
    """A target that takes bytes in order: a file, a pipe, an upload."""

    def write(self, data: Bytes, /) -> object:
        """Take all of ``data``."""


class About(TypedDict, total=False):
    """What an index says beside its tensors; :class:`deltafmt.container.file_index.FileIndex` says what each is."""

    removed: Iterable[str]
    attachments: Mapping[str, Attachment] | None
    metadata: Mapping[str, str] | None
    scaled: Mapping[str, ScaledRef] | None
    files: Mapping[str, FileRef] | None
    parent: bytes | None


class _OpenSection:
    """A section that is being written."""

    def __init__(self, kind: int, codec: int, offset: int) -> None:
        self.kind = kind
        self.codec = codec
        self.offset = offset
        self.length = 0
        self.raw_length = 0
        self.hasher = xxhash.xxh3_128()
        self.compressor = ChunkCompressor() if codec == c.CODEC_ZSTD else None

    def encode(self, data: Bytes) -> Iterable[Bytes]:
        """Take raw bytes and return the stored bytes that they give so far."""
        self.raw_length += len(data)
        return [data] if self.compressor is None else self.compressor.feed(memoryview(data))

    def record(self) -> Section:
        """Return the section's row of the index."""
        return Section(self.kind, self.codec, self.offset, self.length, self.raw_length, self.hasher.digest())


class ContainerWriter:
    """Write a container from front to back. The writer never seeks and never rewrites, so the sink may be a pipe.

    Call :meth:`add` for every buffer, :meth:`boundary` between tensors, and :meth:`finish` once. A section closes at
    the first boundary after it has reached 4 MiB. Small tensors therefore share a section, and a tensor never lies in
    two.

    Args:
        sink: the target of the bytes.
        profile: ``hot`` stores tensors as they are, ``cold`` compresses them; attachments are compressed in both.
        sections: the sections that an interrupted run has written to the sink already; writing goes on behind them.
        features: the incompatible features of the header (spec section 4.4).
    """

    def __init__(self, sink: Sink, profile: str = "hot", sections: Iterable[Section] = (), features: int = 0) -> None:
        check_choice("profile", profile, c.PROFILES)
        self.profile = profile
        self._sink = sink
        self._header = frame.encode_header(incompatible=features)
        self._sections = list(sections)
        self._layouts: dict[TermLayout, int] = {}
        self._open: _OpenSection | None = None
        if self._sections:
            last = self._sections[-1]
            self._position = last.offset + last.length
        else:
            self._position = 0
            self._put(self._header)
            self._pad(c.SECTION_ALIGNMENT)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The sections that are complete."""
        return tuple(self._sections)

    @property
    def position(self) -> int:
        """Bytes written so far, including those of an interrupted run."""
        return self._position

    @property
    def layouts(self) -> list[TermLayout]:
        """The layout table so far."""
        return list(self._layouts)

    def layout_number(self, layout: TermLayout) -> int:
        """Return the number of a layout in the file's layout table; a new layout is added to it."""
        return self._layouts.setdefault(layout, len(self._layouts))

    def add(self, pieces: Bytes | Iterable[Bytes], kind: int = c.SECTION_KIND_TENSORS) -> BufferRef:
        """Write one buffer, given whole or in pieces, and return where it lies."""
        if self._open is not None and self._open.kind != kind:
            self._close_section()
        parts = [pieces] if isinstance(pieces, bytes | bytearray | memoryview) else pieces
        if self._open is None:
            self._pad(c.SECTION_ALIGNMENT)
            stored = kind == c.SECTION_KIND_EXACT or (kind == c.SECTION_KIND_TENSORS and self.profile == "hot")
            self._open = _OpenSection(kind, c.CODEC_STORED if stored else c.CODEC_ZSTD, self._position)
        section = self._open
        self._raw(bytes(-section.raw_length % c.buffer_alignment(kind)))
        start = section.raw_length
        for part in parts:
            self._raw(part)
        return BufferRef(len(self._sections), start, section.raw_length - start)

    def attach(self, data: bytes) -> Attachment:
        """Write the bytes of an attached file, and return its row of the index."""
        return Attachment(self.add(data, c.SECTION_KIND_ATTACHMENTS), blake3(data).digest())

    def boundary(self) -> bool:
        """Mark the end of a tensor. Close the section if it has reached 4 MiB, and then return True."""
        if self._open is None or self._open.raw_length < SECTION_TARGET:
            return False
        self._close_section()
        return True

    def serve(self, tensors: Iterable[TensorEntry], **about: Unpack[About]) -> bytes:
        """End the served part of a progressive file (spec, section 17.7); return its content id.

        What was written so far, with the index and the trailer that are written now, is a delta file by itself. Exact
        parts follow. :meth:`finish` then takes the same arguments, entries with exact parts, and files.
        """
        index, trailer, identity = self._ending(tensors, **about)
        self._open = _OpenSection(c.SECTION_KIND_SERVED, c.CODEC_STORED, self._position)
        self._raw(index)
        self._raw(trailer)
        self._close_section()
        return identity

    def finish(self, tensors: Iterable[TensorEntry], **about: Unpack[About]) -> bytes:
        """Write the index and the trailer; return the content id."""
        index, trailer, identity = self._ending(tensors, **about)
        self._put(index)
        self._put(trailer)
        return identity

    def _ending(
        self,
        tensors: Iterable[TensorEntry],
        *,
        removed: Iterable[str] = (),
        attachments: Mapping[str, Attachment] | None = None,
        metadata: Mapping[str, str] | None = None,
        scaled: Mapping[str, ScaledRef] | None = None,
        files: Mapping[str, FileRef] | None = None,
        parent: bytes | None = None,
    ) -> tuple[bytes, bytes, bytes]:
        """Close the last section; return the index, the trailer and the content id."""
        self._close_section()
        self._pad(c.SECTION_ALIGNMENT)
        entries = {entry.name: entry for entry in tensors}
        index: dict[str, Any] = {
            "attachments": {name: value.to_obj() for name, value in (attachments or {}).items()},
            **({"files": {name: file.to_obj() for name, file in files.items()}} if files else {}),
            "layouts": [layout.to_obj() for layout in self._layouts],
            "metadata": dict(metadata or {}),
            **({"parent": parent} if parent is not None else {}),
            "profile": self.profile,
            "removed": sorted(removed),
            **({} if scaled is None else {"scaled": {k: canonical.encode(ref.to_obj()) for k, ref in scaled.items()}}),
            "sections": [section.to_obj() for section in self._sections],
            "tensors": {name: canonical.encode_ordered(entry.to_obj()) for name, entry in entries.items()},
        }
        data = canonical.encode(index)
        if len(data) > c.MAX_INDEX_BYTES or len(entries) > c.MAX_TENSORS:
            raise UsageError(
                f"{len(entries)} tensors give an index of {len(data)} bytes; "
                f"the limits are {c.MAX_TENSORS} and {c.MAX_INDEX_BYTES}"
            )
        about = index["removed"], attachments or {}, index["metadata"], scaled, files, parent
        identity = content_id(entries.values(), *about)
        trailer = frame.encode_trailer(self._header, data, self._position, identity)
        return data, trailer, identity

    def _raw(self, data: Bytes) -> None:
        if self._open is not None and len(data):
            for stored in self._open.encode(data):
                self._stored(self._open, stored)

    def _stored(self, section: _OpenSection, data: Bytes) -> None:
        section.hasher.update(data)
        section.length += len(data)
        self._put(data)

    def _close_section(self) -> None:
        section = self._open
        if section is None:
            return
        if section.compressor is not None:
            for stored in section.compressor.finish():
                self._stored(section, stored)
        self._sections.append(section.record())
        self._open = None
        if section.kind != c.SECTION_KIND_SERVED:  # which ends a file that can be opened as it is
            self._pad(c.SECTION_ALIGNMENT)

    def _put(self, data: Bytes) -> None:
        self._sink.write(data)
        self._position += len(data)

    def _pad(self, alignment: int) -> None:
        self._put(bytes(-self._position % alignment))
