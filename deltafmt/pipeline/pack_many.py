"""One base and many fine-tunes to as many delta files, with the base read once: ``deltafmt.pack_many``.

The files are written side by side. The tensors of all fine-tunes that belong to one tensor of the base are packed one
after the other, while that tensor is in memory. Each file has the bytes that :func:`deltafmt.pack` gives it.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from deltafmt import core
from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.checkpoint.held_tensor import HeldTensor
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import DeltafmtError, StorageError, UsageError
from deltafmt.methods.base import Method
from deltafmt.output import reason
from deltafmt.pipeline.compress import Compressed, Compressor, TensorWork
from deltafmt.pipeline.file_writer import FileWriter
from deltafmt.pipeline.job import Delivery, PackJob
from deltafmt.pipeline.many_outputs import ENDING, Finished, Source, make_folder, name_outputs
from deltafmt.pipeline.outputs import GOES_ON
from deltafmt.pipeline.pack import check_output
from deltafmt.pipeline.pack_options import PackOptions
from deltafmt.pipeline.pack_result import PackResult
from deltafmt.pipeline.plan import Plan, Rule
from deltafmt.pipeline.workers import Progress, in_order, thread_count, worker_pool

# So many files are written side by side: each takes two file descriptors. The base is read once for so many fine-tunes.
TOGETHER: Final = 100


@dataclass(slots=True)
class ManyResult:
    """What :func:`deltafmt.pack_many` did. Every fine-tune is in one of the maps, by its name.

    Attributes:
        packed: what was done with each fine-tune that this run has packed.
        finished: the delta files that an earlier run had finished and that would be the same, with their content ids.
        failed: why a fine-tune has no delta file.
        finetuned_bytes: bytes of the weight files of each fine-tune that has a delta file.
        paths: the delta files.
    """

    packed: dict[str, PackResult] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    failed: dict[str, DeltafmtError] = field(default_factory=dict)
    finetuned_bytes: dict[str, int] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all delta files that are there."""
        return sum(path.stat().st_size for name, path in self.paths.items() if name in self.finetuned_bytes)

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tunes' weight files over the bytes of their delta files; 0 if there is none."""
        return sum(self.finetuned_bytes.values()) / self.size if self.finetuned_bytes else 0.0


