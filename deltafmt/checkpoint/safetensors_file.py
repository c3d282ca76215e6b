"""Reading a ``.safetensors`` file: it is mapped, its header is checked, and its tensors are views of raw bytes."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.file_kinds import HEAD_BYTES, instead_of_weights
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.errors import InvalidFileError, StorageError
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart
from deltafmt.output import storage_error
from deltafmt.regular_file import open_regular
from deltafmt.terms.floats import RAW_DTYPES

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_POPULATE_READ = 22  # Linux MADV_POPULATE_READ, which the mmap module does not name
_WILL_NEED = getattr(mmap, "MADV_WILLNEED", -1)
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", -1)
STEP = 8 * 1024 * 1024  # bytes that are read at once
# Tensors of so few bytes are read without a word to the system: the calls would take longer than the page faults.
_SMALL = 64 * 1024


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, on disk.

    Attributes:
        name, dtype, shape: the tensor's name, dtype (by its safetensors name) and shape, as the file's header says.
        file: the file that holds the tensor.
        offset: the place of the tensor's first byte in the file.
        nbytes: bytes of the tensor.
        leading: the number of leading dimensions whose product is the number of rows; all but the last if None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SafetensorsFile
    offset: int
    nbytes: int
    leading: int | None = None

    @property
    def rows(self) -> int:
        """Rows: the product of the leading dimensions."""
        return c.row_count(self.shape, self.leading)

    @property
    def columns(self) -> int:
        """Columns: the product of the other dimensions."""
        return c.column_count(self.shape, self.leading)

    def as_matrix(self, leading: int | None) -> Tensor:
        """Return the same tensor with the rows of so many leading dimensions."""
        return self if leading == self.leading else replace(self, leading=leading)

    def parts(self) -> tuple[BasePart, ...]:
        """Return the tensors of the checkpoint whose elements follow each other in this one: itself."""
        return (BasePart(self.name, 0, c.element_count(self.shape)),)

    def will_need(self) -> None:
        """Ask the system to read the tensor ahead. An error is ignored."""
        self.file.will_need(self.offset, self.nbytes)

    def forget(self) -> None:
        """Give back the memory of what was computed for this tensor; of one that lies in its file, that is nothing."""

    @contextlib.contextmanager
    def pages(self, start: int, length: int) -> Iterator[memoryview]:
        """Give a view of some bytes. At the end their pages leave this process's memory, but not the page cache."""
        first = self.offset + start
        self.file.check_length(first + length)
        self.file.populate(first, length)
        try:
            yield self.file.view[first : first + length]
        finally:
            self.file.release(first, length)

    @contextlib.contextmanager
    def row_range(self, start: int, stop: int) -> Iterator[NDArray[np.unsignedinteger]]:
        """Give rows ``start`` to ``stop`` as a raw array (uint16 or uint32), shape (rows, columns).

        The tensor must have a dtype that deltas are defined for.
        """
        raw = RAW_DTYPES[self.dtype]
        width = self.columns * raw.itemsize
        with self.pages(start * width, (stop - start) * width) as view:
            array = np.frombuffer(view, raw).reshape(stop - start, self.columns)
            if not array.flags.aligned:
                array = array.copy()
            yield array

    def head(self, length: int) -> bytes:
        """Return the first bytes of the tensor, at most so many."""
        end = self.offset + min(length, self.nbytes)
        self.file.check_length(end)
        return bytes(self.file.view[self.offset : end])

    def pieces(self, first: int = 0) -> Iterator[memoryview]:
        """Iterate over the tensor's bytes from ``first`` on, 8 MiB at a time."""
        size = self.nbytes
        if size <= _SMALL:
            if first < size:
                self.file.check_length(self.offset + size)
                yield self.file.view[self.offset + first : self.offset + size]
                self.file.release(self.offset, size)
            return
        for start in range(first, self.nbytes, STEP):
            with self.pages(start, min(STEP, self.nbytes - start)) as view:
                yield view

    def fingerprint(self) -> bytes:
        """Return the BLAKE3 of dtype, shape and bytes."""
        digest = hasher(self.dtype, self.shape)
        for piece in self.pieces():
            digest.update(piece)
        return digest.digest()

    def equals(self, other: Tensor) -> bool:
        """Tell whether dtype, shape and bytes are the same."""
        if self is other:
            return True
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        size = self.nbytes
        if size <= _SMALL:
            same = self.head(size) == other.head(size)
            self.file.release(self.offset, size)
            other.file.release(other.offset, size)
            return same
        step = 65536  # tensors that differ do so early; those that do not are read in growing steps
        start = 0
        while start < size:
            length = min(step, size - start)
            with self.pages(start, length) as a, other.pages(start, length) as b:
                equal = np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
            if not equal:
                return False
            start += length
            step = min(step * 2, STEP)
        return True


