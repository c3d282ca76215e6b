"""The alternatives of every tensor: which candidates it can have, how many bytes each takes, what each loses.

What a candidate takes follows from shapes (:mod:`deltafmt.pipeline.sizes`), so the size of the file is known before the
file is written. What a candidate loses is measured on the tensor itself (:mod:`deltafmt.pipeline.losses`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import NonFiniteError, Remedy, UsageError
from deltafmt.format.constants import SECTION_ALIGNMENT
from deltafmt.index.sections import DIGEST_BYTES
from deltafmt.methods.base import Method
from deltafmt.pipeline.allocate import Alternative, allocate, total_size
from deltafmt.pipeline.choice import Choice, Chosen
from deltafmt.pipeline.job import PackJob
from deltafmt.pipeline.losses import foretell, look_at, measure, tuned
from deltafmt.pipeline.plan import Plan, least_bytes, not_finite, shared_bytes, tensor_seed
from deltafmt.pipeline.sizes import TensorSizes, file_size, plan_layouts, promised_layouts, tensor_size
from deltafmt.pipeline.summary import times
from deltafmt.pipeline.workers import Progress, in_order, worker_pool

# Attempts to use up the bytes that a plan leaves. Tensors share sections and alignment, so their sizes do not add up.
ROUNDS = 8
# How often the loss of a matrix with a row for every token counts, for each layer of the model and without knowing how
# many: whatever a model reads or says passes through it, and one of many layers errs beside the others.
VOCABULARY_WEIGHT_OF_LAYER = 1.2
VOCABULARY_WEIGHT = 10.0
# Strongest directions of such a matrix's delta to leave out. Fine-tuning moves all tokens absent from its texts alike.
COMMON_DIRECTIONS = 2
# Candidates that are tried for all tensors to find the smallest file.
UNIFORM_TRIED = 4


class Hessians(Protocol):
    """Second moments of the matrices' inputs: a mapping by name, or the folder that a calibration has filled."""

    def get(self, name: str, /) -> NDArray[np.floating] | None:
        """Return the second moments of a matrix's inputs, or None."""


@dataclass(slots=True)
class _Item:
    """A tensor to decide: the methods that it may have, and the size and loss of each; None stores it whole."""

    number: int
    methods: list[Method | None]
    alternatives: list[Alternative] = field(default_factory=list)


