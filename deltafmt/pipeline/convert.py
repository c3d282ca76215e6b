"""``deltafmt.convert``: what changed between two versions of a model, from one format to another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltafmt import core
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.folder_writer import check_output_folder
from deltafmt.container.partial import check_output_file
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError, Remedy, StorageError, UsageError
from deltafmt.foreign.checksums import CHECKSUMS
from deltafmt.foreign.patch import DELTAFMT, FORMATS, TRL, VERSION_FOLDER, Patch
from deltafmt.foreign.sparse_file import SparseFile
from deltafmt.foreign.sparse_file_writer import SparseFileWriter, total_elements
from deltafmt.foreign.version_folder import ENCODING, ENCODINGS, INDEX, VersionFolder, read_folder_index
from deltafmt.foreign.version_folder_writer import VersionFolderWriter
from deltafmt.foreign.versions import Versions
from deltafmt.format.choices import check_choice
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.pipeline.chain import open_chain, open_links
from deltafmt.pipeline.changes import Changes, DeltaChanges, PatchChanges, write_changes
from deltafmt.pipeline.convert_delta import write_delta
from deltafmt.pipeline.convert_options import (
    applied_version,
    check_base_version,
    chosen_versions,
    metadata_of,
    versions_of,
)
from deltafmt.pipeline.gives import check_gives
from deltafmt.pipeline.outputs import is_delta_file, refuse_input_file, refuse_input_folder, refuse_inside
from deltafmt.pipeline.workers import Progress, thread_count


@dataclass(slots=True)
class ConvertResult:
    """What was converted.

    Attributes:
        path: the output.
        source, target: the formats: ``deltafmt``, ``version-folder`` or ``trl``.
        version, base_version: what the output says of the two versions; None if it says nothing.
        tensors: the tensors that change.
        size: bytes of the output; of a folder, of all files in it.
        content_id: of a delta file that was made, in hexadecimal; empty otherwise.
        parent: the content id of the parent that a delta file which was made names; empty without one.
        restored: the weight files that a delta file which was made restores byte for byte.
        attached: the files that travel with it.
        base_checked: False if the source has no checksum, as mostly one of TRL. A base of the same shapes and other
            values is then not noticed.
    """

    path: Path
    source: str
    target: str
    version: str | None = None
    base_version: str | None = None
    tensors: int = 0
    size: int = 0
    content_id: str = ""
    parent: str = ""
    restored: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    base_checked: bool = True


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    to: str | None = None,
    *,
    parent: str | os.PathLike[str] | None = None,
    version: str | None = None,
    base_version: str | None = None,
    encoding: str | None = None,
    checksum: str | None = None,
    tensors_only: bool = False,
    force: bool = False,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert what changed between two versions of a model from one format to another, bit for bit.

    A patch of another program becomes a delta file that restores the checkpoint byte for byte. An exact delta file
    becomes a patch. The format of the source is found from its bytes.

    Args:
        source: a delta file; a version folder, as slime, SGLang, Miles and ModelExpress have them; or a sparse
            safetensors file of TRL.
        out: the file or folder to make.
        base: the checkpoint that the source was made on.
        to: ``deltafmt``, ``version-folder`` or ``trl``; ``deltafmt`` if not given and the source is a patch.
        parent: a delta file whose result is ``base``. The delta file that is made is the next link of a chain.
        version, base_version: the versions that a patch says. If not given, they are those of the source, or of a
            folder named ``weight_v000001``. Where the source says none, the base has the version that an engine has
            noted in it, or is one version earlier.
        encoding: how a version folder has changes: ``xor``, as if not given, or ``overwrite``.
        checksum: which checksums a version folder has: ``xxh3-128``, as if not given, ``blake3`` or ``adler32``.
        tensors_only: True to leave out what a patch cannot carry of a delta file: attached files, and the heads of
            weight files.
        force: True to replace ``out`` if it exists.
        threads: worker threads; one for each processor if not given.
        limits: how much memory, work and output a delta file, the source or ``parent``, may ask for.
        progress: called with a tensor's name and bytes as each is done.

    Raises:
        UsageError: an option is wrong, the output exists or is an input, or the format cannot carry a change.
        InvalidFileError: the source, or the base, is not valid.
        WrongBaseError: the base is not the one that the source was made on, or ``parent`` does not give it.
        StorageError: reading or writing failed.
    """
    core.warn_if_missing()
    path, place, workers = Path(source), Path(out), thread_count(threads)
    with contextlib.ExitStack() as stack:
        patch = open_patch(path)
        if patch is not None:
            stack.callback(patch.close)
        _check_limits(path, patch, limits, parent)
        target = _target(to, path, patch)
        _check_options(target, patch is None, parent, encoding, checksum, tensors_only=tensors_only)
        _check_output(place, target, (source, base), force=force)
        refuse_inside(place, path)
        if target == DELTAFMT:
            assert patch is not None
            return _to_delta(patch, place, base, parent, version, base_version, force, workers, limits, progress)
        changes, told = stack.enter_context(_changes(path, patch, base, target, limits, tensors_only=tensors_only))
        refuse_input_file(place, (changes.base,))
        noted, where = applied_version(changes.base.path), f"the checkpoint {base}"
        if told.base is None:
            told = Versions(told.version, noted)
        versions = chosen_versions(version, base_version, told, place, target)
        check_base_version(path, versions, noted, where)
        writer = _writer(place, target, versions, encoding, checksum, changes.base, force=force)
        count = write_changes(changes, writer, workers, progress)
    kind = DELTAFMT if patch is None else patch.format
    size = sum(each.stat().st_size for each in ([place] if place.is_file() else place.iterdir()))
    result = ConvertResult(place, kind, target, versions.version, versions.base, count, size)
    result.base_checked = patch is None or patch.tells_base
    return result


