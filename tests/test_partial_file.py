"""The partial file of a resumable write, in this process: what is kept, what is taken up, what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import msgpack
import pytest

from containers import replacement
from deltafmt.container import partial
from deltafmt.container.partial import PartialFile
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import StorageError, UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.terms.nm.layout import NMLayout

LAYOUT = NMLayout(2, 8, 4)


def write_some(sink: PartialFile, names: str) -> tuple[ContainerWriter, list[TensorEntry]]:
    """Write a section for each name behind what is there already, and record it."""
    writer = ContainerWriter(sink, sections=sink.sections)
    entries = [TensorEntry.from_obj(name, obj, ()) for name, obj in sink.entries.items()]
    for name in names:
        entries.append(replacement(writer, name, name.encode() * 4500))
        writer._close_section()
        sink.record([writer.sections[-1]], [LAYOUT], {name: entries[-1].to_obj()})
    return writer, entries


def interrupted(path: Path, job: bytes | None = b"job", names: str = "abc") -> None:
    """Leave a partial file with a section for each name, and half of another."""
    sink = PartialFile(path, job)
    writer, _ = write_some(sink, names)
    writer.add(b"half of a tensor" * 100)
    assert sink.keep()


def finished(path: Path) -> bytes:
    """Return what a write without an interruption gives."""
    sink = PartialFile(path, b"job")
    writer, entries = write_some(sink, "abcd")
    writer.finish(entries)
    sink.commit()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "d.deltafmt"


def parts(path: Path) -> tuple[Path, Path]:
    """Return the names of the partial file and its journal."""
    return path.parent / f".{path.name}.partial", path.parent / f".{path.name}.partial.journal"


def test_a_later_run_goes_on_behind_the_recorded_sections(path: Path, tmp_path: Path) -> None:
    interrupted(path)
    sink = PartialFile(path, b"job")
    assert list(sink.entries) == ["a", "b", "c"]
    assert sink.layouts == [LAYOUT]
    writer, entries = write_some(sink, "d")
    assert writer.position == parts(path)[0].stat().st_size or writer.position > 0
    writer.finish(entries)
    sink.commit()
    assert path.read_bytes() == finished(tmp_path / "other.deltafmt")
    assert [found.name for found in tmp_path.iterdir() if found.name.startswith(".")] == []
    with Container(path) as container:
        assert container.keys() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("job", [b"another job", None])
def test_another_job_starts_over(path: Path, job: bytes | None) -> None:
    interrupted(path)
    sink = PartialFile(path, job)
    assert sink.sections == []
    sink.abandon()
    assert not any(found.exists() for found in parts(path))


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_is_written_again(path: Path) -> None:
    """A section that is damaged, or its padding, and all behind it."""
    for at, kept in ((100, 0), (4096, 0), (4096 + 4600, 0), (12288 + 10, 1), (20480 + 10, 2)):
        interrupted(path)
        flip(parts(path)[0], at)
        sink = PartialFile(path, b"job")
        assert len(sink.sections) == kept, at
        sink.abandon()


def test_a_partial_file_that_is_too_short_is_written_again(path: Path) -> None:
    interrupted(path)
    os.truncate(parts(path)[0], 13_000)
    sink = PartialFile(path, b"job")
    assert len(sink.sections) == 1
    sink.abandon()


def record(obj: Any) -> bytes:
    """Return a record of a journal."""
    data = obj if isinstance(obj, bytes) else msgpack.packb(obj)
    return partial._RECORD.pack(len(data), partial.xxhash.xxh3_64_intdigest(data)) + data


@pytest.mark.parametrize(
    "journal",
    [
        b"\0",
        b"\xff" * 40,
        record(b"\xc1"),
        record([1]),
        record({"job": b"job"}) + record({"sections": [{}]}),
        record({"job": b"job"}) + record({"sections": None, "layouts": [], "entries": {}}),
        record({"job": b"job"}) + record({"entries": {}, "layouts": [3], "sections": []}),
        record({"job": b"job"})[:-1],
    ],
)
def test_a_journal_that_is_no_journal_is_not_believed(path: Path, journal: bytes) -> None:
    interrupted(path)
    parts(path)[1].write_bytes(journal)
    sink = PartialFile(path, b"job")
    assert sink.sections == []
    write_some(sink, "a")
    sink.abandon()


def test_nothing_is_kept_without_a_section(path: Path) -> None:
    sink = PartialFile(path, b"job")
    sink.write(b"x")
    assert not sink.keep()
    assert not any(found.exists() for found in parts(path))


def test_an_interrupt_while_old_sections_are_checked_keeps_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(path)

    def stop(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "_take", stop)
        with pytest.raises(KeyboardInterrupt):
            PartialFile(path, b"job")
    sink = PartialFile(path, b"job")
    assert len(sink.sections) == 3
    sink.abandon()


def test_an_error_while_old_sections_are_checked_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(path)

    def fail(*_: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(PartialFile, "_take", fail)
    with pytest.raises(StorageError, match=r"cannot write .*: input/output error"):
        PartialFile(path, b"job")
    assert not any(found.exists() for found in parts(path))


def test_a_second_writer_is_refused(path: Path) -> None:
    sink = PartialFile(path, b"job")
    with pytest.raises(UsageError, match="another process is writing"):
        PartialFile(path, b"job")
    sink.abandon()


def test_an_output_that_appears_meanwhile_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def locked(*arguments: Any) -> None:
        path.write_bytes(b"of another process")
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", locked)
    with pytest.raises(UsageError, match="exists"):
        PartialFile(path, b"job")
    assert path.read_bytes() == b"of another process"


def test_a_full_disk_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = PartialFile(path, b"job")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left on device"):
            sink.commit()
    sink._file.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(b"x")
    sink.abandon()
    assert not path.exists()


def test_folders_devices_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, not a name"):
        PartialFile(tmp_path, None)
    with pytest.raises(UsageError, match="is not a regular file"):
        PartialFile(Path("/dev/null"), None)
    with pytest.raises(StorageError, match="no such folder"):
        PartialFile(tmp_path / "missing" / "d", None)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists"):
        PartialFile(tmp_path / "link", None)
