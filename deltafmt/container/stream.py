"""Writing to a file object that the caller owns: a pipe, an upload, a buffer in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

from deltafmt.errors import StorageError
from deltafmt.index.sections import Section
from deltafmt.output import Bytes, storage_error
from deltafmt.terms.layout import TermLayout


class StreamFile:
    """The sink of a write to a file object that the caller owns: neither atomic nor resumable."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sections: list[Section] = []
        self.layouts: list[TermLayout] = []
        self.entries: dict[str, Any] = {}

    def write(self, data: Bytes) -> None:
        """Write all bytes.

        Raises:
            StorageError: writing failed, or the file object takes no more.
        """
        view = memoryview(data)
        try:
            while view:
                written = cast("int | None", self._file.write(view))
                if written is None and not isinstance(self._file, io.RawIOBase):
                    break  # some file objects return None although they took all bytes
                if not written:  # a raw file that would block returns None
                    raise StorageError("cannot write the output: it takes no more")
                view = view[written:]  # a raw file may take fewer bytes than it is given
        except StorageError:
            raise
        except OSError as error:
            raise storage_error("cannot write", "the output", error) from error

    def record(self, sections: Sequence[Section], layouts: list[TermLayout], entries: dict[str, Any]) -> None:
        """Do nothing: a write to a stream cannot be resumed."""

    def commit(self) -> None:
        """Flush the file.

        Raises:
            StorageError: the file's buffered bytes cannot be written.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise storage_error("cannot write", "the output", error) from error

    def keep(self) -> bool:
        """Leave the written bytes, which belong to the caller; return False, for nothing can be resumed."""
        return False

    def abandon(self) -> None:
        """Leave the written bytes, which belong to the caller."""
