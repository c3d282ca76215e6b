"""Messages and replies through a pipe, a socket or a file: each has its length in front."""

from __future__ import annotations

import io
import struct
from typing import Protocol

from deltafmt.errors import InvalidFileError, StorageError
from deltafmt.output import Bytes, storage_error

_LENGTH = struct.Struct("<Q")

# What is read at a time, so that a length decides no allocation.
_PIECE = 1 << 24


class Readable(Protocol):
    """A binary file object, such as that of ``socket.makefile("rb")``."""

    def read(self, size: int, /) -> bytes | str | None:
        """Return up to so many bytes, none at the end; text is refused."""


class Writable(Protocol):
    """A binary file object, such as that of ``socket.makefile("wb")``."""

    def write(self, data: Bytes, /) -> object:
        """Take bytes, and return how many; all of them if it returns nothing."""

    def flush(self) -> None:
        """Send what is buffered."""


def write_message(file: Writable, data: Bytes) -> None:
    """Write a message, or a reply, with its length in front.

    Args:
        file: a binary file object that blocks. One without a buffer may take a part of the bytes at a time.
        data: the bytes, such as ``message.data`` or ``reply.to_bytes()``.

    Raises:
        StorageError: writing failed.
    """
    try:
        _write(file, _LENGTH.pack(memoryview(data).nbytes))
        _write(file, data)
        file.flush()
    except (OSError, ValueError) as error:
        raise storage_error("cannot write", "a message", error) from error


def read_message(file: Readable, max_bytes: int | None = None) -> bytes | None:
    """Read what :func:`write_message` wrote; None where the file ends.

    Args:
        file: a binary file object.
        max_bytes: refuse a longer message.

    Raises:
        InvalidFileError: the file ends inside of a message, or the message is longer than ``max_bytes``.
        StorageError: reading failed.
    """
    head = _read(file, _LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise InvalidFileError("the stream ends inside of a message")
    (length,) = _LENGTH.unpack(head)
    if max_bytes is not None and length > max_bytes:
        raise InvalidFileError(f"a message of {length:,} bytes is longer than {max_bytes:,}, which is max_bytes")
    data = _read(file, length)
    if len(data) < length:
        raise InvalidFileError(f"the stream ends inside of a message, {length - len(data):,} bytes early")
    return data


def _write(file: Writable, data: Bytes) -> None:
    view = memoryview(data).cast("B")
    while view.nbytes:
        taken = file.write(view)
        if taken is None and not isinstance(file, io.RawIOBase):
            return
        if not isinstance(taken, int) or taken < 1:
            raise OSError("the stream takes nothing, as one that does not block")
        view = view[taken:]


def _read(file: Readable, length: int) -> bytes:
    parts: list[bytes] = []
    missing = length
    while missing:
        try:
            part = file.read(min(missing, _PIECE))
        except (OSError, ValueError) as error:
            raise storage_error("cannot read", "a message", error) from error
        if part is None:
            raise StorageError("cannot read a message: the stream does not block")
        if isinstance(part, str):
            raise StorageError("cannot read a message: the stream gives text, and not bytes")
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
