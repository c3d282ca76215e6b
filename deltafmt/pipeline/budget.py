"""A method for every tensor, so that a file of a given size loses the least (docs/budgets.md).

Every candidate is tried on every tensor, and its loss measured (:mod:`deltafmt.pipeline.losses`). What a candidate
costs follows from shapes (:mod:`deltafmt.pipeline.sizes`), so the size of the file is known before it is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt import accel
from deltafmt.checkpoint.folder import Checkpoint, read_file
from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.format.constants import SECTION_ALIGNMENT
from deltafmt.methods import RTN, BitDelta, DeltaDQ, Method, Residual
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.method_routines import Routines, select_routines
from deltafmt.pipeline.allocate import Option, allocate, total_size
from deltafmt.pipeline.losses import measure
from deltafmt.pipeline.plan import Plan, Rule, exact_hint, file_metadata, make_plan, shared_bytes, tensor_seed
from deltafmt.pipeline.sizes import file_size, plan_layouts, tensor_size
from deltafmt.pipeline.workers import PerThread, Progress, drain, in_order, thread_count

# Attempts to use up what the sizes of single tensors leave of a target: sections and alignment are shared.
ROUNDS = 8
# What the loss of a matrix with a row for every token counts: whatever a model reads or says passes through it.
VOCABULARY_WEIGHT = 4.0
# Directions in which such a matrix moves all tokens that a fine-tune's texts do not have.
COMMON_DIRECTIONS = 2
# Candidates that are tried for all tensors to find the smallest file.
UNIFORM_TRIED = 4


class Hessians(Protocol):
    """Second moments of the inputs of matrices: a mapping, or what a calibration has gathered."""

    def get(self, name: str, /) -> NDArray[np.floating] | None:
        """Return those of a matrix, or None."""


def default_candidates() -> list[Method]:
    """Return the methods that are tried on every tensor unless candidates are given."""
    dropped = [
        *((1, 64, k) for k in (1, 2)),
        *((1, 32, k) for k in (1, 2, 4)),
        *((1, 16, k) for k in (1, 2, 4)),
        *((n, 16, k) for n in (2, 4, 8) for k in (1, 2, 3, 4)),
    ]
    tails = [(1, 64, 1), (1, 32, 1), (1, 16, 1), (1, 16, 2), (1, 8, 1), (1, 8, 2), (1, 4, 1), (1, 4, 2), (1, 2, 2)]
    return [
        *(DeltaDQ(n, m, k) for n, m, k in dropped),
        *(DeltaDQ(5, m, 2, share=1) for m in (128, 64)),
        *(DeltaDQ(n, 32, 2, share=1) for n in (3, 5, 7, 10, 14, 20, 30)),
        *(Residual(rank=rank, n=n, m=m, bits=k) for rank in (2, 4, 8, 16) for n, m, k in tails),
        *(Residual(rank, 4, n=5, m=64, bits=k, share=1) for rank in (2, 4, 8) for k in (1, 2)),
        *(
            Residual(rank, 4, n=n, m=32, bits=2, share=1)
            for rank, n in ((8, 3), (8, 5), (16, 5), (16, 9), (16, 16), (16, 25))
        ),
        *(Residual(rank, 3, n=5, m=64, bits=1, share=1) for rank in (16, 24, 32, 48)),
        BitDelta(),
        BitDelta("row"),
        *(RTN(k) for k in (1, 2, 3, 4, 6, 8)),
        *(RTN(k, scale_group=0) for k in (2, 3, 4)),
    ]


@dataclass(frozen=True, slots=True)
class Undecided(Method):
    """Stands for the method of a tensor until one is chosen."""

    name = "undecided"
    summary = "chosen for a target"
    calibration = "optional"

    def layouts(self, rows: int, columns: int) -> tuple[()]:  # noqa: ARG002 - nothing is known yet
        """Return no layout."""
        return ()

    def describe(self) -> str:
        """Return its name."""
        return self.name

    def compress(self, rows: DeltaRows, seed: int) -> tuple[()]:  # noqa: ARG002 - never packed
        """Return nothing."""
        return ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for one tensor.

    Attributes:
        plan: how it is packed.
        size: about what it takes in the file, bytes; 0 for what equals its base.
        loss: what that is predicted to lose.
    """

    plan: Plan
    size: int
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan for a whole file.

    Attributes:
        tensors: what is done with each, in order.
        size: bytes of the file; of a ``cold`` one at most.
        target: bytes that it may have.
        finetuned_bytes: of the fine-tune's weight files.
    """

    tensors: list[Chosen]
    size: int
    target: int
    finetuned_bytes: int

    @property
    def plans(self) -> list[Plan]:
        """How every tensor is packed."""
        return [chosen.plan for chosen in self.tensors]

    @property
    def loss(self) -> float:
        """The predicted loss of all tensors."""
        return math.fsum(chosen.loss for chosen in self.tensors)

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tune's weight files over bytes of the file."""
        return self.finetuned_bytes / self.size


