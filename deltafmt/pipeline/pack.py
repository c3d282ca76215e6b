"""Base and fine-tune to a delta file: streamed, in bounded memory, the same bytes whatever the number of threads."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3

from deltafmt import accel
from deltafmt._version import __version__
from deltafmt.checkpoint.folder import Checkpoint, read_file
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.container import canonical
from deltafmt.container.partial import PartialFile, check_output_file
from deltafmt.container.stream import StreamFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import BATCH_ELEMENTS, row_ranges
from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.index.sections import Attachment
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.methods.method_routines import Routines, select_routines
from deltafmt.output import storage_error
from deltafmt.pipeline.budget import Choice, Choices, Undecided, target_bytes, target_metadata
from deltafmt.pipeline.calibrate import (
    SEQUENTIAL,
    Calibration,
    MomentFolder,
    Packing,
    check_calibration,
    gathered_moments,
)
from deltafmt.pipeline.plan import (
    NO_SMALLER,
    Plan,
    Rule,
    exact_hint,
    file_metadata,
    make_plan,
    shared_bytes,
    tensor_seed,
)
from deltafmt.pipeline.workers import PerThread, Progress, drain, in_order, thread_count
from deltafmt.terms.buffers import Packed, blank, raw_bytes
from deltafmt.terms.codecs import AnyCodec, fitted, term_codec
from deltafmt.terms.layout import TermLayout

# With so many columns or fewer, keeping under half of a row at random is likely to cost accuracy (docs/benchmarks.md).
NARROW_COLUMNS = 256

# Float32 arrays of its size that compressing a whole matrix takes, for each byte of a fine-tuned tensor in BF16.
WHOLE_FACTOR = 8

# Bytes that solving for a whole matrix takes for each element of its inputs' second moments.
HESSIAN_BYTES = 40

# Bytes of the base that are read for their fingerprints while numba loads, which takes about as long.
FINGERPRINT_AHEAD_BYTES = 1024 * 1024 * 1024


@dataclass(slots=True)
class PackResult:
    """What a pack did.

    Attributes:
        path: the file, or None when it went to a stream.
        size: bytes of the file.
        content_id: its content id, hexadecimal.
        finetuned_bytes: bytes of the fine-tune's weight files, headers included.
        actions: number of tensors by action.
        kept: names of matrices that are kept exactly, with the reason.
        narrow: matrices of so few columns that dropping most of a row may not average out.
        removed: tensors that only the base has.
        resumed: tensors that an interrupted run had already packed.
        skipped_files: names of files that could not be attached.
        calibration_tokens: that the fine-tune has read of a calibration text.
        sequential: whether each of its blocks has seen what those before it give as they are stored.
        uncalibrated: names of matrices that a method was to calibrate, and of whose inputs no moments were found.
        notes: what the method had to say, by name of the tensor; not of those that an interrupted run had packed.
        choice: what was chosen for a target, if there was one.
    """

    path: Path | None
    size: int = 0
    content_id: str = ""
    finetuned_bytes: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    narrow: int = 0
    removed: int = 0
    resumed: int = 0
    skipped_files: list[str] = field(default_factory=list)
    calibration_tokens: int = 0
    sequential: bool = False
    uncalibrated: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    choice: Choice | None = None

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tune's weight files over bytes of the delta file, everything in it included."""
        return self.finetuned_bytes / self.size


