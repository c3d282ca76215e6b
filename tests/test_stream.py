"""Writing to a file object of the caller's: every byte arrives, or an error says that it does not."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

import pytest

from deltafmt.container.stream import StreamFile
from deltafmt.errors import StorageError


class Answering(io.RawIOBase):
    """A raw file that takes some bytes a call, or says that it would block."""

    def __init__(self, answer: int | None) -> None:
        self.answer = answer
        self.taken = bytearray()

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, data: Any, /) -> Any:
        """Take as much as the answer says."""
        if self.answer is not None:
            self.taken += bytes(data)[: self.answer]
        return self.answer if self.answer is None else min(self.answer, len(data))


class Silent:
    """No raw file: it takes everything and says nothing."""

    def __init__(self) -> None:
        self.taken = bytearray()

    def write(self, data: Any) -> None:
        """Take everything."""
        self.taken += bytes(data)


def test_short_writes_go_on() -> None:
    file = Answering(3)
    StreamFile(cast("BinaryIO", file)).write(b"0123456789")
    assert bytes(file.taken) == b"0123456789"


@pytest.mark.parametrize("answer", [None, 0])
def test_a_raw_file_that_takes_nothing_is_an_error(answer: int | None) -> None:
    with pytest.raises(StorageError, match="takes no more"):
        StreamFile(cast("BinaryIO", Answering(answer))).write(b"0123456789")


def test_a_file_that_says_nothing_has_taken_everything() -> None:
    file = Silent()
    StreamFile(cast("BinaryIO", file)).write(b"0123456789")
    assert bytes(file.taken) == b"0123456789"