def target_bytes(ratio: float | None, size: int | None, finetuned_bytes: int) -> int | None:
    """Return the bytes that a file may have, or None where no target is given.

    Raises:
        UsageError: two targets, or one that is no ratio above 1 or no size above 0.
    """
    if ratio is not None and size is not None:
        raise UsageError(f"a target ratio of {ratio:g} and a target size of {size:,} bytes: one of them decides")
    if ratio is not None:
        if not 1 < ratio < math.inf:
            raise UsageError(f"target ratio {ratio:g} is not a number above 1")
        return int(finetuned_bytes / ratio)
    if size is not None and size < 1:
        raise UsageError(f"target size {size} is not a number of bytes above 0")
    return size


def target_metadata(target: int) -> str:
    """Return what the file's metadata says of its method."""
    return f"target {target} bytes"


def plan_for_target(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    *,
    target_ratio: float | None = None,
    target_size: int | None = None,
    candidates: Sequence[Method] = (),
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    profile: str = "hot",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    hessians: Hessians | None = None,
) -> Choice:
    """Choose as :func:`deltafmt.pipeline.pack.pack` does for the same arguments, and write nothing.

    Raises:
        UsageError: as there, or no target.
    """
    with Checkpoint(base) as before, Checkpoint(finetuned) as after:
        target = target_bytes(target_ratio, target_size, after.file_bytes)
        if target is None:
            raise UsageError("a plan needs a target ratio or a target size")
        plans = make_plan(before, after, Undecided(), rules, include, exclude)
        choices = Choices((before, after), plans, candidates, profile, seed)
        choices.measure(thread_count(threads), progress, hessians)
        return choices.choose(target)


@dataclass(slots=True)
class _Item:
    """A tensor to be decided: the methods that it may have, the last of which is None, and what each gives."""

    number: int
    methods: list[Method | None]
    options: list[Option] = field(default_factory=list)


