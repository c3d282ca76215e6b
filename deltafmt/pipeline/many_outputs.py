"""The folder that ``pack_many`` fills: the names of its delta files, and the record of those that are finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from deltafmt.container import canonical
from deltafmt.errors import Remedy, StorageError, UsageError
from deltafmt.output import storage_error, write_durably
from deltafmt.pipeline.job import PackJob

ENDING: Final = ".deltafmt"

# Lies in the folder: which of its files are finished, and what each was made of.
RECORD: Final = ".deltafmt-many.json"
_SCHEMA: Final = 1

Source = str | os.PathLike[str]


def name_outputs(finetuned: Sequence[Source] | Mapping[str, Source], base: Source) -> dict[str, Path]:
    """Return the fine-tunes by the names of their delta files, without the ending.

    Args:
        finetuned: the fine-tunes; without names, each has its :func:`own_name`.
        base: the base.

    Raises:
        UsageError: there is none, a fine-tune is the base or is given twice, or as :func:`unique` raises.
    """
    if isinstance(finetuned, str | os.PathLike):
        raise UsageError(f"{os.fspath(finetuned)!r} is one fine-tune, and a list of them is needed")
    pairs = finetuned.items() if isinstance(finetuned, Mapping) else [(own_name(path), path) for path in finetuned]
    if not pairs:
        raise UsageError("no fine-tune is given")
    seen: dict[Any, str] = {}
    for name, source in pairs:
        identity = _identity(Path(source))
        if identity == _identity(Path(base)):
            raise UsageError(f"{source} is the base itself; leave it out of the fine-tunes")
        if identity in seen:
            raise UsageError(f"{source} is given twice, as {seen[identity]} and as {name}; leave one out")
        seen[identity] = name
    return unique(pairs)


def own_name(source: Source) -> str:
    """Return the name of a fine-tune's folder, or of its file without the ending."""
    path = Path(os.path.abspath(source))
    return path.stem if path.suffix == ".safetensors" and not path.is_dir() else path.name


def unique(pairs: Iterable[tuple[str, Source]]) -> dict[str, Path]:
    """Return fine-tunes by their names, which are names of different files on any system.

    Raises:
        UsageError: a name cannot be a file's, or two are the same.
    """
    found: dict[str, Path] = {}
    for name, source in pairs:
        path = Path(source)
        if not _is_file_name(name):
            raise UsageError(f"{name!r} is no name for the delta file of {path}", Remedy("finetuned", str(path)))
        # Some file systems take names that differ in capitals alone for the same.
        alike = next((other for other in found if other.casefold() == name.casefold()), None)
        if alike is not None:
            what = f"be {name}{ENDING}" if alike == name else f"be {name}{ENDING}, but for capitals"
            raise UsageError(f"{found[alike]} and {path} would both {what}", Remedy("finetuned", str(path)))
        found[name] = path
    return found


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and name.isprintable()


def _identity(path: Path) -> Any:
    """Return what two paths of one file or folder have in common."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # a zero byte is no OSError
        return str(path.absolute())
    return stat.st_dev, stat.st_ino


class Finished:
    """The record of the delta files in a folder that are finished.

    It is read from the folder, and written anew whenever a file is finished, with what another run has added to it
    meanwhile. A record that cannot be read counts as empty: its files are then outputs that exist.

    Args:
        folder: the folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        self._rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the rows that the folder has, by the names of their files."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._path.read_bytes())
            if isinstance(found, dict) and found.get("schema") == _SCHEMA and isinstance(found.get("files"), dict):
                return {name: row for name, row in found["files"].items() if isinstance(row, dict)}
        return {}

    def content_id(self, path: Path, job: PackJob) -> str | None:
        """Return the content id of a file that an earlier run of the same job has finished, or None.

        Args:
            path: the file.
            job: what would be packed into it.
        """
        row = self._rows.get(path.name)
        if row is None or row.get("job") != _job_digest(job) or row.get("file") != _state(path):
            return None
        content_id = row.get("content_id")
        return content_id if isinstance(content_id, str) else None

    def add(self, path: Path, job: PackJob, content_id: str) -> None:
        """Record that a file is finished.

        Raises:
            StorageError: the record cannot be written.
        """
        self._rows |= self._read()
        self._rows[path.name] = {"job": _job_digest(job), "file": _state(path), "content_id": content_id}
        # What somebody has removed since is not finished any more.
        self._rows = {name: row for name, row in sorted(self._rows.items()) if (path.parent / name).exists()}
        text = json.dumps({"schema": _SCHEMA, "files": self._rows}, indent=1) + "\n"
        write_durably(self._path, text.encode(), sync=False)


def _state(path: Path) -> list[int] | None:
    """Return size, modification time and inode of a file: equal as long as nobody has written it anew."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _job_digest(job: PackJob) -> str:
    """Return a digest of all that a file is made of: the job, its metadata, and the files that travel."""
    files = []
    for name, path in job.finetuned.files.items():
        state = _state(path)
        files.append([os.fsencode(name), [] if state is None else [str(number) for number in state[:2]]])
    parts = {"job": job.digest(), "metadata": job.metadata(), "files": files}
    return blake3(canonical.encode(parts)).hexdigest()


def make_folder(path: Path) -> bool:
    """Make the folder of the outputs unless it is there; return True if it was made.

    Raises:
        UsageError: it is a file.
        StorageError: its parent is missing, or it cannot be made.
    """
    if path.is_dir():
        return False
    if path.exists():
        raise UsageError(f"{path} is a file, and the delta files of several fine-tunes go into a folder")
    if not path.parent.is_dir():
        raise StorageError(f"no such folder: {path.parent}")
    try:
        path.mkdir()
    except OSError as error:
        raise storage_error("cannot make", path, error) from error
    return True
