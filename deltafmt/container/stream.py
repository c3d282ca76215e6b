"""An output that the caller owns: a pipe, an upload, a buffer in memory."""

from __future__ import annotations

import io
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
        """Take bytes.

        Raises:
            StorageError: writing failed.
        """
        view = memoryview(data)
        try:
            while view:
                written = cast("int | None", self._file.write(view))
                if written is None and not isinstance(self._file, io.RawIOBase):
                    break  # some file objects say nothing, and take everything
                if not written:  # a raw file that would block says None
                    raise StorageError("cannot write the output: it takes no more")
                view = view[written:]  # a raw file may take less than it is given
        except StorageError:
            raise
        except OSError as error:
            raise storage_error("cannot write", "the output", error) from error

    def record(self, section: Section, layouts: list[TermLayout], entries: dict[str, Any]) -> None:
        """Note nothing: a stream cannot be taken up again."""

    def commit(self) -> None:
        """Flush the file.

        Raises:
            StorageError: what was still to be written cannot be.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise storage_error("cannot write", "the output", error) from error

    def keep(self) -> bool:
        """Leave what is written, which is the caller's; nothing can be resumed."""
        return False

    def abandon(self) -> None:
        """Leave what is written, which is the caller's."""
