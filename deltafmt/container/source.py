"""Where a reader's bytes come from: a memory map, or plain positioned reads."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from typing import BinaryIO, Protocol

from deltafmt.errors import InvalidFileError, StorageError
from deltafmt.output import storage_error


class Source(Protocol):
    """Random access to the bytes of one file."""

    size: int
    name: str

    def read(self, offset: int, length: int) -> memoryview:
        """Return exactly ``length`` bytes, read-only; the caller has checked the range against ``size``."""

    def release(self, offset: int, length: int) -> None:
        """Take note that a range has been used and is not needed in memory."""

    def close(self) -> None:
        """Give the file back."""


class MapSource:
    """A memory-mapped file: reads are views of the page cache."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
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
        return self._view[offset : offset + length]

    def release(self, offset: int, length: int) -> None:
        """Unmap whole pages of a range from this process; they stay in the page cache, and views stay valid."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError, ValueError):
                self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view that is still in use."""
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass  # a view handed out is still alive; the map goes with it


class StreamSource:
    """An open binary file, local or not: reads are copies. Needs ``seek`` and ``read``."""

    def __init__(self, file: BinaryIO, name: str = "<stream>", *, owned: bool = False) -> None:
        self.name = name
        self._file = file
        self._owned = owned
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

    def release(self, offset: int, length: int) -> None:
        """Do nothing: reads are copies."""

    def close(self) -> None:
        """Close the file if it was opened here."""
        if self._owned:
            self._file.close()


def open_source(path: str | os.PathLike[str] | BinaryIO, *, mmap: bool = True) -> Source:
    """Open a path as a map or a stream, or wrap a binary file object.

    Raises:
        StorageError: the file cannot be opened.
        InvalidFileError: the file is empty.
    """
    if isinstance(path, str | os.PathLike) and os.path.isdir(path):
        raise StorageError(f"{os.fspath(path)} is a folder, not a delta file")
    if not isinstance(path, str | os.PathLike):
        return StreamSource(path, str(getattr(path, "name", "<stream>")))
    if mmap:
        return MapSource(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by StreamSource.close
    except OSError as error:
        raise storage_error("cannot open", os.fspath(path), error) from error
    try:
        return StreamSource(file, os.fspath(path), owned=True)
    except BaseException:
        file.close()
        raise
