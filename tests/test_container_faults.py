"""Files and streams that fail while a container is read or written, and what cannot be encoded."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from containers import replacement, write_container
from deltafmt.container import canonical
from deltafmt.container.reader import Container
from deltafmt.container.stream import StreamFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import InvalidFileError, StorageError, UsageError
from deltafmt.format import constants as c
from deltafmt.format.limits import Limits

DATA = write_container({"a": b"x" * 5000, "b": b"y" * 300}, {"c.json": b"{}"})


class Failing(io.BytesIO):
    """A file object in memory whose named methods fail from now on."""

    broken: tuple[str, ...] = ()

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise OSError(errno.EIO, "Input/output error")

    def seek(self, *place: Any) -> int:
        """Move, or fail."""
        self._check("seek")
        return super().seek(*place)

    def read(self, *size: Any) -> bytes:
        """Read, or fail."""
        self._check("read")
        return super().read(*size)

    def write(self, data: Any) -> int:
        """Write, or fail."""
        self._check("write")
        return super().write(data)

    def flush(self) -> None:
        """Flush, or fail."""
        self._check("flush")


def test_a_stream_that_cannot_be_written_is_named() -> None:
    file = Failing()
    sink = StreamFile(file)
    file.broken = ("write", "flush")
    with pytest.raises(StorageError, match="cannot write the output: input/output error"):
        sink.write(b"x")
    with pytest.raises(StorageError, match="cannot write the output: input/output error"):
        sink.commit()
    assert not sink.keep()
    sink.abandon()
    file.broken = ()
    sink.write(b"x")
    sink.commit()
    assert file.getvalue() == b"x"


def test_a_stream_that_cannot_be_read_is_named() -> None:
    file = Failing(DATA)
    file.broken = ("seek",)
    with pytest.raises(StorageError, match="cannot seek in"):
        Container(file)
    file.broken = ()
    with Container(file) as container:
        ref = container.entry("a").data
        assert ref is not None
        file.broken = ("read",)
        with pytest.raises(StorageError, match="cannot read"):
            container.buffer(ref)
    with pytest.raises(InvalidFileError, match="the file is empty"):
        Container(io.BytesIO())


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(DATA)
    with Container(path, mmap=mmap, verify=False) as container:
        assert (container.fileno() is None) == mmap
        ref = container.entry("a").data
        assert ref is not None
        os.truncate(path, 4500)
        with pytest.raises(InvalidFileError, match="bytes early, at"):
            container.buffer(ref)
        with pytest.raises(InvalidFileError, match="bytes early, at"):
            container.read_into(4096, memoryview(bytearray(8000)))


def test_an_empty_file_that_is_not_mapped_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").touch()
    for mmap in (True, False):
        with pytest.raises(InvalidFileError, match="the file is empty"):
            Container(tmp_path / "d", mmap=mmap)


def test_an_earlier_opening_is_used_only_under_the_same_limits() -> None:
    with Container(io.BytesIO(DATA)) as earlier:
        entry = earlier.entry("a")
        with Container(io.BytesIO(DATA), earlier=earlier) as again:
            assert again.entry("a") is entry
        with Container(io.BytesIO(DATA), earlier=earlier, limits=Limits(max_output=1 << 20)) as other:
            assert other.entry("a") is not entry
            assert other.entry("a") == entry


def test_a_writer_keeps_to_the_limits_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ContainerWriter(io.BytesIO())
    tensors = [replacement(writer, name, b"z") for name in "ab"]
    assert writer.layouts == []
    monkeypatch.setattr(c, "MAX_TENSORS", 1)
    with pytest.raises(UsageError, match="2 tensors give an index of"):
        writer.finish(tensors)
    with pytest.raises(UsageError, match="profile 'warm' is not one of"):
        ContainerWriter(io.BytesIO(), "warm")


@pytest.mark.parametrize("obj", [2**64, "\ud800", {"a": 1 << 70}, {1: 2}, 1.5, {"a": {1, 2}}])
def test_what_an_index_cannot_hold_is_not_encoded(obj: Any) -> None:
    with pytest.raises(InvalidFileError, match="cannot"):
        canonical.encode(obj)


@pytest.mark.parametrize("obj", [2**64, "\ud800", {"a": object()}])
def test_what_msgpack_cannot_hold_is_not_encoded_in_order(obj: Any) -> None:
    with pytest.raises(InvalidFileError, match="the index cannot be encoded"):
        canonical.encode_ordered(obj)