def pack_many(
    base: str | os.PathLike[str],
    finetuned: Sequence[Source] | Mapping[str, Source],
    out: str | os.PathLike[str],
    *,
    method: Method | None = None,
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    missing: str | None = None,
    variant: str | None = None,
    attach: Sequence[str] = (),
    no_attach: Sequence[str] = (),
    quantized: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    allow_architecture: bool = False,
    base_name: str | None = None,
    profile: str = "hot",
    seed: int = 0,
    exact: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ManyResult:
    """Pack all fine-tunes of one base in one run, which reads the base once for each 100 fine-tunes.

    Each delta file has the bytes that :func:`deltafmt.pack` would give it. A fine-tune that fails does not stop the
    others. A run that was interrupted goes on where it stopped when it is called again with the same arguments, and a
    run with more fine-tunes packs only those that have no delta file yet.

    Args:
        base: a checkpoint folder or a ``.safetensors`` file.
        finetuned: the fine-tunes. In a map, the keys are the names of their delta files, without the ending
            ``.deltafmt``; in a list, each has the name of its folder, or of its file without ``.safetensors``.
        out: the folder for the delta files; it is made if it is missing.
        method, rules, include, exclude, missing, variant, attach, no_attach, quantized, rename, strip_prefix,
            allow_architecture, base_name, profile, seed, exact: as :func:`deltafmt.pack` takes them, for all of them.
        force: True to replace delta files that exist. Those that an earlier run of ``pack_many`` has finished, and
            that would be the same, stay either way.
        threads: worker threads; one for each processor if not given.
        progress: called with ``NAME: TENSOR`` and the tensor's bytes as each is done; once with NAME and all bytes for
            a fine-tune whose delta file is finished already.

    Returns:
        What was done with each fine-tune.

    Raises:
        UsageError: an option is wrong, two fine-tunes would have the same name, or a fine-tune is the base.
        InvalidFileError: the base is not a valid checkpoint.
        StorageError: the base cannot be read, or ``out`` cannot be made.

    What is wrong with a single fine-tune is not raised: see ``failed`` of the result.
    """
    core.warn_if_missing()
    options = PackOptions.read(
        method=method,
        rules=rules,
        include=include,
        exclude=exclude,
        missing=missing,
        variant=variant,
        attach=attach,
        no_attach=no_attach,
        quantized=quantized,
        rename=rename,
        strip_prefix=strip_prefix,
        allow_architecture=allow_architecture,
        base_name=base_name,
        profile=profile,
        seed=seed,
        exact=exact,
    )
    for each in (options.method, *(chosen for _, chosen in rules if chosen is not None)):
        if each.calibration == "required":
            raise UsageError(
                f"method {each.name} needs a calibration text, which every fine-tune reads by itself; pack them one by "
                "one"
            )
    sources, folder = name_outputs(finetuned, base), Path(out)
    result = ManyResult(paths={name: folder / f"{name}{ENDING}" for name in sources})
    workers = thread_count(threads)
    with Checkpoint(base, variant=variant, lenient=True) as shared:
        made = make_folder(folder)
        run = _Run(shared, options, result, Finished(folder), force, workers, progress)
        names = list(sources)
        try:
            for first in range(0, len(names), TOGETHER):
                run.group({name: sources[name] for name in names[first : first + TOGETHER]})
        finally:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if nothing came into it
    for found in (result.packed, result.finished, result.failed, result.finetuned_bytes):
        _sort(found, names)
    return result


def _sort(found: dict[str, Any], names: Sequence[str]) -> None:
    """Put a map into the order in which the fine-tunes were given."""
    for name in names:
        if name in found:
            found[name] = found.pop(name)


@dataclass(eq=False, slots=True)
class _Output:
    """One delta file that is being written.

    Attributes:
        name: the fine-tune's.
        job: what is packed.
        writer: writes the file.
        compressor: compresses its tensors.
        left: number of tensors that are still to be written.
        open: False once the file is finished or has failed.
    """

    name: str
    job: PackJob
    writer: FileWriter
    compressor: Compressor
    left: int
    open: bool = True


# A tensor of one of the files, and the work on it.
_Item = tuple[_Output, Plan]


class _Run:
    """One run of ``pack_many``."""

    def __init__(
        self,
        base: Checkpoint,
        options: PackOptions,
        result: ManyResult,
        finished: Finished,
        force: bool,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._base = base
        self._options = options
        self._result = result
        self._finished = finished
        self._force = force
        self._threads = threads
        self._progress = progress or (lambda *_: None)
        self._key: Any = None
        self._held: HeldTensor | None = None

    def group(self, sources: Mapping[str, Path]) -> None:
        """Pack some fine-tunes side by side."""
        outputs: list[_Output] = []
        # The threads stop before the files that they read are closed.
        with contextlib.ExitStack() as pairs, self._kept(outputs), worker_pool(self._threads, "pack") as pool:
            for name, source in sources.items():
                with self._one(name), contextlib.ExitStack() as pair:
                    job = self._prepare(name, pair.enter_context(self._options.open(self._base.path, source)))
                    if job is not None:
                        outputs.append(self._open(name, job, pool))
                        pairs.enter_context(pair.pop_all())
            self._pack(outputs)
        self._key = self._held = None

    @contextlib.contextmanager
    def _kept(self, outputs: Sequence[_Output]) -> Iterator[None]:
        """Keep what is written of unfinished files if the run ends early.

        Raises:
            KeyboardInterrupt: says whether the next run can go on.
        """
        try:
            yield
        except BaseException as error:
            kept = [output.writer.sink.keep() for output in outputs if output.open]
            if isinstance(error, KeyboardInterrupt):
                some = any(kept) or self._result.packed
                raise KeyboardInterrupt(f"interrupted{GOES_ON if some else ''}") from error
            raise

    def _prepare(self, name: str, pair: tuple[Checkpoint, Checkpoint]) -> PackJob | None:
        """Return what is packed of a pair; None if an earlier run has done it."""
        path, (before, after) = self._result.paths[name], pair
        if before.identity() != self._base.identity():
            raise StorageError(f"{self._base.path} changed while it was being read")
        job = self._options.job(before, after)
        content_id = self._finished.content_id(path, job)
        if content_id is not None:
            self._result.finished[name] = content_id
            self._result.finetuned_bytes[name] = after.file_bytes
            self._progress(name, after.nbytes)
            return None
        check_output(job, Delivery(path, self._force, self._threads))
        return job

    def _open(self, name: str, job: PackJob, pool: ThreadPoolExecutor) -> _Output:
        """Begin a file; one whose tensors an earlier run has packed is finished at once."""
        writer = FileWriter.open(job, Delivery(self._result.paths[name], self._force, self._threads))
        return _Output(name, job, writer, Compressor(job, pool, writer.files), len(writer.todo))

    def _pack(self, outputs: Sequence[_Output]) -> None:
        """Pack the tensors of all files; each file is finished behind its last tensor."""
        for output in outputs:
            if not output.left:
                self._finish(output)
        for (output, plan), work in in_order(_merged(outputs), self._submit, _footprint):
            if not output.open:
                continue
            with self._one(output.name, output):
                output.writer.take(plan, work.result())
                output.left -= 1
            if output.open:
                self._progress(f"{output.name}: {plan.tensor.name}", plan.tensor.nbytes)
                if not output.left:
                    self._finish(output)

    def _submit(self, item: _Item) -> TensorWork:
        """Start the work on a tensor, whose base is read into memory unless it is there from the tensor before."""
        output, plan = item
        if not output.open:
            return _Nothing()
        try:
            return output.compressor.submit(replace(plan, base=self._hold(plan)))
        except (DeltafmtError, OSError, MemoryError) as error:
            return _Failed(error)

    def _hold(self, plan: Plan) -> Tensor | None:
        base = plan.base
        if base is None or base is plan.tensor or plan.alias is not None:
            return base
        key = type(base), base.dtype, base.shape, base.parts()
        if key != self._key or self._held is None:
            self._key, self._held = None, None
            self._held = HeldTensor.of(base)
            self._key = key
        held = self._held.as_matrix(base.leading)
        assert isinstance(held, HeldTensor)
        # Messages name the tensor as this fine-tune's base has it.
        return replace(held, name=base.name)

    def _finish(self, output: _Output) -> None:
        """Finish a file and record that."""
        result, path = self._result, self._result.paths[output.name]
        with self._one(output.name, output):
            output.writer.finish(self._threads)
            self._base.check_unchanged()
            output.writer.check_sources()
            output.writer.sink.commit()
            output.open = False
            packed = output.writer.result
            result.packed[output.name] = packed
            result.finetuned_bytes[output.name] = packed.finetuned_bytes
            try:
                self._finished.add(path, output.job, packed.content_id)
            except StorageError as error:
                packed.remarks.append(f"{error}; a later run will not know that {path} is finished")

    @contextlib.contextmanager
    def _one(self, name: str, output: _Output | None = None) -> Iterator[None]:
        """Note what is wrong with one fine-tune, and go on with the others."""
        try:
            yield
        except (DeltafmtError, OSError, MemoryError) as error:
            if output is not None and output.open:
                output.open = False
                output.writer.sink.abandon()
            found = error if isinstance(error, DeltafmtError) else StorageError(_words(error))
            self._result.failed.setdefault(name, found)


@dataclass(frozen=True, slots=True)
class _Failed:
    """Work that could not be started."""

    error: BaseException

    def result(self) -> Compressed:
        """Raise why."""
        raise self.error


class _Nothing:
    """The work on a tensor of a file that has failed."""

    def result(self) -> Compressed:
        """Return that nothing has become of it; nobody asks."""
        return Compressed()


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{reason(error)} {error.filename}" if error.filename else reason(error)
    return "out of memory"


def _merged(outputs: Sequence[_Output]) -> Iterator[_Item]:
    """Give the tensors of all files, each file's in its order, and those of one base tensor one after the other.

    Every file has its tensors in the natural order of their names, exact ones last. So a merge by the names that they
    have in the base brings together what belongs together. Where names differ so much that it does not, a tensor of the
    base is read more than once.
    """
    return heapq.merge(*([(output, plan) for plan in output.writer.todo] for output in outputs), key=_place)


def _place(item: _Item) -> tuple[bool, tuple[list[str | int], str]]:
    plan = item[1]
    base = plan.tensor if plan.base is None or plan.alias is not None else plan.base
    return plan.in_exact_sections, natural_key(base.parts()[0].name)


def _footprint(item: _Item) -> int:
    output, plan = item
    return output.compressor.footprint(plan)
