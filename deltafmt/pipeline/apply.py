"""``deltafmt.apply``: a model and a chain of delta files to a checkpoint folder, which may be the model's own.

The folder is the old state or the new one, whenever the process ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltafmt import core
from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.checkpoint.folder_writer import check_output_folder
from deltafmt.checkpoint.in_place import PatchedFolder, lock_of, needs_recovery, partial_of, replaced_of
from deltafmt.checkpoint.in_place import recover as recover_folder
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.delta import DeltaFile
from deltafmt.errors import StorageError, UsageError, WrongBaseError
from deltafmt.format.choices import check_choice, check_list
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.output import OutputLock, storage_error
from deltafmt.pipeline.attached_code import CODE, chosen_files, code_of
from deltafmt.pipeline.chain import Chain, open_chain, open_links
from deltafmt.pipeline.convert_options import APPLIED
from deltafmt.pipeline.gives import difference_from_result
from deltafmt.pipeline.outputs import refuse_input_folder
from deltafmt.pipeline.read_as_values import dequantized
from deltafmt.pipeline.unpack import Unpacker, UnpackResult
from deltafmt.pipeline.workers import Progress, thread_count


@dataclass(slots=True)
class ApplyResult(UnpackResult):
    """What an apply did.

    Attributes:
        applied: the names of the delta files that were applied, in their order.
        skipped: those at the beginning of the chain that the model has in it already.
        recovered: True if what a killed run had left was finished first.
    """

    applied: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    recovered: bool = False


def apply(
    model: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    recover: bool = False,
    force: bool = False,
    code: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> ApplyResult:
    """Apply a chain of deltas to a model, into a new folder or in place.

    Each delta file must be the parent of the next one. Deltas at the beginning of the chain that the model has in it
    already are skipped. In place, the folder has the old weights or the new ones, whenever the process ends; its other
    files stay, unless the last delta has attached files of their names.

    Args:
        model: what the first delta was made on: a checkpoint folder, or a ``.safetensors`` file.
        deltas: the delta files in their order.
        out: the folder to make.
        in_place: True to replace the weights of ``model``, in the place of ``out``.
        recover: True to finish, or to clear away, what a killed run in place has left beside ``model``, and to do
            nothing else. A run in place does that first, too.
        force: True to replace ``out`` if it is a checkpoint folder that exists.
        code: what is done with attached files of Python code; see :func:`deltafmt.unpack`.
        rename, strip_prefix: rules for the names of ``model``; see :func:`deltafmt.unpack`.
        threads: worker threads; one for each processor if not given.
        limits: how much memory, work and output a delta file may ask for.
        progress: called with a tensor's name and bytes as each is done.

    Raises:
        UsageError: an option is wrong, the output exists or is an input, or ``model`` cannot be patched in place.
        InvalidFileError: a delta, or the model, is not valid.
        WrongBaseError: a link of the chain is missing or stands in another place, or the model is not what the first
            delta was made on.
        StorageError: reading or writing failed; in place, the folder is the old one.
    """
    core.warn_if_missing()
    check_list("deltas", deltas)
    place = _place(model, deltas, out, in_place, recover)
    if code is not None:
        check_choice("code", code, CODE)
    result = ApplyResult(place, recovered=_recover(place) if out is None else False)
    if recover:
        return result
    if out is None:
        _check_patchable(place)
    else:
        check_output_folder(place, force=force)
        refuse_input_folder(place, [model, *deltas])
    with open_links(deltas, limits) as links:
        run = _Run(
            Path(model) if out is not None else place,
            Renames.parse(rename, strip_prefix),
            result,
            in_place=out is None,
            force=force,
            code=code,
            threads=thread_count(threads),
            progress=progress,
        )
        try:
            return run.write(links)
        except WrongBaseError:
            left = run.without_done(links)
            if left is None:
                raise
        run.result = result = ApplyResult(place, recovered=result.recovered)
        result.skipped = [delta.container.name for delta in links[: len(links) - len(left)]]
        if left:
            return run.write(left)
        if out is not None:
            raise UsageError(f"{model} is what {links[-1].container.name} gives already; there is nothing to write")
        return result


def _place(
    model: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    in_place: bool,
    recover: bool,
) -> Path:
    """Return the folder that is written.

    Raises:
        UsageError: the arguments do not go together.
    """
    if recover:
        if deltas or out is not None:
            raise UsageError("what a killed run left is recovered by itself: give no delta and no output")
    elif not deltas:
        raise UsageError("no delta file is given")
    elif in_place == (out is not None):
        raise UsageError("the result goes to a new folder or in place of the model: give one of the two")
    if out is not None:
        return Path(out)
    path = Path(model)
    # The folder itself gets another name, and not a link to it.
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


def _recover(path: Path) -> bool:
    """Finish or clear away what a killed run has left beside a folder; return True if the folder has its name again."""
    if not needs_recovery(path):
        return False
    try:
        lock = OutputLock(lock_of(path), path)
        try:
            finished = recover_folder(path)
        except BaseException:
            lock.keep()
            raise
        if not path.exists():
            lock.keep()
            beside = [found.name for found in (replaced_of(path), partial_of(path)) if found.exists()]
            text = f"; beside it lie {' and '.join(beside)}, of which neither is known to be whole" if beside else ""
            raise StorageError(f"no such folder: {path}{text}")
        lock.remove()
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("cannot recover", path, error) from error
    return finished


def _check_patchable(path: Path) -> None:
    """Refuse a model that is no folder, whose name no other folder can take, or whose version another tool notes."""
    if path.is_file():
        raise UsageError(f"{path} is a file, and only a folder is patched in place; write a new folder")
    if os.path.ismount(path):
        raise UsageError(f"a file system is mounted at {path}, which no other folder replaces; write a new folder")
    if os.path.lexists(path / APPLIED):
        raise UsageError(
            f"{path} holds {APPLIED}, which says what version the weights have, and would be wrong; delete that file, "
            "or write a new folder"
        )


class _Run:
    """One run of apply.

    Args:
        model: what the first delta was made on.
        renames: what the names that the first delta records are in the model.
        in_place: True to replace the model's weights.
        force: True to replace another folder.
        code: what is done with attached files of Python code.
        threads: worker threads.
        progress: called as each tensor is done.

    Attributes:
        result: what the run reports.
    """

    def __init__(
        self,
        model: Path,
        renames: Renames,
        result: ApplyResult,
        *,
        in_place: bool,
        force: bool,
        code: str | None,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._model = model
        self._renames = renames
        self.result = result
        self._in_place = in_place
        self._force = force
        self._code = code
        self._threads = threads
        self._progress = progress

    def without_done(self, links: Sequence[DeltaFile]) -> Sequence[DeltaFile] | None:
        """Return the links behind the last one that gives the model as it is; None if no link does."""
        with Checkpoint(self._model, lenient=True) as checkpoint:
            for number in range(len(links), 0, -1):
                if not difference_from_result(checkpoint, links[number - 1], self._threads):
                    return links[number:]
        return None

    def write(self, links: Sequence[DeltaFile]) -> ApplyResult:
        """Write what the links give."""
        result = self.result
        with open_chain(self._model, links, self._renames) as chain:
            last, entries = links[-1], sorted(chain.entries[-1], key=lambda entry: natural_key(entry.name))
            result.applied = [delta.container.name for delta in links]
            result.removed, result.names = list(last.container.removed), chain.bases[0].changes
            result.dequantized = dequantized(links[0].container.scaled(), last.metadata)
            result.files, result.code = chosen_files(last.container, self._code), code_of(last.container)
            Unpacker(
                last,
                chain.bases[-1],
                entries,
                result,
                force=self._force,
                patched=self._patched(chain) if self._in_place else None,
                threads=self._threads,
                progress=self._progress,
            ).run()
        return result

    def _patched(self, chain: Chain) -> PatchedFolder:
        """Return the files of the model that stay.

        Raises:
            UsageError: a variant of the weights was packed, so what a loader reads without one would stay.
        """
        variant = chain.deltas[0].metadata.get(METADATA_VARIANT)
        if variant is not None:
            raise UsageError(f"the base is the variant {variant!r} of {self._model}; write a new folder")
        replaced = [name for name, _ in chain.model.weight_files()]
        return PatchedFolder(self._model, [*replaced, *chain.model.indexes])
