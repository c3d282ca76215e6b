"""Sources of a reader's bytes: a memory map, positioned reads of an open file, or a file object."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from typing import BinaryIO, Protocol

from deltafmt.errors import InvalidFileError, StorageError
from deltafmt.format import constants as c
from deltafmt.output import storage_error
from deltafmt.regular_file import open_regular


class Source(Protocol):
    """Random access to the bytes of one file."""

    size: int
    name: str
    tail: int  # bytes of the end that are worth one read: more than a trailer where each read is a request

    def read(self, offset: int, length: int) -> memoryview:
        """Return exactly ``length`` bytes, read-only; the caller has checked the range against ``size``."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on; several threads may call this at the same time."""

    def fileno(self) -> int | None:
        """Return the file's descriptor for positioned reads, or None if the source has none."""

    def release(self, offset: int, length: int) -> None:
        """Tell the source that a range has been used and need not stay in memory."""

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened, as far as the system tells.

        A path that stands for another file by now does no harm: the source keeps the one that was opened.
        """

    def close(self) -> None:
        """Close what the source has opened."""


class MapSource:
    """A memory-mapped file: reads are views of the page cache."""

    tail = c.TRAILER_SIZE

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            with open_regular(path) as file:
                self._stat = os.fstat(file.fileno())
                self.size = self._stat.st_size
                if self.size == 0:
                    raise InvalidFileError("the file is empty")
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except InvalidFileError:
            raise
        except OSError as error:
            raise storage_error("cannot open", self.name, error) from error
        self._view = memoryview(self._map)

    def read(self, offset: int, length: int) -> memoryview:
        """Return a view; no byte is copied."""
        self._check(offset + length)
        return self._view[offset : offset + length]

    def _check(self, end: int) -> None:
        """Refuse to touch pages behind the end of a file that became shorter: the system would end the process."""
        now = self._map.size()
        if now < min(end, self.size):
            raise InvalidFileError(f"the file ends {end - now} bytes early, at {now}: it became shorter")

    def read_into(self, offset: int, target: memoryview) -> None:
        """Copy bytes out of the map."""
        self._check(offset + len(target))
        target[:] = self._view[offset : offset + len(target)]

    def fileno(self) -> None:
        """Return None: a mapped file needs no reads."""

    def release(self, offset: int, length: int) -> None:
        """Unmap the whole pages of a range from this process; they stay in the page cache, and views stay valid."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError, ValueError):
                self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def check_unchanged(self) -> None:
        """Compare what the system says of the file now and then; one without its old name cannot be asked for."""
        try:
            now = os.stat(self.name)
        except OSError:
            return
        if os.path.samestat(now, self._stat):
            _compare(self.name, self._stat, now)

    def close(self) -> None:
        """Unmap the file; if views are still in use, the file is unmapped when the last one goes."""
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass  # a caller still holds a view; the map is closed with the last one


class FileSource:
    """An open file of a file system: each read makes a copy, and several threads may read at the same time."""

    tail = c.TRAILER_SIZE

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            self._file = open_regular(path, buffering=0)
        except OSError as error:
            raise storage_error("cannot open", self.name, error) from error
        try:
            self._stat = os.fstat(self._file.fileno())
            self.size = self._file.seek(0, os.SEEK_END)
            if self.size == 0:
                raise InvalidFileError("the file is empty")
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise storage_error("cannot seek in", self.name, error) from error
            raise

    def read(self, offset: int, length: int) -> memoryview:
        """Read and return a copy."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return memoryview(data).toreadonly()

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read at a position, without a lock."""
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
                if count == 0:
                    raise InvalidFileError(f"the file ends {len(target) - done} bytes early, at {offset + done}")
                done += count
        except (OSError, ValueError) as error:
            if isinstance(error, InvalidFileError):
                raise
            raise storage_error("cannot read", self.name, error) from error

    def fileno(self) -> int:
        """Return the open file's descriptor."""
        return self._file.fileno()

    def release(self, offset: int, length: int) -> None:
        """Do nothing: reads are copies."""

    def check_unchanged(self) -> None:
        """Compare what the system says of the file now and then."""
        _compare(self.name, self._stat, os.fstat(self._file.fileno()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StreamSource:
    """A binary file object with ``seek`` and ``read``, local or remote: each read makes a copy."""

    tail = c.TAIL_BYTES

    def __init__(self, file: BinaryIO, name: str = "<stream>") -> None:
        self.name = name
        self._file = file
        self._lock = threading.Lock()
        try:
            self.size = file.seek(0, os.SEEK_END)
        except (OSError, ValueError) as error:
            raise storage_error("cannot seek in", name, error) from error
        if self.size == 0:
            raise InvalidFileError("the file is empty")

    def read(self, offset: int, length: int) -> memoryview:
        """Read and return a copy."""
        parts = []
        missing = length
        try:
            with self._lock:
                self._file.seek(offset)
                while missing:
                    part = self._file.read(missing)
                    if not part:
                        break
                    parts.append(part)
                    missing -= len(part)
        except (OSError, ValueError) as error:
            raise storage_error("cannot read", self.name, error) from error
        if missing:
            raise InvalidFileError(f"the file ends {missing} bytes early, at {offset + length - missing}")
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts)).toreadonly()

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read at a position; one thread reads at a time."""
        target[:] = self.read(offset, len(target))

    def fileno(self) -> None:
        """Return None: a file object need not have a descriptor."""

    def release(self, offset: int, length: int) -> None:
        """Do nothing: reads are copies."""

    def check_unchanged(self) -> None:
        """Do nothing: a file object need not tell."""

    def close(self) -> None:
        """Leave the file open: the caller opened it."""


def _compare(name: str, then: os.stat_result, now: os.stat_result) -> None:
    """Refuse a file that was written to.

    Raises:
        StorageError: names the file.
    """
    if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
        raise StorageError(f"{name} changed while it was being read")


def open_source(path: str | os.PathLike[str] | BinaryIO, *, mmap: bool = True) -> Source:
    """Return a source for a path (mapped, or read at positions) or for a binary file object.

    Raises:
        StorageError: the file cannot be opened.
        InvalidFileError: the file is empty, or a folder.
    """
    if isinstance(path, str | os.PathLike) and os.path.isdir(path):
        raise InvalidFileError("it is a folder, not a delta file")
    if not isinstance(path, str | os.PathLike):
        return StreamSource(path, str(getattr(path, "name", "<stream>")))
    return MapSource(path) if mmap else FileSource(path)
