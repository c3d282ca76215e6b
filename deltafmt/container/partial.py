"""An output file that appears whole or not at all; an interrupted write can be resumed.

The bytes go to ``.NAME.partial`` beside the output. After every section, a record goes to ``.NAME.partial.journal``.
The record holds the section's row of the index and the tensor entries that the section completes. A later run of the
same job checks the checksums of the recorded sections, cuts off the bytes behind them and goes on from there. Nothing
therefore needs to be synced before the final rename.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import xxhash

from deltafmt.container import canonical, frame
from deltafmt.errors import InvalidFileError, Remedy, StorageError, UsageError
from deltafmt.format import constants as c
from deltafmt.index.sections import Section
from deltafmt.output import Bytes, OutputLock, check_path, storage_error, sync_folder
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.registry import parse_layout

_RECORD = struct.Struct("<IQ")


class PartialFile:
    """The sink of an atomic, resumable write.

    Args:
        path: the output file.
        job: the digest of the job; sections of an earlier run are kept only if its job is equal. None starts over.
        force: replace ``path`` if it exists.
        features: the incompatible features of the file's header.

    Attributes:
        partial: where the bytes go until :meth:`commit`.
        sections, layouts, entries: the sections, layouts and entries that an earlier run has completed; the entries
            are plain objects, by tensor name.

    Raises:
        UsageError: the output exists, or another process is writing it.
        StorageError: the folder is missing, or writing failed.
    """

    def __init__(self, path: Path, job: bytes | None, *, force: bool = False, features: int = 0) -> None:
        check_output_file(path, force=force)
        self.path = path
        self.sections: list[Section] = []
        self.layouts: list[TermLayout] = []
        self.entries: dict[str, Any] = {}
        self._header = frame.encode_header(incompatible=features)
        self.partial = path.parent / f".{path.name}.partial"
        with self._storage_errors():
            # The journal is the lock: it is opened first and removed last.
            self._lock = OutputLock(path.parent / f".{path.name}.partial.journal", path)
            self._journal: BinaryIO = self._lock.file
            try:
                check_output_file(path, force=force)  # again: another process may have finished meanwhile
                descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except BaseException:
                self._lock.keep()
                raise
            self._file: BinaryIO = os.fdopen(descriptor, "r+b")
            earlier = os.fstat(self._journal.fileno()).st_size > 0
            try:
                self._resume(job)
            except BaseException as error:
                if earlier and isinstance(error, KeyboardInterrupt):
                    self._file.close()  # the earlier run's bytes stay: they were only being checked
                    self._lock.keep()
                else:
                    self.abandon()
                raise

    def _resume(self, job: bytes | None) -> None:
        position = kept = 0
        for end, record in self._records():
            if kept == 0:
                if job is None or record.get("job") != job:
                    break
            elif not self._take(record):
                break
            kept = end
        if self.sections:
            last = self.sections[-1]
            position = last.offset + last.length
        self._journal.truncate(kept)
        self._file.truncate(position)
        self._file.seek(position)
        if kept == 0:
            self._append({"job": job})

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self._journal.seek(0)
        while len(head := self._journal.read(_RECORD.size)) == _RECORD.size:
            length, checksum = _RECORD.unpack(head)
            data = self._journal.read(min(length, c.MAX_INDEX_BYTES))
            if len(data) != length or xxhash.xxh3_64_intdigest(data) != checksum:
                return
            try:
                record = msgpack.unpackb(data)
            except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
                return
            if type(record) is not dict:
                return
            yield self._journal.tell(), record

    def _take(self, record: dict[str, Any]) -> bool:
        try:
            sections = [Section.from_obj(section, "section") for section in record["sections"]]
            layouts = [parse_layout(layout, "layout") for layout in record["layouts"]]
            entries = dict(record["entries"])
        except (InvalidFileError, KeyError, TypeError, ValueError):
            return False
        self._file.seek(0)
        head = self._header.ljust(c.SECTION_ALIGNMENT, b"\0")
        if not self.sections and self._file.read(c.SECTION_ALIGNMENT) != head:
            return False
        if not all(map(self._is_there, sections)):
            return False
        self.sections += sections
        self.layouts = layouts
        self.entries.update(entries)
        return True

    def _is_there(self, section: Section) -> bool:
        """Tell whether a section, and the padding behind it, lie in the file as they were written."""
        self._file.seek(section.offset)
        hasher = xxhash.xxh3_128()
        missing = section.length
        while missing:
            data = self._file.read(min(missing, 16 * 1024 * 1024))
            if not data:
                return False
            hasher.update(data)
            missing -= len(data)
        end = section.offset + section.length
        padding = c.align(end, c.SECTION_ALIGNMENT) - end
        return hasher.digest() == section.checksum and not any(self._file.read(padding))

    def write(self, data: Bytes) -> None:
        """Write bytes behind those that were written before.

        Raises:
            StorageError: writing failed, for example because the disk is full.
        """
        try:  # without the context manager, which takes longer than a small write
            self._file.write(data)
        except OSError as error:
            raise storage_error("cannot write", self.path, error) from error

    def record(self, sections: Sequence[Section], layouts: list[TermLayout], entries: dict[str, Any]) -> None:
        """Note in the journal that sections are complete, and the entries of the tensors that they complete."""
        with self._storage_errors():
            self._file.flush()
            self._append(
                {
                    "entries": {name: entries[name] for name in sorted(entries)},
                    "layouts": [layout.to_obj() for layout in layouts],
                    "sections": [section.to_obj() for section in sections],
                }
            )
            self.sections += sections

    def _append(self, record: dict[str, Any]) -> None:
        data = canonical.encode_ordered(record)
        self._journal.write(_RECORD.pack(len(data), xxhash.xxh3_64_intdigest(data)) + data)
        self._journal.flush()

    def commit(self) -> None:
        """Sync the file to disk and rename it to the output's name."""
        with self._storage_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        self._lock.remove()

    def keep(self) -> bool:
        """Keep the complete sections for a later run and return True; without any, remove the file and return False."""
        if not self.sections:
            self.abandon()
            return False
        with contextlib.suppress(OSError):
            self._file.close()
        self._lock.keep()
        return True

    def abandon(self) -> None:
        """Remove the partial file and the journal."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.partial.unlink(missing_ok=True)
        self._lock.remove()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage_error("cannot write", self.path, error) from error


def check_output_file(path: Path, *, force: bool) -> None:
    """Refuse an output file that exists already, or whose folder is missing.

    Raises:
        UsageError: the file exists and ``force`` is not given, or the path is a folder or a device.
        StorageError: the folder is missing.
    """
    check_path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a name for the output file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file")
    if not path.parent.is_dir():
        raise StorageError(f"no such folder: {path.parent}")
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError(f"{path} exists", Remedy("force"))
