"""Reading a container: its ends and index at once, a section when it is first touched (spec, sections 3 to 9)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import xxhash

from deltafmt.container import canonical, frame
from deltafmt.container.source import Source, open_source
from deltafmt.errors import DeltafmtError, InvalidFileError
from deltafmt.format import constants as c
from deltafmt.format.checks import Where, fail
from deltafmt.index.entries import TensorEntry
from deltafmt.index.sections import Attachment, BufferRef, Section
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.registry import parse_layout

if TYPE_CHECKING:
    from deltafmt.container.chunks import ChunkReader

_TOP_KEYS = ("attachments", "layouts", "metadata", "profile", "removed", "sections", "tensors")


class Container:
    """An open ``.deltafmt`` file.

    Args:
        path: a path, or a binary file object with ``seek`` and ``read``.
        mmap: map the file; otherwise use plain reads.
        verify: check a section's checksum when it is first touched.
        max_raw_bytes: refuse a file whose sections decode to more than this many bytes.

    Raises:
        StorageError: the file cannot be read.
        InvalidFileError: it breaks the format; the message names the place.
        UnsupportedError: it needs a newer reader.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        mmap: bool = True,
        verify: bool = True,
        max_raw_bytes: int = c.MAX_RAW_BYTES,
    ) -> None:
        try:
            self._source: Source = open_source(path, mmap=mmap)
        except InvalidFileError as error:
            raise error.located(path) from error
        self.name = self._source.name
        self._verify = verify
        self._touched: set[int] = set()
        self._chunks: dict[int, ChunkReader] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._lock = threading.RLock()
        try:
            self._open(max_raw_bytes)
        except DeltafmtError as error:
            self._source.close()
            raise error.located(self.name) from error

    def _open(self, max_raw_bytes: int) -> None:
        source = self._source
        header = bytes(source.read(0, min(c.HEADER_SIZE, source.size)))
        frame.check_header(header)
        if source.size < c.SECTION_ALIGNMENT + c.TRAILER_SIZE:
            raise InvalidFileError(f"the file ends too early, after {source.size} bytes")
        trailer_bytes = bytes(source.read(source.size - c.TRAILER_SIZE, c.TRAILER_SIZE))
        trailer = frame.decode_trailer(trailer_bytes, source.size)
        index = bytes(source.read(trailer.index_offset, trailer.index_length))
        frame.check_seal(header, index, trailer_bytes, trailer)
        self.size = source.size
        self.index_offset = trailer.index_offset
        self.index_length = trailer.index_length
        self.content_id = trailer.content_id
        self.seal = trailer.digest
        self._check_zeros(c.HEADER_SIZE, c.SECTION_ALIGNMENT, "after the header")
        self._parse(canonical.decode(index, "the index"), max_raw_bytes)

    def _parse(self, obj: Any, max_raw_bytes: int) -> None:
        if type(obj) is not dict or tuple(obj) != _TOP_KEYS:
            fail("index", f"expected the keys {', '.join(_TOP_KEYS)}")
        if obj["profile"] not in c.PROFILES:
            fail("profile", f"unknown profile {obj['profile']!r}")
        self.profile: str = obj["profile"]
        if type(obj["layouts"]) is not list:
            fail("layouts", "expected a list")
        metadata = canonical.check_names(obj["metadata"], "metadata")
        if not all(type(value) is str for value in metadata.values()):
            fail("metadata", "a value is not a string")
        self.metadata: Mapping[str, str] = metadata
        self.layouts: tuple[TermLayout, ...] = tuple(
            parse_layout(layout, f"layouts[{i}]") for i, layout in enumerate(obj["layouts"])
        )
        if self.profile == "hot" and any(layout.cold_only for layout in self.layouts):
            fail("layouts", "a rank index stands in a hot file")
        if len(set(self.layouts)) != len(self.layouts):
            fail("layouts", "a layout stands in the table twice")
        self.sections = self._parse_sections(obj["sections"], max_raw_bytes)
        self._tensors = canonical.check_names(obj["tensors"], "tensors")
        if len(self._tensors) > c.MAX_TENSORS:
            fail("tensors", f"{len(self._tensors)} entries are more than {c.MAX_TENSORS}")
        self.removed = self._parse_removed(obj["removed"])
        self.attachments: Mapping[str, Attachment] = {
            name: Attachment.from_obj(name, value)
            for name, value in canonical.check_names(obj["attachments"], "attachments").items()
        }
        for name, attachment in self.attachments.items():
            parts = name.split("/")
            if any("/".join(parts[:depth]) in self.attachments for depth in range(1, len(parts))):
                fail(f'attachments["{name}"]', "another attachment stands in the place of its folder")
            self._check_ref(attachment.data, f'attachments["{name}"]', c.KIND_ATTACHMENTS)

    def _parse_sections(self, rows: Any, max_raw_bytes: int) -> tuple[Section, ...]:
        if type(rows) is not list:
            fail("sections", "expected a list")
        sections = tuple(Section.from_obj(row, f"sections[{i}]") for i, row in enumerate(rows))
        position = c.SECTION_ALIGNMENT
        raw_bytes = 0
        for number, section in enumerate(sections):
            if section.offset != position:
                fail(f"sections[{number}].offset", f"{section.offset} where {position} is next")
            if section.offset + section.length > self.index_offset:
                fail(f"sections[{number}].length", f"{section.length} bytes run into the index")
            if self.profile == "hot" and section.kind == c.KIND_TENSORS and section.codec != c.CODEC_STORED:
                fail(f"sections[{number}].codec", "a hot file stores its tensors as they are")
            raw_bytes += section.raw_length
            if raw_bytes > max_raw_bytes:
                fail(f"sections[{number}].raw_length", f"the sections decode to more than {max_raw_bytes} bytes")
            position = c.align(section.offset + section.length, c.SECTION_ALIGNMENT)
        if position != self.index_offset:
            fail("sections", f"they end at {position}, the index starts at {self.index_offset}")
        return sections

    def _parse_removed(self, names: Any) -> tuple[str, ...]:
        if type(names) is not list or not all(type(name) is str for name in names):
            fail("removed", "expected a list of names")
        if not all(1 <= len(name.encode("utf-8", "surrogatepass")) <= c.MAX_NAME_BYTES for name in names):
            fail("removed", f"a name has 1 to {c.MAX_NAME_BYTES} bytes")
        if names != sorted(set(names)) or any(name in self._tensors for name in names):
            fail("removed", "the names are not sorted and distinct from the tensors")
        return tuple(names)

    def keys(self) -> list[str]:
        """Return the tensor names, sorted."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def entry(self, name: str) -> TensorEntry:
        """Return the checked entry of a tensor.

        Raises:
            KeyError: no such tensor.
            InvalidFileError: the entry breaks the format.
        """
        found = self._entries.get(name)
        if found is None:
            try:
                found = self._parse_entry(name)
            except InvalidFileError as error:
                raise InvalidFileError(f"{self.name}: {error}") from error
            self._entries[name] = found
        return found

    def adopt(self, earlier: Container) -> None:
        """Take over the entries that an earlier opening of the file has decoded, if the index is still the same."""
        if earlier.seal == self.seal:
            self._entries = earlier._entries

    def entries(self) -> Iterator[TensorEntry]:
        """Iterate over all entries, in the order of their names."""
        return (self.entry(name) for name in self._tensors)

    def _parse_entry(self, name: str) -> TensorEntry:
        where = ('tensors["', name, '"]')
        if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= c.MAX_NAME_BYTES:
            fail(where, f"a name has 1 to {c.MAX_NAME_BYTES} bytes")
        entry = TensorEntry.from_obj(name, self._decode_entry(name), self.layouts)
        refs = entry.refs()
        for buffer, ref in refs:
            if ref.section != refs[0][1].section:
                fail(where, "the buffers lie in several sections")
            self._check_ref(ref, (where, ".", buffer), c.KIND_TENSORS)
        if entry.target is not None:
            target = self._decode_entry(entry.target) if entry.target in self._tensors else None
            if type(target) is not dict or target.get("action") == "alias":
                fail((where, ".target"), f"{entry.target!r} is not a tensor of its own")
            if [target.get("dtype"), target.get("shape")] != [entry.dtype, list(entry.shape)]:
                fail((where, ".target"), f"{entry.target!r} has another dtype or shape")
        return entry

    def _decode_entry(self, name: str) -> Any:
        data = self._tensors[name]
        if type(data) is not bytes:
            fail(f'tensors["{name}"]', "expected a byte string that holds an entry")
        return canonical.decode(data, f'tensors["{name}"]')

    def _check_ref(self, ref: BufferRef, where: Where, kind: int) -> None:
        if ref.section >= len(self.sections):
            fail(where, f"section {ref.section} is not one of the {len(self.sections)} sections")
        section = self.sections[ref.section]
        if section.kind != kind:
            fail(where, f"section {ref.section} is of another kind")
        if ref.offset + ref.length > section.raw_length:
            fail(where, f"{ref.length} bytes at {ref.offset} leave section {ref.section}")

    def buffer(self, ref: BufferRef) -> memoryview:
        """Return a buffer's raw bytes, read-only: a view where the section is stored and the file is mapped.

        Raises:
            InvalidFileError: the section does not match its checksum, or cannot be decoded.
        """
        section = self.sections[ref.section]
        self.touch(ref.section)
        if section.codec == c.CODEC_STORED:
            return self._read(section.offset + ref.offset, ref.length)
        with self._lock:
            reader = self._chunks.get(ref.section)
            if reader is None:
                reader = self._chunk_reader(ref.section, self._read(section.offset, section.length))
                self._chunks = {ref.section: reader}  # one at a time: a stream's stored bytes are in memory
            return memoryview(reader.read(ref.offset, ref.length)).toreadonly()

    def _chunk_reader(self, number: int, stored: memoryview) -> ChunkReader:
        # Only here, because zstandard takes a while to import and a hot file's tensors do not need it.
        from deltafmt.container import chunks

        return chunks.ChunkReader(stored, self.sections[number].raw_length, f"{self.name}: section {number}")

    def chunk_reader(self, number: int, *, verify: bool) -> ChunkReader:
        """Read a compressed section's stored bytes, and return a decoder of its chunks.

        Raises:
            StorageError: reading failed.
            InvalidFileError: the section is damaged.
        """
        section = self.sections[number]
        padding = -section.length % c.SECTION_ALIGNMENT
        stored = memoryview(bytearray(section.length + padding))
        self.read_into(section.offset, stored)
        if verify:
            found = xxhash.xxh3_128_digest(stored[: section.length])
            self.check_section(number, found, stored[section.length :])
        return self._chunk_reader(number, stored[: section.length])

    def release(self, entry: TensorEntry) -> None:
        """Take note that a tensor's buffers have been used; views of them stay valid."""
        for _, ref in entry.refs():
            section = self.sections[ref.section]
            if section.codec == c.CODEC_STORED:
                self._source.release(section.offset + ref.offset, ref.length)

    def touch(self, number: int, *, force: bool = False) -> None:
        """Check a section's checksum and the padding behind it, once (``force``: now, whatever was asked for)."""
        if not force and (not self._verify or number in self._touched):
            return
        section = self.sections[number]
        end = section.offset + section.length
        self.check_section(number, self._section_checksum(section), self._read(end, -end % c.SECTION_ALIGNMENT))
        self._touched.add(number)

    def check_section(self, number: int, found: bytes, padding: bytes | memoryview) -> None:
        """Compare a section with what has been read of it elsewhere (spec section 5.3).

        Args:
            number: of the section.
            found: the XXH3-128 of the stored bytes that were read.
            padding: the bytes behind the section, up to the next multiple of 4096.

        Raises:
            InvalidFileError: they do not fit the index.
        """
        self.check_checksum(number, found)
        self.check_padding(number, padding)

    def check_checksum(self, number: int, found: bytes) -> None:
        """Compare the XXH3-128 of a section's stored bytes with the index; see :meth:`check_section`."""
        section = self.sections[number]
        if found != section.checksum:
            raise InvalidFileError(
                f"{self.name}: section {number} at {section.offset} is damaged: "
                f"its checksum is {section.checksum.hex()}, its bytes give {found.hex()}"
            )

    def check_padding(self, number: int, padding: bytes | memoryview) -> None:
        """Compare the bytes behind a section with zeros; see :meth:`check_section`."""
        if bytes(padding) != bytes(len(padding)):
            raise InvalidFileError(f"{self.name}: the padding after section {number} is not zero")

    def fileno(self) -> int | None:
        """Return the descriptor of the open file, or None if it is mapped or a file object."""
        return self._source.fileno()

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with bytes of the file, unchecked; several threads may do so at the same time.

        Raises:
            StorageError: reading failed.
            InvalidFileError: the file has become shorter.
        """
        try:
            self._source.read_into(offset, target)
        except InvalidFileError as error:
            raise InvalidFileError(f"{self.name}: {error}") from error

    def _read(self, offset: int, length: int) -> memoryview:
        try:
            return self._source.read(offset, length)
        except InvalidFileError as error:
            raise InvalidFileError(f"{self.name}: {error}") from error

    def _section_checksum(self, section: Section) -> bytes:
        hasher = xxhash.xxh3_128()
        step = 16 * 1024 * 1024
        for offset in range(section.offset, section.offset + section.length, step):
            length = min(step, section.offset + section.length - offset)
            hasher.update(self._read(offset, length))
            self._source.release(offset, length)
        return hasher.digest()

    def _check_zeros(self, start: int, stop: int, place: str) -> None:
        if bytes(self._source.read(start, stop - start)) != bytes(stop - start):
            raise InvalidFileError(f"the padding {place} is not zero")

    def close(self) -> None:
        """Close the file. Views that are still in use keep their mapping alive."""
        self._chunks.clear()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