class Choices:
    """What every candidate costs and loses for every tensor of a pair.

    Args:
        sources: base and fine-tune.
        plans: of all tensors, :class:`Undecided` where there is a choice.
        candidates: methods to choose from; those of :func:`default_candidates` if empty.
        profile, seed: of the file.
        metadata: of the file, beside what every file has.

    Raises:
        UsageError: the size of a candidate depends on the delta, or it is not for this profile.
    """

    def __init__(
        self,
        sources: tuple[Checkpoint, Checkpoint],
        plans: Sequence[Plan],
        candidates: Sequence[Method],
        profile: str,
        seed: int,
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        before, self._finetuned = sources
        self._plans = list(plans)
        self._profile = profile
        self._seed = seed
        self._metadata = dict(metadata)
        self._vocabulary = self._finetuned.config().get("vocab_size")
        self._removed = sorted(set(before.tensors) - set(self._finetuned.tensors))
        self._files = {name: read_file(path) for name, path in self._finetuned.files.items()}
        self._unchanged = frozenset(
            plan.tensor.name for plan in plans if plan.base is not None and plan.alias is None and _same(plan)
        )
        several = list(candidates) or default_candidates()
        if profile == "hot":
            _check_hot(plans, several)
        self._items = [
            _Item(number, [*(_possible(plan, method) for method in several), None])
            for number, plan in enumerate(plans)
            if isinstance(plan.method, Undecided) and plan.tensor.name not in self._unchanged
        ]
        for number, plan in enumerate(plans):
            if plan.tensor.name in self._unchanged:
                self._plans[number] = replace(plan, method=None)

    def measure(self, threads: int, progress: Progress | None = None, hessians: Hessians | None = None) -> None:
        """Measure what every candidate loses of every tensor.

        Args:
            threads: worker threads.
            progress: called with a tensor's name and bytes as each is done.
            hessians: second moments of the inputs of matrices, by name, as far as there are any.

        Raises:
            NonFiniteError: a delta has NaN or infinity.
        """
        compiled = accel.worthwhile(sum(self._plans[item.number].tensor.nbytes for item in self._items))
        routines = PerThread(lambda: select_routines(compiled))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="deltafmt-measure")

        def submit(item: _Item) -> Future[list[float]]:
            plan = self._plans[item.number]
            hessian = hessians.get(plan.tensor.name) if hessians else None
            common = COMMON_DIRECTIONS if plan.tensor.rows == self._vocabulary else 0
            seed = tensor_seed(self._seed, plan.tensor.name)
            return pool.submit(_losses, plan, item.methods, seed, routines, hessian, common)

        def footprint(item: _Item) -> int:
            return 4 * self._plans[item.number].tensor.nbytes

        try:
            for item, losses in in_order(self._items, submit, footprint):
                plan = self._plans[item.number]
                weight = VOCABULARY_WEIGHT if plan.tensor.rows == self._vocabulary else 1.0
                sizes = [tensor_size(replace(plan, method=method), self._seed) for method in item.methods]
                item.options = [Option(size, weight * loss) for size, loss in zip(sizes, losses.result(), strict=True)]
                if progress:
                    progress(plan.tensor.name, plan.tensor.nbytes)
        finally:
            drain(pool)

    def choose(self, target: int, limit: int | None = None) -> Choice:
        """Return the plan of least predicted loss for a target.

        Args:
            target: bytes that the file may have.
            limit: bytes to plan for, where those of the target were found to be too many.

        Raises:
            UsageError: no plan is so small; names the smallest.
        """
        limit = target if limit is None else limit
        items = [item.options for item in self._items]
        smallest, least = self._smallest(target)
        if least > limit:
            ratio = self._finetuned.file_bytes / least
            reached = f"the least that the candidates reach is {least:,} bytes, {ratio:.2f} times smaller"
            raise UsageError(f"no plan fits {target:,} bytes: {reached}")
        best = smallest
        allowance = limit - least + total_size(items, smallest)
        tried: set[int] = set()
        while len(tried) < ROUNDS and allowance not in tried:
            tried.add(allowance)
            found = allocate(items, allowance)
            if found is None:
                break
            size = self._size(found, target)
            if size <= limit and self._loss(found) < self._loss(best):
                best = found
            allowance += limit - size - (SECTION_ALIGNMENT * len(tried) if size > limit else 0)
        for number in range(min(map(len, items), default=0)):
            uniform = [number] * len(items)
            if self._loss(uniform) < self._loss(best) and self._size(uniform, target) <= limit:
                best = uniform
        return self._choice(best, target)

    def _smallest(self, target: int) -> tuple[list[int], int]:
        """Return the smallest choice and its bytes; one layout for all takes less of the index than several."""
        items = [item.options for item in self._items]
        each = [min(range(len(options)), key=lambda i: (options[i].size, i)) for options in items]
        uniform = [[number] * len(items) for number in range(min(map(len, items), default=0))]
        uniform.sort(key=lambda numbers: total_size(items, numbers))
        sized = [(self._size(numbers, target), numbers) for numbers in [each, *uniform[:UNIFORM_TRIED]]]
        least, numbers = min(sized, key=lambda pair: pair[0])
        return numbers, least

    def _loss(self, numbers: Sequence[int]) -> float:
        return math.fsum(item.options[i].loss for item, i in zip(self._items, numbers, strict=True))

    def _decided(self, numbers: Sequence[int]) -> list[Plan]:
        plans = list(self._plans)
        for item, number in zip(self._items, numbers, strict=True):
            method = item.methods[number]
            reason = "chosen for the target" if method is None else ""
            plans[item.number] = replace(plans[item.number], method=method, reason=reason)
        return plans

    def _size(self, numbers: Sequence[int], target: int) -> int:
        metadata = file_metadata(target_metadata(target), self._seed, self._finetuned) | self._metadata
        return file_size(
            self._decided(numbers),
            self._unchanged,
            self._removed,
            self._files,
            metadata,
            profile=self._profile,
            seed=self._seed,
        )

    def _choice(self, numbers: Sequence[int], target: int) -> Choice:
        plans = self._decided(numbers)
        losses = {item.number: item.options[i].loss for item, i in zip(self._items, numbers, strict=True)}
        tensors = [
            Chosen(
                plan, 0 if plan.tensor.name in self._unchanged else tensor_size(plan, self._seed), losses.get(i, 0.0)
            )
            for i, plan in enumerate(plans)
        ]
        return Choice(tensors, self._size(numbers, target), target, self._finetuned.file_bytes)


def _check_hot(plans: Sequence[Plan], candidates: Sequence[Method]) -> None:
    """Refuse candidates that only a cold file can have.

    Raises:
        UsageError: names the candidate.
    """
    for plan in plans:
        if isinstance(plan.method, Undecided):
            for method in candidates:
                possible = _possible(plan, method)
                if possible and any(layout.cold_only for layout in plan_layouts(replace(plan, method=possible))):
                    raise UsageError(f"candidate {method.describe()!r} has a rank index, which needs --profile cold")


def _possible(plan: Plan, method: Method) -> Method | None:
    """Return a candidate, or None where a tensor cannot have it or would be kept exactly under it, being smaller."""
    tensor, base = plan.tensor, plan.base
    assert base is not None
    rows = plan.shared_rows
    try:
        method.layouts(rows, tensor.columns)
    except UsageError:
        return None
    layouts = plan_layouts(replace(plan, method=method))
    packed = sum(sum(layout.buffer_lengths(rows, tensor.columns).values()) for layout in layouts)
    return method if packed < shared_bytes(tensor, base) else None


def _losses(
    plan: Plan,
    methods: Sequence[Method | None],
    seed: int,
    per_thread: PerThread[Routines],
    hessian: NDArray[np.floating] | None,
    common: int,
) -> list[float]:
    name = plan.tensor.name
    try:
        return measure(plan, methods, seed, per_thread.get(), hessian, common)
    except NonFiniteError as error:
        raise NonFiniteError(f'tensor "{name}": the delta has NaN or infinity; {exact_hint(name)}') from error


def _same(plan: Plan) -> bool:
    return plan.base is not None and plan.tensor.equals(plan.base)