def pack(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    out: str | os.PathLike[str] | BinaryIO,
    *,
    method: Method | None = None,
    target_ratio: float | None = None,
    target_size: int | None = None,
    candidates: Sequence[Method] = (),
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Calibration | None = None,
    profile: str = "hot",
    seed: int = 0,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Pack the difference of two checkpoints into a delta file.

    Args:
        base, finetuned: a checkpoint folder or a ``.safetensors`` file.
        out: the file to make, or a binary file object to write to (which cannot be resumed).
        method: compresses the matrices; DeltaDQ() if not given.
        target_ratio: choose a method for each tensor, so that the file is at least so many times smaller.
        target_size: choose a method for each tensor, so that the file has at most so many bytes.
        candidates: what is chosen from; those of :func:`deltafmt.pipeline.budget.default_candidates` if empty.
        rules: (pattern, method or None) pairs; the last that matches a name decides, None keeps it exactly.
        include: if given, only names that match one of these patterns are compressed.
        exclude: names that match one of these patterns are kept exactly.
        calibration: a text for the fine-tune to read, which the methods gptq and sparsegpt need and others can use.
        profile: ``hot`` or ``cold``.
        seed: 64 bits; every tensor's own seed is derived from it and the tensor's name.
        force: replace ``out`` if it exists.
        threads: worker threads; one a processor if not given. The bytes do not depend on it.
        progress: called with a tensor's name and bytes as each is done; with a target also as each is measured.

    Raises:
        UsageError: a wrong option, a pattern that matches nothing, an output that exists or is an input, a target
            that no plan meets.
        NonFiniteError: a delta has NaN or infinity and its tensor is to be compressed.
        InvalidFileError: an input is not a valid checkpoint.
        WrongBaseError: base and fine-tune are of different architecture.
        StorageError: reading or writing failed.
    """
    targeted = target_ratio is not None or target_size is not None
    if targeted and method is not None:
        raise UsageError(f"a target chooses the methods itself, and {method.describe()!r} is given")
    if candidates and not targeted:
        raise UsageError("candidates are given, and no target to choose them for")
    check_calibration(candidates, calibration)
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed} is outside 0 to 2**64 - 1")
    if profile not in c.PROFILES:
        raise UsageError(f"profile {profile!r} is not one of {', '.join(c.PROFILES)}")
    workers = thread_count(threads)
    with Checkpoint(base) as before, Checkpoint(finetuned) as after:
        sources = before, after
        target = target_bytes(target_ratio, target_size, after.file_bytes)
        default: Method = Undecided() if target is not None else method or DeltaDQ()
        plans = make_plan(*sources, default, rules, include, exclude)
        if profile == "hot" and any(layout.cold_only for plan in plans for layout in plan.layouts()):
            raise UsageError("a rank index needs --profile cold: a hot file is read by kernels as it lies")
        if isinstance(out, str | os.PathLike):
            out = Path(out)
            refuse_input(out, sources)
            check_output_file(out, force=force)
        place = out if isinstance(out, Path) else None
        sequential = calibration is not None and calibration.sequential

        def gathered(plans: list[Plan], how: Calibration | None) -> AbstractContextManager[MomentFolder | None]:
            packing = None
            if how is not None and how.sequential:
                some = functools.partial(_write_some, sources, profile, seed, workers)
                packing = Packing(_job(sources, plans, profile, seed, None), some)
            return gathered_moments(after, plans, how, place, progress, packing)

        def write(plans: list[Plan], description: str, moments: MomentFolder | None) -> PackResult:
            return _write(sources, plans, description, out, profile, seed, force, workers, progress, target, moments)

        if target is None:
            with gathered(plans, calibration) as moments:
                return write(plans, default.describe(), moments)
        # What a block sees of those before it depends on what is chosen: it is measured without.
        measured = replace(calibration, sequential=False) if calibration is not None else None
        with gathered(plans, measured) as moments:
            metadata = {} if moments is None else moments.metadata() | (SEQUENTIAL if sequential else {})
            choices = Choices(sources, plans, candidates, profile, seed, metadata)
            choices.measure(workers, progress, moments)
            limit = target
            while True:
                choice = choices.choose(target, limit)
                again = sequential and any(p.method.calibration != "none" for p in choice.plans if p.method)
                with gathered(choice.plans, calibration) if again else contextlib.nullcontext(moments) as seen:
                    result = write(choice.plans, target_metadata(target), seen)
                result.choice = choice
                if result.size <= target:
                    return result
                limit -= result.size - target  # the size was foretold wrongly: plan for less


def _write(
    sources: tuple[Checkpoint, Checkpoint],
    plans: list[Plan],
    description: str,
    out: Path | BinaryIO,
    profile: str,
    seed: int,
    force: bool,
    workers: int,
    progress: Progress | None,
    most: int | None,
    moments: MomentFolder | None,
) -> PackResult:
    """Write a file, or nothing where it has more than so many bytes; the result says how many.

    Raises:
        UsageError: a stream has had too many bytes already.
    """
    path = out if isinstance(out, Path) else None
    sink: PartialFile | StreamFile
    if isinstance(out, Path):
        sink = PartialFile(out, _job(sources, plans, profile, seed, moments), force=force)
    else:
        sink = StreamFile(out)
    result = PackResult(path, finetuned_bytes=sources[1].file_bytes, skipped_files=list(sources[1].skipped))
    try:
        packer = _Packer(sources, plans, description, sink, profile, seed, result, moments)
        packer.run(workers, progress)
        for source in sources:
            source.check_unchanged()
        if most is not None and result.size > most:
            if path is None:
                raise UsageError(f"the output has {result.size:,} bytes, and the target was {most:,}")
            sink.abandon()
        else:
            sink.commit()
    except KeyboardInterrupt as interrupt:
        kept = "; the same command goes on where it stopped" if sink.keep() else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from interrupt
    except BaseException:
        sink.abandon()
        raise
    return result


def _write_some(
    sources: tuple[Checkpoint, Checkpoint],
    profile: str,
    seed: int,
    workers: int,
    plans: list[Plan],
    path: Path,
    moments: MomentFolder,
) -> None:
    """Write a file of some tensors alone, without attachments.

    Raises:
        StorageError: writing failed.
    """
    try:
        with open(path, "wb") as file:
            sink = StreamFile(file)
            _Packer(sources, plans, "", sink, profile, seed, PackResult(path), moments).run(workers, None, attach=False)
            sink.commit()
    except OSError as error:
        raise storage_error("cannot write", path, error) from error


def refuse_input(path: Path, sources: Sequence[Checkpoint]) -> None:
    """Refuse an output that is one of the inputs.

    Raises:
        UsageError: it is.
    """
    for source in sources:
        inputs = [source.path, *(Path(name) for name, _, _ in source.identity()), *source.files.values()]
        if path.exists() and any(found.exists() and os.path.samefile(path, found) for found in inputs):
            raise UsageError(f"the output {path} is itself an input")


def _job(
    sources: Sequence[Checkpoint], plans: Sequence[Plan], profile: str, seed: int, moments: MomentFolder | None
) -> bytes:
    """Return a digest of everything that decides the bytes of the output."""
    description: dict[str, Any] = {
        "files": [[[os.fsencode(path), size, time] for path, size, time in source.identity()] for source in sources],
        "plans": [[plan.tensor.name, plan.method.describe() if plan.method else plan.reason] for plan in plans],
        "profile": profile,
        "seed": str(seed),
        "version": __version__,
    }
    if moments is not None:
        description["calibration"] = moments.described
    return blake3(canonical.encode(description)).digest()


@dataclass(slots=True)
class _PackedTerm:
    """A term that is being packed: the arrays that the runs fill."""

    layout: TermLayout
    codec: AnyCodec
    packed: Packed
    slots: int = 0


@dataclass(slots=True)
class _Pending:
    """One tensor on its way: the futures of its parts and the terms that they fill."""

    same: Future[bool] | None = None
    fingerprint: Future[bytes] | None = None
    parts: list[Future[None]] = field(default_factory=list)
    terms: list[_PackedTerm] = field(default_factory=list)
    seed: int = 0
    notes: list[str] = field(default_factory=list)


class _Packer:
    """One run of pack."""

    def __init__(
        self,
        sources: tuple[Checkpoint, Checkpoint],
        plans: list[Plan],
        description: str,
        sink: PartialFile | StreamFile,
        profile: str,
        seed: int,
        result: PackResult,
        moments: MomentFolder | None,
    ) -> None:
        self._finetuned = sources[1]
        self._plans = plans
        self._seed = seed
        self._sink = sink
        self._result = result
        self._moments = moments
        self._removed = sorted(set(sources[0].tensors) - set(sources[1].tensors))
        self._metadata = file_metadata(description, seed, sources[1])
        if moments is not None:
            result.calibration_tokens, result.sequential = moments.tokens, moments.sequential
            self._metadata |= moments.metadata()
        self._writer = ContainerWriter(sink, profile, sink.sections)
        layouts = tuple(sink.layouts)
        for layout in layouts:
            self._writer.layout_number(layout)
        self._entries = {name: TensorEntry.from_obj(name, obj, layouts) for name, obj in sink.entries.items()}
        result.resumed = len(self._entries)
        self._unrecorded: dict[str, Any] = {}
        self._fingerprints: dict[str, Future[bytes]] = {}

    def run(self, threads: int, progress: Progress | None, *, attach: bool = True) -> None:
        """Pack every tensor, then the attachments if they are wanted, then finish the file."""
        todo = [plan for plan in self._plans if plan.tensor.name not in self._entries]
        work = sum(plan.tensor.nbytes for plan in todo if plan.method)
        compiled = accel.worthwhile(work)
        self._routines = PerThread(lambda: select_routines(compiled))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="deltafmt-pack")
        try:
            if compiled:
                self._load_loops(pool, todo)
            submitted = in_order(todo, lambda plan: self._submit(pool, plan), self._footprint)
            for plan, pending in submitted:
                self._add(self._finish_tensor(plan, pending))
                if pending.notes:
                    self._result.notes[plan.tensor.name] = "; ".join(pending.notes)
                if progress:
                    progress(plan.tensor.name, plan.tensor.nbytes)
        finally:
            drain(pool)
        attachments = self._attach() if attach else {}
        for plan in self._plans:
            entry = self._entries[plan.tensor.name]
            self._result.actions[entry.action] = self._result.actions.get(entry.action, 0) + 1
            if entry.action == "replace" and len(entry.shape) > 1:
                self._result.kept[entry.name] = plan.reason or NO_SMALLER
            if entry.columns <= NARROW_COLUMNS and plan.method is not None and plan.method.at_random:
                self._result.narrow += any(term.layout.drops_most for term in entry.terms)
        self._result.removed = len(self._removed)
        if self._moments is not None:
            added = (name for name, entry in self._entries.items() if entry.action == "add")
            self._result.uncalibrated = [name for name in added if self._moments.lacks(name)]
        identity = self._writer.finish(
            self._entries.values(), removed=self._removed, attachments=attachments, metadata=self._metadata
        )
        self._result.size = self._writer.position
        self._result.content_id = identity.hex()

    def _load_loops(self, pool: ThreadPoolExecutor, todo: list[Plan]) -> None:
        """Load numba and its cached code in one thread, while the others take the fingerprints that come first."""
        method = next(plan.method for plan in todo if plan.method)
        pool.submit(_warm_up, method, self._routines)
        ahead = 0
        for plan in todo:
            if plan.method is not None and plan.base is not None and ahead < FINGERPRINT_AHEAD_BYTES:
                self._fingerprints[plan.tensor.name] = pool.submit(plan.base.fingerprint)
                ahead += plan.base.nbytes

    def _add(self, entry: TensorEntry) -> None:
        self._entries[entry.name] = entry
        self._unrecorded[entry.name] = entry.to_obj()
        if self._writer.boundary():
            self._sink.record(self._writer.sections[-1], self._writer.layouts, self._unrecorded)
            self._unrecorded = {}

    def _attach(self) -> dict[str, Attachment]:
        found = {}
        for name, path in self._finetuned.files.items():
            found[name] = self._writer.attach(read_file(path))
        return found

    def _submit(self, pool: ThreadPoolExecutor, plan: Plan) -> _Pending:
        """Start the work on one tensor."""
        pending = _Pending()
        tensor, base = plan.tensor, plan.base
        tensor.file.will_need(tensor.offset, tensor.nbytes)
        if plan.alias is not None or base is None:
            return pending
        pending.same = pool.submit(tensor.equals, base)
        method = plan.method
        if method is None:
            return pending
        pending.fingerprint = self._fingerprints.pop(tensor.name, None) or pool.submit(base.fingerprint)
        pending.seed = tensor_seed(self._seed, tensor.name)
        if method.whole:
            pending.parts.append(pool.submit(_pack_whole, plan, method, pending, self._routines, self._moments))
            return pending
        rows = plan.shared_rows
        for layout in plan.layouts():
            codec = term_codec(layout, rows, tensor.columns, pending.seed if layout.seeded else 0)
            pending.terms.append(_PackedTerm(layout, codec, blank(layout, *codec.shape)))
        width = max(term.codec.width for term in pending.terms)
        step = max(term.codec.run_rows for term in pending.terms)
        for start, stop in row_ranges(0, rows, width, step, BATCH_ELEMENTS):
            runs = row_ranges(start, stop, width, step)
            pending.parts.append(pool.submit(_pack_rows, plan, method, pending, runs, self._routines))
        return pending

    def _footprint(self, plan: Plan) -> int:
        """Return the bytes that count for a tensor on its way; a whole matrix is held in float32, several times."""
        if plan.method is None or not plan.method.whole:
            return plan.tensor.nbytes
        solved = self._moments is not None and self._moments.has(plan.tensor.name)
        moments = HESSIAN_BYTES * plan.tensor.columns**2 if solved else 0
        return plan.tensor.nbytes * WHOLE_FACTOR + moments

    def _finish_tensor(self, plan: Plan, pending: _Pending) -> TensorEntry:
        """Wait for one tensor, write its buffers and return its entry."""
        tensor, base = plan.tensor, plan.base
        if plan.alias is not None:
            return TensorEntry(tensor.name, "alias", tensor.dtype, tensor.shape, target=plan.alias)
        if base is not None and pending.same is not None and pending.same.result():
            for part in pending.parts:
                part.cancel()
            digest = pending.fingerprint.result() if pending.fingerprint else base.fingerprint()
            reference = BaseRef(digest, base.dtype, base.shape)
            return TensorEntry(tensor.name, "same", tensor.dtype, tensor.shape, reference)
        if plan.method is None or base is None or pending.fingerprint is None:
            return self._replace(tensor)
        for part in pending.parts:
            part.result()
        if sum(array.nbytes for term in pending.terms for array in term.packed.values()) >= shared_bytes(tensor, base):
            return self._replace(tensor)
        reference = BaseRef(pending.fingerprint.result(), base.dtype, base.shape)
        return self._add_terms(tensor, reference, pending)

    def _replace(self, tensor: Tensor) -> TensorEntry:
        digest = blake3()
        ref = self._writer.add(_digested(tensor.pieces(), digest))
        return TensorEntry(tensor.name, "replace", tensor.dtype, tensor.shape, digest=digest.digest(), data=ref)

    def _add_terms(self, tensor: Tensor, base: BaseRef, pending: _Pending) -> TensorEntry:
        digest = blake3()
        terms = []
        for term in pending.terms:
            refs = {}
            for name, array in term.packed.items():
                digest.update(raw_bytes(term.codec.digested_form(name, array)))
                refs[name] = self._writer.add(raw_bytes(array))
            seed = pending.seed if term.layout.seeded else 0
            terms.append(Term(self._writer.layout_number(term.layout), term.layout, seed, refs, term.slots))
        new_rows = None
        base_bytes = c.byte_count(tensor.dtype, base.shape)
        if tensor.nbytes > base_bytes:
            new_rows = self._writer.add(_digested(tensor.pieces(base_bytes), digest))
        return TensorEntry(
            tensor.name, "add", tensor.dtype, tensor.shape, base, digest.digest(), new_rows, tuple(terms)
        )


def _digested(pieces: Iterator[memoryview], digest: blake3) -> Iterator[memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _warm_up(method: Method, per_thread: PerThread[Routines]) -> None:
    """Call every loop once, on a row of zeros that is read-only as a mapped tensor is."""
    raw = np.frombuffer(bytes(2 * NARROW_COLUMNS), np.uint16).reshape(1, -1)
    routines = per_thread.get()
    if method.whole:
        return
    compressed = method.compress(DeltaRows(raw, "BF16", raw, "BF16", 0, routines), 0)
    for layout, arrays in zip(method.layouts(*raw.shape), compressed, strict=True):
        codec = term_codec(layout, *raw.shape)
        codec.encode(arrays, blank(layout, *raw.shape), 0, routines.codec)


def _pack_rows(
    plan: Plan, method: Method, pending: _Pending, runs: list[tuple[int, int]], per_thread: PerThread[Routines]
) -> None:
    """Compress a batch of runs of rows into their slices of the packed arrays."""
    routines = per_thread.get()
    with _named_errors(plan.tensor), _run_of(plan, runs[0][0], runs[-1][1], routines) as batch:
        for first, last in runs:
            run = slice(first - batch.first, last - batch.first)
            rows = replace(batch, finetuned=batch.finetuned[run], base=batch.base[run], first=first)
            compressed = method.compress(rows, pending.seed)
            for term, arrays in zip(pending.terms, compressed, strict=True):
                term.codec.encode(arrays, term.packed, first, routines.codec)


def _pack_whole(
    plan: Plan, method: Method, pending: _Pending, per_thread: PerThread[Routines], moments: MomentFolder | None
) -> None:
    """Compress a whole matrix."""
    routines = per_thread.get()
    rows = plan.shared_rows
    with _named_errors(plan.tensor):
        with _run_of(plan, 0, rows, routines) as whole:
            hessian = None if moments is None else moments.get(plan.tensor.name)
            compressed = method.compress(replace(whole, hessian=hessian, notes=pending.notes), pending.seed)
        for least, arrays in zip(plan.layouts(), compressed, strict=True):
            layout, slots = fitted(least, arrays, plan.tensor.columns)
            seed = pending.seed if layout.seeded else 0
            codec = term_codec(layout, rows, plan.tensor.columns, seed, slots)
            term = _PackedTerm(layout, codec, blank(layout, *codec.shape, slots), slots)
            codec.encode(arrays, term.packed, 0, routines.codec)
            pending.terms.append(term)


@contextlib.contextmanager
def _run_of(plan: Plan, start: int, stop: int, routines: Routines) -> Iterator[DeltaRows]:
    """Map rows ``start`` to ``stop`` of a tensor and of its base."""
    tensor, base = plan.tensor, plan.base
    assert base is not None
    with tensor.row_range(start, stop) as mine, base.row_range(start, stop) as theirs:
        yield DeltaRows(mine, tensor.dtype, theirs, base.dtype, start, routines, tensor.name)


@contextlib.contextmanager
def _named_errors(tensor: Tensor) -> Iterator[None]:
    """Name the tensor in errors about it."""
    where = f'tensor "{tensor.name}"'
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{where}: {error}; {exact_hint(tensor.name)}") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