class Alternatives:
    """The alternatives of all tensors of a job that are undecided.

    Args:
        job: what will be packed; tensors whose plans are ``undecided`` have a choice.
        candidates: the methods to choose from. Keeping a tensor exactly is always an alternative too.
        metadata: the file's metadata; that of the job if not given.

    Raises:
        UsageError: the size of a candidate depends on the delta, or the job's profile does not allow the candidate.
    """

    def __init__(self, job: PackJob, candidates: Sequence[Method], metadata: Mapping[str, str] | None = None) -> None:
        self._job = job
        self._metadata = job.metadata() if metadata is None else dict(metadata)
        config = job.finetuned.config()
        self._vocabulary = config.get("vocab_size")
        layers = config.get("num_hidden_layers")
        self._vocabulary_weight = VOCABULARY_WEIGHT
        if isinstance(layers, int) and layers > 0:
            self._vocabulary_weight = VOCABULARY_WEIGHT_OF_LAYER * layers
        self._removed = job.removed()
        self._files = {name: job.finetuned.attachment(name) for name in job.finetuned.files}
        self._scaled = {name: tensor.describe(bytes(DIGEST_BYTES)) for name, tensor in job.scaled().items()}
        self._unchanged = frozenset(plan.tensor.name for plan in job.plans if plan.alias is None and _is_same(plan))
        if job.profile == "hot":
            _check_hot(job.plans, candidates)
        # Plans as far as they are decided: a tensor that equals its base has no choice.
        self._plans = [plan.decided(None) if plan.tensor.name in self._unchanged else plan for plan in job.plans]
        self._items = [
            _Item(number, [*(_possible(plan, method) for method in candidates), None])
            for number, plan in enumerate(self._plans)
            if plan.undecided
        ]

    def measure(self, threads: int, progress: Progress | None = None, hessians: Hessians | None = None) -> None:
        """Measure the loss of every candidate for every tensor.

        Args:
            threads: worker threads.
            progress: called with a tensor's name and bytes as each is done.
            hessians: second moments of the matrices' inputs, by name; matrices without any are measured without.

        Raises:
            NonFiniteError: a delta has NaN or infinity.
        """
        sizes = TensorSizes(self._job.seed)
        with worker_pool(threads, "measure") as pool:

            def submit(item: _Item) -> Future[list[tuple[Method | None, float]]]:
                plan = self._plans[item.number]
                hessian = hessians.get(plan.tensor.name) if hessians else None
                common = COMMON_DIRECTIONS if plan.tensor.rows == self._vocabulary else 0
                seed = tensor_seed(self._job.seed, plan.tensor.name)
                return pool.submit(_losses, plan, item.methods, seed, hessian, common)

            def footprint(item: _Item) -> int:
                return 4 * self._plans[item.number].tensor.nbytes

            for item, found in in_order(self._items, submit, footprint):
                plan = self._plans[item.number]
                weight = self._vocabulary_weight if plan.tensor.rows == self._vocabulary else 1.0
                item.alternatives = [
                    Alternative(sizes.of(plan.decided(method)), weight * loss)
                    for method, (_, loss) in zip(item.methods, found.result(), strict=True)
                ]
                item.methods = [method for method, _ in found.result()]
                if progress:
                    progress(plan.tensor.name, plan.tensor.nbytes)

    def keep_whole(self, name: str) -> None:
        """Leave a tensor, whose losses are measured, no alternative but to be stored whole."""
        (item,) = (item for item in self._items if self._plans[item.number].tensor.name == name)
        whole = item.alternatives[item.methods.index(None, len(item.methods) - 1)]
        item.methods = [None] * len(item.methods)
        item.alternatives = [whole] * len(item.methods)

    def choose(self, target: int, limit: int | None = None) -> Choice:
        """Return the plan with the least predicted loss for a target.

        Args:
            target: bytes that the file may have.
            limit: bytes to plan for, if a file planned for the target came out too large.

        Raises:
            UsageError: no plan is small enough; names the size of the smallest.
        """
        limit = target if limit is None else limit
        items = [item.alternatives for item in self._items]
        smallest, least = self._smallest()
        if least > limit:
            ratio = self._job.finetuned.file_bytes / least
            reached = f"the least that the candidates reach is {least:,} bytes, {times(ratio)}"
            raise UsageError(f"no plan fits {target:,} bytes: {reached}")
        best = smallest
        allowance = limit - least + total_size(items, smallest)
        tried: set[int] = set()
        while len(tried) < ROUNDS and allowance not in tried:
            tried.add(allowance)
            found = allocate(items, allowance)
            if found is None:
                break
            size = self._size(found)
            if size <= limit and self._loss(found) < self._loss(best):
                best = found
            allowance += limit - size - (SECTION_ALIGNMENT * len(tried) if size > limit else 0)
        for number in range(min(map(len, items), default=0)):
            uniform = [number] * len(items)
            if self._loss(uniform) < self._loss(best) and self._size(uniform) <= limit:
                best = uniform
        return self._choice(best, target)

    def _smallest(self) -> tuple[list[int], int]:
        """Return the smallest choice and its bytes; a file with one layout for all tensors has a smaller index."""
        items = [item.alternatives for item in self._items]
        each = [min(range(len(several)), key=lambda i: (several[i].size, i)) for several in items]
        uniform = [[number] * len(items) for number in range(min(map(len, items), default=0))]
        uniform.sort(key=lambda numbers: total_size(items, numbers))
        sized = [(self._size(numbers), numbers) for numbers in [each, *uniform[:UNIFORM_TRIED]]]
        least, numbers = min(sized, key=lambda pair: pair[0])
        return numbers, least

    def _loss(self, numbers: Sequence[int]) -> float:
        return math.fsum(item.alternatives[i].loss for item, i in zip(self._items, numbers, strict=True))

    def _decided(self, numbers: Sequence[int]) -> list[Plan]:
        plans = list(self._plans)
        for item, number in zip(self._items, numbers, strict=True):
            method = item.methods[number]
            plans[item.number] = plans[item.number].decided(method, "chosen for the target" if method is None else "")
        return plans

    def _size(self, numbers: Sequence[int]) -> int:
        return file_size(
            self._decided(numbers),
            self._unchanged,
            self._removed,
            self._files,
            self._metadata,
            profile=self._job.profile,
            seed=self._job.seed,
            scaled=self._scaled or None,
            parent=self._job.parent,
        )

    def _choice(self, numbers: Sequence[int], target: int) -> Choice:
        losses = {item.number: item.alternatives[i].loss for item, i in zip(self._items, numbers, strict=True)}
        tensors = []
        for number, plan in enumerate(self._decided(numbers)):
            size = 0 if plan.tensor.name in self._unchanged else tensor_size(plan, self._job.seed)
            tensors.append(Chosen(plan, size, losses.get(number, 0.0)))
        return Choice(tensors, self._size(numbers), target, self._job.finetuned.file_bytes)


def _check_hot(plans: Sequence[Plan], candidates: Sequence[Method]) -> None:
    """Refuse candidates that only a cold file can have.

    Raises:
        UsageError: names the candidate.
    """
    for plan in plans:
        if plan.undecided:
            for method in candidates:
                possible = _possible(plan, method)
                if possible and any(layout.cold_only for layout in plan_layouts(plan.decided(possible))):
                    text = f"candidate {method.spelling()!r} has a rank index, which a hot file cannot have"
                    raise UsageError(text, Remedy("profile", "cold"))


def _possible(plan: Plan, method: Method) -> Method | None:
    """Return a candidate, or None if the tensor cannot have it or would be no larger if stored whole."""
    tensor, base = plan.tensor, plan.base
    assert base is not None
    rows = plan.shared_rows
    try:
        packed = least_bytes(method, rows, tensor.columns)
    except UsageError:
        return None
    promised_layouts(method, rows, tensor.columns)
    return method if packed < shared_bytes(tensor, base) else None


def _losses(
    plan: Plan,
    methods: Sequence[Method | None],
    seed: int,
    hessian: NDArray[np.floating] | None,
    common: int,
) -> list[tuple[Method | None, float]]:
    """Return the methods with the gains that fit a tensor, and the loss of each."""
    try:
        sample = look_at(plan, methods, common)
        fitting = tuned(sample, methods)
        if hessian is None:
            losses = foretell(plan, fitting, seed, common, sample)
        else:
            losses = measure(plan, fitting, seed, hessian, common, sample)
        return list(zip(fitting, losses, strict=True))
    except NonFiniteError as error:
        raise not_finite(plan.tensor.name, "the delta has NaN or infinity") from error


def _is_same(plan: Plan) -> bool:
    return plan.base is not None and plan.tensor.equals(plan.base)