@dataclass(frozen=True, slots=True)
class PagedTensor(Tensor):
    """A tensor that does not lie in its file as it is: it is read through ``pages`` alone."""

    def head(self, length: int) -> bytes:
        """Return the first bytes of the tensor, at most so many."""
        with self.pages(0, min(length, self.nbytes)) as view:
            return bytes(view)

    def pieces(self, first: int = 0) -> Iterator[memoryview]:
        """Iterate over the tensor's bytes from ``first`` on, 8 MiB at a time."""
        for start in range(first, self.nbytes, STEP):
            with self.pages(start, min(STEP, self.nbytes - start)) as view:
                yield view


class SafetensorsFile:
    """An open, memory-mapped ``.safetensors`` file.

    Attributes:
        spare: the number of bytes that belong to no tensor; safetensors itself opens no file that has some.

    Raises:
        StorageError: it cannot be read.
        InvalidFileError: its header is wrong; every tensor is checked to lie within the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.stat = os.fstat(file.fileno())
                self.size = self.stat.st_size
                if self.size < 8:
                    known = instead_of_weights(file.read(8))
                    raise InvalidFileError(
                        f"{path}: {known or f'{self.size} bytes are too few for a safetensors file'}"
                    )
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except InvalidFileError:
            raise
        except OSError as error:
            raise storage_error("cannot read", path, error) from error
        self.view = memoryview(self._map)
        self._small = 0  # about how many bytes of small tensors are mapped
        self.metadata: dict[str, str] = {}
        self.tensors = {tensor.name: tensor for tensor in self._parse()}
        end = 0
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset < end:
                raise InvalidFileError(f'{path}: tensor "{tensor.name}" overlaps another')
            end = tensor.offset + tensor.nbytes
        start = 8 + struct.unpack("<Q", self.view[:8])[0]
        self.spare = self.size - start - sum(tensor.nbytes for tensor in self.tensors.values())

    def _parse(self) -> Iterator[Tensor]:
        if bytes(self.view[: len(c.HEADER_MAGIC)]) == c.HEADER_MAGIC:
            raise InvalidFileError(f"{self.path} is a delta file, not a checkpoint")
        (length,) = struct.unpack("<Q", self.view[:8])
        if length > min(MAX_HEADER_BYTES, self.size - 8):
            known = instead_of_weights(bytes(self.view[:HEAD_BYTES]))
            if not known and bytes(self.view[8:9]) == b"{":
                known = f"its header of {length:,} bytes is longer than the file: the download is incomplete"
            raise InvalidFileError(
                f"{self.path}: {known or f'a header of {length} bytes does not fit: not a safetensors file'}"
            )
        try:
            header = json.loads(bytes(self.view[8 : 8 + length]), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise InvalidFileError(f"{self.path}: the header is not valid: {error}") from error
        if type(header) is not dict:
            raise InvalidFileError(f"{self.path}: the header is not a map")
        metadata = header.pop("__metadata__", {})
        if type(metadata) is dict:
            self.metadata = {str(key): str(value) for key, value in metadata.items()}
        for name, info in header.items():
            yield self._tensor(name, info, 8 + length)

    def _tensor(self, name: str, info: Any, start: int) -> Tensor:
        if not _is_name(name):
            raise InvalidFileError(f"{self._where(name)}: a name is Unicode of 1 to {c.MAX_NAME_BYTES} bytes")
        if name.rpartition("/")[2] == "__metadata__":
            raise InvalidFileError(f"{self._where(name)}: a delta file has no tensor of this name")
        try:
            dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidFileError(f"{self._where(name)}: no valid dtype, shape and data_offsets") from error
        if type(dtype) is not str or dtype not in c.DTYPE_BITS:
            raise InvalidFileError(f"{self._where(name)}: unknown dtype {dtype!r}")
        if len(shape) > c.MAX_RANK or not all(type(size) is int and size >= 0 for size in shape):
            raise InvalidFileError(f"{self._where(name)}: {list(shape)} is not a shape of at most {c.MAX_RANK} sizes")
        if not c.is_bounded(shape):
            raise InvalidFileError(f"{self._where(name)}: {list(shape)} has more than {c.MAX_ELEMENTS} elements")
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= self.size - start:
            raise InvalidFileError(
                f"{self._where(name)}: bytes {begin} to {end} lie outside the file: it may be truncated"
            )
        if not c.is_whole(dtype, shape):
            raise InvalidFileError(f"{self._where(name)}: {dtype} {list(shape)} does not take whole bytes")
        needed = c.byte_count(dtype, shape)
        if end - begin != needed:
            raise InvalidFileError(
                f"{self._where(name)}: {end - begin} bytes where {dtype} {list(shape)} needs {needed}"
            )
        return Tensor(name, dtype, shape, self, start + begin, needed)

    def _where(self, name: str) -> str:
        return f'{self.path}: tensor "{name}"'

    def check_length(self, end: int) -> None:
        """Check that the file still has so many bytes: pages behind its end would end the process.

        Raises:
            StorageError: the file became shorter.
        """
        if self._map.size() < end:
            raise StorageError(f"{self.path} became shorter while it was being read")

    def populate(self, offset: int, length: int) -> None:
        """Bring pages into memory with one call, not with a page fault each. An error is ignored."""
        if length > _SMALL:
            self._advise(_POPULATE_READ, offset, length)

    def will_need(self, offset: int, length: int) -> None:
        """Ask the system to read ahead. An error is ignored."""
        if length > _SMALL:
            self._advise(_WILL_NEED, offset, length)

    def release(self, offset: int, length: int) -> None:
        """Unmap pages from this process; they stay in the page cache.

        The pages of small tensors are unmapped together, once there are some megabytes of them.
        """
        if length > _SMALL:
            self._advise(_DONT_NEED, offset, length)
            return
        self._small += length + mmap.PAGESIZE
        if self._small > STEP:
            self._small = 0
            self._advise(_DONT_NEED, 0, self.size)

    def _advise(self, advice: int, offset: int, length: int) -> None:
        start = offset - offset % mmap.PAGESIZE
        if length and advice >= 0:
            with contextlib.suppress(OSError, ValueError):
                self._map.madvise(advice, start, offset + length - start)

    def close(self) -> None:
        """Unmap the file; if views are still in use, the file is unmapped when the last one goes."""
        self.tensors.clear()
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()

    def check_unchanged(self) -> None:
        """Check that the file at the path is still the one that was opened, and was not written to since.

        Raises:
            StorageError: the file is gone or has changed.
        """
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise StorageError(f"{self.path} went away while it was being read") from error
        then = self.stat
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (then.st_ino, then.st_size, then.st_mtime_ns):
            raise StorageError(f"{self.path} changed while it was being read")

    def identity(self) -> tuple[str, int, int]:
        """Return path, size and modification time: equal as long as the file is the same."""
        return str(self.path.resolve()), self.size, self.stat.st_mtime_ns


def _is_name(name: str) -> bool:
    try:
        return 1 <= len(name.encode("utf-8")) <= c.MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a map of a header, for :func:`json.loads`.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
