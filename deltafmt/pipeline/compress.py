"""The deltas of many tensors, compressed by several threads.

A method that takes runs of rows gets batches of them, and each thread fills its rows of the packed arrays. A method
that needs the whole matrix gets it in one piece. Results come back in the order of the plans, and do not depend on the
number of threads.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np

from deltafmt.checkpoint.held_tensor import HeldTensor
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import BATCH_ELEMENTS, row_ranges
from deltafmt.errors import InvalidFileError, NonFiniteError, Remedy, UsageError
from deltafmt.exact.coding import EncodedChunk, assemble
from deltafmt.index.entries import BaseRef
from deltafmt.methods.base import DeltaRows, Method, PackedTerm
from deltafmt.methods.exact import Exact
from deltafmt.pipeline.entry_writer import TermBytes, base_ref, packed_bytes
from deltafmt.pipeline.exact_tensors import ChunkPacker, ExactBytes
from deltafmt.pipeline.file_hashes import FileHashes
from deltafmt.pipeline.job import PackJob
from deltafmt.pipeline.plan import Plan, not_finite, shared_bytes, tensor_seed
from deltafmt.pipeline.workers import in_order
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.floats import Raw, add, widen
from deltafmt.terms.layout import TermLayout

# Compressing a whole matrix takes float32 arrays of its size: so many bytes for each byte of a fine-tuned BF16 tensor.
WHOLE_FACTOR = 8

# Bytes that solving for a whole matrix takes for each element of its inputs' second moments.
HESSIAN_BYTES = 40

# The largest finite element of a dtype.
_LARGEST = {"F16": 65504.0, "BF16": 3.3895314e38, "F32": 3.4028235e38}

# A tensor of so few bytes is compressed in the thread that writes the file.
SMALL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Compressed:
    """What has become of one tensor.

    Attributes:
        base: the identity of the base tensor, for a tensor that is the same or has terms; otherwise None.
        terms: the terms of the delta; empty for a tensor that is the same or is stored whole.
        notes: remarks of the method.
        exact: the chunks of an exact tensor; None for others.
    """

    base: BaseRef | None = None
    terms: tuple[TermBytes, ...] = ()
    notes: tuple[str, ...] = ()
    exact: ExactBytes | None = None


Result = TypeVar("Result")
Given_co = TypeVar("Given_co", covariant=True)


class Handle(Protocol[Given_co]):
    """What a call that is under way is known by: a future, or :class:`Later`."""

    def result(self) -> Given_co:
        """Return the call's result, or raise its error."""

    def cancel(self) -> bool:
        """Ask not to make the call."""


class Later(Generic[Result]):
    """A call that is made once its result is asked for, in the thread that asks.

    For a small tensor, handing work to another thread takes longer than the work.
    """

    __slots__ = ("_args", "_call", "_found")

    def __init__(self, call: Callable[..., Result], args: tuple[Any, ...]) -> None:
        self._call: Callable[..., Result] | None = call
        self._args = args
        self._found: Result | None = None

    def result(self) -> Result:
        """Make the call, unless it is made already, and return its result."""
        if self._call is not None:
            self._found, self._call = self._call(*self._args), None
        return cast("Result", self._found)

    def cancel(self) -> bool:
        """Do nothing: a call whose result nobody asks for is never made."""
        return True


class OverflowingError(NonFiniteError):
    """Finite elements of a tensor would come back as infinity or NaN.

    Attributes:
        tensor: the tensor's name.
    """

    tensor: str = ""


class TensorWork(Protocol):
    """The work on one tensor that is under way."""

    def result(self) -> Compressed:
        """Wait for the work, and return what has become of the tensor, or raise its error."""


