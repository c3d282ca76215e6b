"""Reading a container (spec, sections 3 to 9).

Opening a file reads and checks its header, trailer and index. A section is read and checked when it is first touched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import xxhash

from deltafmt.container import canonical, frame
from deltafmt.container.file_index import FileIndex
from deltafmt.container.source import Source, open_source
from deltafmt.errors import DeltafmtError, InvalidFileError
from deltafmt.format import constants as c
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.scaled import ScaledRef
from deltafmt.index.sections import Attachment, BufferRef, Section
from deltafmt.terms.layout import TermLayout

if TYPE_CHECKING:
    from deltafmt.container.chunks import ChunkReader

# Bytes of a piece of a buffer: whole chunks of a compressed section.
_PIECE = 16 * c.ZSTD_CHUNK


class Container:
    """An open ``.deltafmt`` file.

    Args:
        path: a path, or a binary file object with ``seek`` and ``read``.
        mmap: map the file; if False, read it.
        verify: check a section's checksum when it is first touched.
        limits: how much memory and output the file may ask for; :class:`deltafmt.Limits` has the defaults.
        earlier: an earlier opening of the same file, which may be closed. Its decoded index is used if the seal, which
            is a digest of header, index and trailer, and the limits are still the same.

    Raises:
        StorageError: the file cannot be read.
        InvalidFileError: the file breaks the format; the message names the place.
        UnsupportedError: the file needs a newer reader.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        mmap: bool = True,
        verify: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        earlier: Container | None = None,
    ) -> None:
        try:
            self._source: Source = open_source(path, mmap=mmap)
        except InvalidFileError as error:
            raise error.located(getattr(path, "name", path)) from error
        self.name = self._source.name
        self.limits = limits
        self._verify = verify
        self._touched: set[int] = set()
        self._chunks: dict[int, ChunkReader] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._scaled: dict[str, ScaledRef] | None = None
        self._lock = threading.RLock()
        try:
            self._open(earlier)
        except DeltafmtError as error:
            self._source.close()
            raise error.located(self.name) from error

    def _open(self, earlier: Container | None) -> None:
        source = self._source
        # Two reads, of the beginning and of the end, are enough for most files; a remote file gives each in a request.
        head = source.read(0, min(c.SECTION_ALIGNMENT, source.size))
        header = bytes(head[: c.HEADER_SIZE])
        self.features = frame.check_header(header)
        self.header = header
        if source.size < c.SECTION_ALIGNMENT + c.TRAILER_SIZE:
            raise InvalidFileError(f"the file ends too early, after {source.size} bytes")
        length = min(source.tail, source.size)
        tail = source.read(source.size - length, length)
        trailer_bytes = bytes(tail[-c.TRAILER_SIZE :])
        trailer = frame.decode_trailer(trailer_bytes, source.size)
        behind = trailer.index_length + c.TRAILER_SIZE
        if behind <= len(tail):
            index = bytes(tail[len(tail) - behind : len(tail) - c.TRAILER_SIZE])
        else:
            index = bytes(source.read(trailer.index_offset, trailer.index_length))
        frame.check_seal(header, index, trailer_bytes, trailer)
        self.size = source.size
        self.index_offset = trailer.index_offset
        self.index_length = trailer.index_length
        self.content_id = trailer.content_id
        self.seal = trailer.digest
        if bytes(head[c.HEADER_SIZE :]) != bytes(len(head) - c.HEADER_SIZE):
            raise InvalidFileError("the padding after the header is not zero")
        if earlier is None or not self._adopt(earlier):
            self._index = FileIndex.parse(index, trailer.index_offset, self.features, self.limits.max_memory)
        raw_bytes = sum(section.raw_length for section in self.sections)
        if raw_bytes > source.size or self.limits.max_output is not None:
            self.limits.check_output(raw_bytes, source.size, 0, "the sections decode to")

    def _adopt(self, earlier: Container) -> bool:
        """Use the index of an earlier opening, if it is still the same and its limits were the same."""
        if earlier.seal != self.seal or earlier.limits != self.limits:
            return False
        self._index, self._entries = earlier._index, earlier._entries
        return True

    @property
    def profile(self) -> str:
        """The file's profile, ``hot`` or ``cold``."""
        return self._index.profile

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata: strings by name."""
        return self._index.metadata

    @property
    def layouts(self) -> tuple[TermLayout, ...]:
        """The file's layout table."""
        return self._index.layouts

    @property
    def sections(self) -> tuple[Section, ...]:
        """The file's sections, in the order of their offsets."""
        return self._index.sections

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of the tensors that the base has and the fine-tune lacks, sorted."""
        return self._index.removed

    @property
    def attachments(self) -> Mapping[str, Attachment]:
        """The attached files by name."""
        return self._index.attachments

    @property
    def files(self) -> Mapping[str, FileRef]:
        """The files that are restored byte for byte, by name; empty for most delta files."""
        return self._index.files

    @property
    def parent(self) -> bytes | None:
        """The content id of the delta file whose result is this file's base; None for most delta files."""
        return self._index.parent

    @property
    def served(self) -> int | None:
        """The number of the section that ends the served part of a progressive file; None in other files."""
        return self._index.served

    def index_obj(self) -> Any:
        """Return the index as the file has it, decoded; entries and descriptions are byte strings."""
        return canonical.decode(bytes(self._read(self.index_offset, self.index_length)), "the index")

    def section_bytes(self, number: int) -> bytes:
        """Return the stored bytes of a section, after checking them.

        Raises:
            InvalidFileError: the section is damaged.
        """
        self.touch(number)
        section = self.sections[number]
        return bytes(self._read(section.offset, section.length))

    def scaled(self) -> dict[str, ScaledRef]:
        """Return how the base keeps the tensors that are read as values, by name; empty for most files.

        Raises:
            InvalidFileError: a description breaks the format.
        """
        if self._scaled is None:
            try:
                self._scaled = {name: self._index.scaled_ref(name) for name in self._index.scaled}
            except InvalidFileError as error:
                raise InvalidFileError(f"{self.name}: {error}") from error
        return self._scaled

    def scaled_key(self) -> dict[str, ScaledRef] | None:
        """Return the same, or None if the index has no such key, which the content id tells from an empty map.

        Raises:
            InvalidFileError: a description breaks the format.
        """
        return self.scaled() if self._index.has_scaled else None

    def keys(self) -> list[str]:
        """Return the tensor names, sorted."""
        return list(self._index.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors

    def entry(self, name: str) -> TensorEntry:
        """Return the checked entry of a tensor.

        Raises:
            KeyError: the file has no such tensor.
            InvalidFileError: the entry breaks the format.
        """
        found = self._entries.get(name)
        if found is None:
            try:
                found = self._index.entry(name)
            except InvalidFileError as error:
                raise InvalidFileError(f"{self.name}: {error}") from error
            self._entries[name] = found
        return found

    def entries(self) -> Iterator[TensorEntry]:
        """Iterate over all entries, in the order of their names."""
        return (self.entry(name) for name in self._index.tensors)

    def buffer(self, ref: BufferRef) -> memoryview:
        """Return a buffer's raw bytes, read-only: a view where the section is stored and the file is mapped.

        Raises:
            InvalidFileError: the section does not match its checksum, or cannot be decoded.
        """
        section = self.sections[ref.section]
        self.touch(ref.section)
        if section.codec == c.CODEC_STORED:
            return self._read(section.offset + ref.offset, ref.length)
        self.limits.check_memory(ref.length, self.size, f"{self.name}: a buffer of section {ref.section} takes")
        with self._lock:
            return memoryview(self._reader(ref.section).read(ref.offset, ref.length)).toreadonly()

    def pieces(self, ref: BufferRef) -> Iterator[memoryview]:
        """Give a buffer's raw bytes in pieces of at most 4 MiB, so that a compressed one is never in memory as a whole.

        Raises:
            InvalidFileError: the section does not match its checksum, or cannot be decoded.
        """
        section = self.sections[ref.section]
        self.touch(ref.section)
        for start in range(ref.offset, ref.offset + ref.length, _PIECE):
            length = min(_PIECE, ref.offset + ref.length - start)
            if section.codec == c.CODEC_STORED:
                yield self._read(section.offset + start, length)
            else:
                with self._lock:
                    piece = self._reader(ref.section).read(start, length)
                yield memoryview(piece).toreadonly()

    def _reader(self, number: int) -> ChunkReader:
        reader = self._chunks.get(number)
        if reader is None:
            section = self.sections[number]
            reader = self._chunk_reader(number, self._read(section.offset, section.length))
            self._chunks = {number: reader}  # one at a time: a stream's stored bytes are in memory
        return reader

    def _chunk_reader(self, number: int, stored: memoryview) -> ChunkReader:
        # zstandard takes a while to import, and the tensors of a hot file do not need it.
        from deltafmt.container import chunks

        return chunks.ChunkReader(stored, self.sections[number].raw_length, f"{self.name}: section {number}")

    def chunk_reader(self, number: int, *, verify: bool) -> ChunkReader:
        """Read the stored bytes of a compressed section and return a reader of its chunks.

        Args:
            number: the section's number.
            verify: check the section's checksum.

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
        """Give the memory of a tensor's buffers back to the system; views of them stay valid."""
        for _, ref in entry.refs():
            section = self.sections[ref.section]
            if section.codec == c.CODEC_STORED:
                self._source.release(section.offset + ref.offset, ref.length)

    def touch(self, number: int, *, force: bool = False) -> None:
        """Check a section's checksum and the padding behind it, the first time that the section is used.

        Args:
            number: the section's number.
            force: check the section now, even if it was checked before or the file is open without ``verify``.

        Raises:
            InvalidFileError: the section is damaged.
        """
        if not force and (not self._verify or number in self._touched):
            return
        section = self.sections[number]
        end = section.offset + section.length
        self.check_section(number, self._section_checksum(section), self._read(end, -end % c.SECTION_ALIGNMENT))
        self._touched.add(number)

    def check_section(self, number: int, found: bytes, padding: bytes | memoryview) -> None:
        """Check a section that the caller has read (spec section 5.3).

        Args:
            number: the section's number.
            found: the XXH3-128 of the stored bytes that were read.
            padding: the bytes behind the section, up to the next multiple of 4096.

        Raises:
            InvalidFileError: the checksum differs from the index, or the padding is not zero.
        """
        self.check_checksum(number, found)
        self.check_padding(number, padding)

    def check_checksum(self, number: int, found: bytes) -> None:
        """Check the XXH3-128 of a section's stored bytes against the index; see :meth:`check_section`."""
        section = self.sections[number]
        if found != section.checksum:
            raise InvalidFileError(
                f"{self.name}: section {number} at {section.offset} is damaged: "
                f"its checksum is {section.checksum.hex()}, its bytes give {found.hex()}"
            )

    def check_padding(self, number: int, padding: bytes | memoryview) -> None:
        """Check that the bytes behind a section are zero; see :meth:`check_section`."""
        if bytes(padding) != bytes(len(padding)):
            raise InvalidFileError(f"{self.name}: the padding after section {number} is not zero")

    def fileno(self) -> int | None:
        """Return the descriptor of the open file, or None if it is mapped or a file object."""
        return self._source.fileno()

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with bytes of the file, which are not checked; several threads may call this together.

        Raises:
            StorageError: reading failed.
            InvalidFileError: the file has become shorter since it was opened.
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

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened; a file object does not tell.

        Raises:
            StorageError: somebody has.
        """
        self._source.check_unchanged()

    def close(self) -> None:
        """Close the file; views that are still in use stay valid."""
        self._chunks.clear()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