def convert_patch(
    patch: Patch,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
) -> ConvertResult:
    """Make a delta file of a patch that is open, as :func:`convert` does.

    Raises:
        UsageError, InvalidFileError, WrongBaseError, StorageError: as :func:`convert` raises them.
    """
    core.warn_if_missing()
    place, workers = Path(out), thread_count(threads)
    _check_output(place, DELTAFMT, (base,), force=force)
    return _to_delta(patch, place, base, parent, None, None, force, workers, DEFAULT_LIMITS, None)


@contextlib.contextmanager
def opened_changes(
    source: str | os.PathLike[str], base: str | os.PathLike[str], target: str, limits: Limits
) -> Iterator[Changes]:
    """Open a delta file or a patch on its base, and give the tensors that change, without files beside them.

    Args:
        source: the delta file or the patch.
        base: the checkpoint that it was made on.
        target: what they are for, in messages.
        limits: how much a delta file may ask for.

    Raises:
        UsageError, InvalidFileError, WrongBaseError, StorageError: as :func:`convert` raises them.
    """
    path = Path(source)
    patch = open_patch(path)
    with contextlib.ExitStack() as stack:
        if patch is not None:
            stack.callback(patch.close)
        _check_limits(path, patch, limits, None)
        yield stack.enter_context(_changes(path, patch, base, target, limits, tensors_only=True))[0]


def open_patch(path: Path) -> Patch | None:
    """Open a patch of another program, whose format is found from its bytes; None for a delta file.

    Raises:
        InvalidFileError: it is none, or is not valid.
        UnsupportedError: it is of a form that is not read.
        StorageError: it cannot be read.
    """
    if not path.exists():
        raise StorageError(f"no such file or folder: {path}")
    whole = "it is a whole checkpoint; pack it against the base with the method exact"
    if path.is_dir():
        index = read_folder_index(path)
        if index is None or ENCODING not in index[1]:
            known = any(path.glob("*.safetensors"))
            raise InvalidFileError(f"{path}: {whole if known else f'no version folder: it has no {INDEX} of changes'}")
        return VersionFolder(path)
    if is_delta_file(path):
        return None
    patch = SparseFile.open(path)
    if patch is not None:
        return patch
    raise InvalidFileError(f"{path}: {whole}")


def _target(to: str | None, path: Path, patch: Patch | None) -> str:
    """Return the format to make.

    Raises:
        UsageError: it is not known, or is the one that the source has.
    """
    if to is None and patch is None:
        raise UsageError(f"{path} is a delta file, and no format to convert it to is given", Remedy("to", None))
    target = to or DELTAFMT
    check_choice("format", target, FORMATS)
    if target == DELTAFMT and patch is None:
        raise UsageError(f"{path} is a delta file already; repack or squash makes another one of it")
    return target


def _check_options(
    target: str,
    from_delta: bool,
    parent: str | os.PathLike[str] | None,
    encoding: str | None,
    checksum: str | None,
    *,
    tensors_only: bool,
) -> None:
    """Refuse options that would do nothing, and values that nothing has.

    Raises:
        UsageError: names the option.
    """
    if parent is not None and target != DELTAFMT:
        raise UsageError(f"a parent is named in a delta file, and a {target} is made")
    if tensors_only and not from_delta:
        raise UsageError("a patch has nothing but tensors, so there is nothing to leave out")
    for name, value, known in (("encoding", encoding, ENCODINGS), ("checksum", checksum, tuple(CHECKSUMS))):
        if value is None:
            continue
        if target != VERSION_FOLDER:
            raise UsageError(f"{name} {value!r}: a {VERSION_FOLDER} has one, and a {target} is made")
        check_choice(name, value, known)