@dataclass(slots=True)
class _Work:
    """The work on one tensor: futures of its parts, and the terms that the parts fill.

    Attributes:
        plan: how it is packed.
        seed: its seed.
        restored: True if an exact part restores what the terms lose.
        same: whether it equals its base.
        fingerprint: that of its base.
        parts: what fills the terms.
        terms: the terms.
        notes: remarks of the method.
        lost: row, column and value of the first element of each batch that comes back as infinity.
    """

    plan: Plan
    seed: int
    restored: bool = False
    same: Handle[bool] | None = None
    fingerprint: Handle[bytes] | None = None
    parts: list[Handle[None]] = field(default_factory=list)
    terms: list[PackedTerm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: list[tuple[int, int, float]] = field(default_factory=list)

    def new_term(self, layout: TermLayout, slots: int = 0) -> PackedTerm:
        """Add a term of zeros."""
        seed = self.seed if layout.seeded else 0
        codec = term_codec(layout, self.plan.shared_rows, self.plan.tensor.columns, seed, slots)
        self.terms.append(PackedTerm(codec, blank(layout, *codec.shape, slots)))
        return self.terms[-1]

    def result(self) -> Compressed:
        """Wait for the parts, and return what has become of the tensor."""
        tensor, base = self.plan.tensor, self.plan.base
        if base is None or self.same is None:
            return Compressed()
        if self.same.result():
            for part in self.parts:
                part.cancel()
            return Compressed(self._base_ref(base))
        for part in self.parts:
            part.result()
        packed = sum(array.nbytes for term in self.terms for array in term.packed.values())
        notes = tuple(self.notes)
        if not self.terms or packed >= shared_bytes(tensor, base):
            return Compressed(notes=notes)
        if self.lost:
            notes = *notes, self._overflow()
        terms = tuple(packed_bytes(term.codec, term.packed) for term in self.terms)
        return Compressed(self._base_ref(base), terms, notes)

    def _overflow(self) -> str:
        """Return the remark that an element comes back as infinity until the exact part is read.

        Raises:
            OverflowingError: there is no exact part.
        """
        row, column, value = min(self.lost)
        where = f"its element {value:g} at row {row}, column {column}"
        if self.restored:
            return f"{where} is infinite or NaN where it is served; the exact part restores it"
        name, dtype = self.plan.tensor.name, self.plan.tensor.dtype
        text = f'tensor "{name}": {where} would come back as infinity or NaN in {dtype}'
        error = OverflowingError(text, Remedy("exclude", glob.escape(name)))
        error.tensor = name
        raise error

    def _base_ref(self, base: Tensor) -> BaseRef:
        digest = base.fingerprint() if self.fingerprint is None else self.fingerprint.result()
        return base_ref(base, digest, self.plan.tensor.name)


@dataclass(slots=True)
class _ExactWork:
    """The work on one exact tensor: futures of its chunks."""

    plan: Plan
    packer: ChunkPacker
    chunks: list[Handle[EncodedChunk]]

    def result(self) -> Compressed:
        """Wait for the parts, and return what has become of the tensor."""
        tensor, base = self.plan.tensor, self.plan.base
        pieces = assemble([chunk.result() for chunk in self.chunks])
        mine, theirs = self.packer.digests()
        reference = None if base is None or theirs is None else base_ref(base, theirs, tensor.name)
        # A fingerprint covers dtype and shape, too.
        if mine == theirs:
            return Compressed(reference)
        return Compressed(reference, exact=ExactBytes(pieces, mine))


class Compressor:
    """Compress the tensors of a job in worker threads.

    Args:
        job: what is packed.
        pool: the worker threads, which several jobs may share.
        files: take the digests of the fine-tune's weight files.
    """

    def __init__(self, job: PackJob, pool: ThreadPoolExecutor, files: FileHashes) -> None:
        self._job = job
        self._pool = pool
        self._files = files

    def results(self, plans: Sequence[Plan]) -> Iterator[tuple[Plan, Compressed]]:
        """Give plans of the job with what has become of their tensors, in order.

        Raises:
            NonFiniteError: a delta has NaN or infinity; names the tensor.
            UsageError: a method cannot have a tensor; names the tensor.
        """
        for plan, work in in_order(plans, self.submit, self.footprint):
            yield plan, work.result()

    def submit(self, plan: Plan) -> TensorWork:
        """Start the work on one tensor; its result may raise what :meth:`results` raises."""
        tensor, base, method = plan.tensor, plan.base, plan.method
        if isinstance(method, Exact) and plan.alias is None:
            return self._submit_exact(plan, method)
        work = _Work(plan, tensor_seed(self._job.seed, tensor.name), self._job.progressive)
        tensor.will_need()
        if plan.alias is not None or base is None:
            return work
        small = max(tensor.nbytes, base.nbytes) <= SMALL_BYTES
        work.same = self._begin(small, tensor.equals, base)
        if method is None:
            return work
        work.fingerprint = self._begin(small, base.fingerprint)
        if method.whole:
            work.parts.append(self._begin(small, self._compress_whole, work, method))
            return work
        terms = [work.new_term(layout) for layout in plan.layouts()]
        width = max(term.codec.width for term in terms)
        step = max(term.codec.run_rows for term in terms)
        for start, stop in row_ranges(0, plan.shared_rows, width, step, BATCH_ELEMENTS):
            work.parts.append(self._begin(small, _compress_rows, work, method, start, stop))
        return work

    def _submit_exact(self, plan: Plan, method: Exact) -> _ExactWork:
        """Start the work on one exact tensor."""
        tensor, base = plan.tensor, plan.base
        tensor.will_need()
        small = max(tensor.nbytes, 0 if base is None else base.nbytes) <= SMALL_BYTES
        # Work on small tensors begins in no order.
        packer = ChunkPacker(tensor, base, method.level, None if small else self._files.expect(tensor))
        if isinstance(base, HeldTensor):
            self._begin(small, base.fingerprint)  # it is kept, and ready when it is asked for
        return _ExactWork(plan, packer, [self._begin(small, packer.encode, number) for number in range(len(packer))])

    def _begin(self, small: bool, call: Callable[..., Result], *args: Any) -> Handle[Result]:
        """Hand a call to a worker thread, or keep it for later if the tensor is small."""
        return Later(call, args) if small else self._pool.submit(call, *args)

    def footprint(self, plan: Plan) -> int:
        """Return the bytes of memory that a tensor counts for while work on it is under way."""
        if plan.method is None or not plan.method.whole:
            return plan.tensor.nbytes
        moments = self._job.moments
        solved = moments is not None and moments.has(plan.tensor.name)
        hessian = HESSIAN_BYTES * plan.tensor.columns**2 if solved else 0
        return plan.tensor.nbytes * WHOLE_FACTOR + hessian

    def _compress_whole(self, work: _Work, method: Method) -> None:
        """Compress a whole matrix, which may decide the number of a term's vectors or slots."""
        plan, moments = work.plan, self._job.moments
        with _named_errors(plan.tensor), _mapped_rows(plan, 0, plan.shared_rows) as whole:
            hessian = None if moments is None else moments.get(plan.tensor.name)
            compressed = method.compress(replace(whole, hessian=hessian, notes=work.notes), work.seed)
            for planned, arrays in zip(plan.layouts(), compressed, strict=True):
                term = work.new_term(*fitted(planned, arrays, plan.tensor.columns))
                term.codec.encode(arrays, term.packed, 0)
            del compressed
            _check_range(whole, method, work)


def _compress_rows(work: _Work, method: Method, start: int, stop: int) -> None:
    """Compress a batch of rows into its part of the packed arrays."""
    with _named_errors(work.plan.tensor), _mapped_rows(work.plan, start, stop) as batch:
        method.pack(batch, work.seed, work.terms)
        _check_range(batch, method, work)


def _check_range(rows: DeltaRows, method: Method, work: _Work) -> None:
    """Note the first element that comes back as infinity or NaN from the terms, though the fine-tune's is finite.

    A delta is not exact: an element of 65504 in F16 may come back as infinity. Rows are decoded only where elements are
    so large that it is possible.

    Args:
        rows: rows that the terms have.
        method: what compressed them.
        work: has the terms; takes the element.

    Raises:
        NonFiniteError: a term itself holds infinity.
    """
    dtype = rows.finetuned_dtype
    before = _largest(rows.base, rows.base_dtype)
    if before + method.reach * (before + _largest(rows.finetuned, dtype)) <= _LARGEST[dtype] or not work.terms:
        return
    codecs = [term.codec for term in work.terms]
    width, step = max(codec.width for codec in codecs), max(codec.run_rows for codec in codecs)
    for start, stop in row_ranges(rows.first, rows.first + rows.shape[0], width, step):
        run = rows.run(start, stop)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                total = work.terms[0].codec.decode(work.terms[0].packed, start, stop)
                for term in work.terms[1:]:
                    total = total + term.codec.decode(term.packed, start, stop)
        except InvalidFileError as error:
            raise NonFiniteError(f"its delta is too large for the method: {error}") from error
        found = widen(add(run.base, run.base_dtype, total, dtype), dtype)
        if not np.isfinite(found).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(found))[0])
            work.lost.append((start + row, column, float(widen(run.finetuned[row : row + 1], dtype)[0, column])))
            return


def _largest(raw: Raw, dtype: str) -> float:
    """Return the largest magnitude of a raw array; 0 of none. Magnitudes of each sign are ordered as their bits are."""
    if not raw.size:
        return 0.0
    bits = np.array([raw.max(), raw.view(f"<i{raw.itemsize}").max()]).astype(raw.dtype)
    return float(np.abs(widen(bits, dtype)).max())


@contextlib.contextmanager
def _mapped_rows(plan: Plan, start: int, stop: int) -> Iterator[DeltaRows]:
    """Map rows ``start`` to ``stop`` of a tensor and of its base."""
    tensor, base = plan.tensor, plan.base
    assert base is not None
    with tensor.row_range(start, stop) as mine, base.row_range(start, stop) as theirs:
        yield DeltaRows(mine, tensor.dtype, theirs, base.dtype, start, tensor.name)


@contextlib.contextmanager
def _named_errors(tensor: Tensor) -> Iterator[None]:
    """Name the tensor in errors about it."""
    try:
        yield
    except NonFiniteError as error:
        raise not_finite(tensor.name, str(error)) from error
    except UsageError as error:
        raise error.located(f'tensor "{tensor.name}"') from error