def _check_limits(path: Path, patch: Patch | None, limits: Limits, parent: str | os.PathLike[str] | None) -> None:
    """Refuse limits where no delta file is read.

    Raises:
        UsageError: names the format.
    """
    if patch is not None and parent is None and limits != DEFAULT_LIMITS:
        raise UsageError(
            f"limits are for delta files, and {path} is a {patch.format} whose base says how much it may be"
        )


def _check_output(place: Path, target: str, sources: Sequence[str | os.PathLike[str]], *, force: bool) -> None:
    """Refuse an output that cannot be made, before any work is done.

    Raises:
        UsageError: it exists, or is an input.
        StorageError: its folder is missing.
    """
    refuse_input_folder(place, sources)
    if target == VERSION_FOLDER:
        check_output_folder(place, force=force)
    else:
        check_output_file(place, force=force)


@contextlib.contextmanager
def _changes(
    path: Path,
    patch: Patch | None,
    base: str | os.PathLike[str],
    target: str,
    limits: Limits,
    *,
    tensors_only: bool,
) -> Iterator[tuple[Changes, Versions]]:
    """Open a source on its base, and give what it changes and the versions that it says."""
    if patch is None:
        with open_links([path], limits) as links, open_chain(base, links) as chain:
            format_ = "patch of TRL" if target == TRL else target
            yield DeltaChanges(chain, format_, tensors_only=tensors_only), versions_of(links[0])
        return
    with Checkpoint(base) as checkpoint:
        check_base_version(path, patch.versions, applied_version(checkpoint.path), f"the checkpoint {base}")
        patch.check(checkpoint.tensors, checkpoint.path)
        yield PatchChanges(checkpoint, patch), patch.versions


def _to_delta(
    patch: Patch,
    place: Path,
    base: str | os.PathLike[str],
    parent: str | os.PathLike[str] | None,
    version: str | None,
    base_version: str | None,
    force: bool,
    threads: int,
    limits: Limits,
    progress: Progress | None,
) -> ConvertResult:
    """Make a delta file of a patch."""
    with _changes(patch.path, patch, base, DELTAFMT, DEFAULT_LIMITS, tensors_only=False) as (changes, told):
        refuse_input_file(place, (changes.base,))
        versions = chosen_versions(version, base_version, told, place, DELTAFMT)
        link = None if parent is None else _parent_id(parent, base, place, patch.path, told, threads, limits)
        about = metadata_of(patch.format, versions)
        made = write_delta(changes, place, about, link, force=force, threads=threads, progress=progress)
    result = ConvertResult(place, patch.format, DELTAFMT, versions.version, versions.base, made.tensors)
    result.size, result.content_id = place.stat().st_size, made.content_id
    result.restored, result.attached = made.restored, made.attached
    result.parent = "" if link is None else link.hex()
    result.base_checked = patch.tells_base
    return result


def _parent_id(
    parent: str | os.PathLike[str],
    base: str | os.PathLike[str],
    place: Path,
    source: Path,
    told: Versions,
    threads: int,
    limits: Limits,
) -> bytes:
    """Return the content id of the delta file that gives the base.

    Raises:
        UsageError: the output is that file.
        WrongBaseError: it gives another base, or another version.
    """
    if place.exists() and os.path.samefile(place, parent):
        raise UsageError(f"the output {place} is itself an input")
    with DeltaFile(parent, limits=limits) as opened:
        name = opened.container.name
        check_base_version(source, told, versions_of(opened).version, f"what {name} gives")
        return check_gives(opened, base, threads)


def _writer(
    place: Path,
    target: str,
    versions: Versions,
    encoding: str | None,
    checksum: str | None,
    base: Checkpoint,
    *,
    force: bool,
) -> VersionFolderWriter | SparseFileWriter:
    """Return what writes a patch.

    Raises:
        UsageError: the base is made of several folders, whose tensors these formats cannot name.
    """
    if any(base.names.components.keys() - {""}):
        raise UsageError(f"{base.path} is made of several folders, and a {target} has the tensors of one model")
    if target == TRL:
        return SparseFileWriter(place, versions, total_elements(list(base.tensors.values())), force=force)
    how = encoding or ENCODINGS[0], checksum or next(iter(CHECKSUMS))
    return VersionFolderWriter(place, versions, *how, force=force)
