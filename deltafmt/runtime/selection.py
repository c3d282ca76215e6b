"""Which delta each row of a batch uses, for as long as a ``with`` block lasts.

Rows follow each other in the order of the names. A forward may have several rows for each name (beams, samples), which
then stand side by side, as transformers repeats them; and a module may see rows cut into tokens or flattened. In all
these cases the first dimension, or the product of the leading ones, is a multiple of the number of names, and equal
shares of it belong to each name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.segments import Segments

T = TypeVar("T")

BASE = -1
_KEPT = 8  # sizes of a batch in tokens for which things are kept: prefill, decoding and what lies between


@dataclass(slots=True, eq=False)
class Waiting:
    """Outputs that wait for their modules to be called with the tensor from which they come."""

    given: torch.Tensor
    version: int
    outputs: dict[int, torch.Tensor]


class Selection:
    """The slots of the rows of a batch.

    Args:
        slots: each row's slot; -1 for the base alone.
        count: slots that the operand tables have.
        device: of the model.

    Attributes:
        slots: the same, or one slot for all rows, if they are equal: then it doesn't matter which row is which.
        used: the slots that occur, without -1.
        rows, tokens: of the batch that the model was last called with; 0 before.
        stash: what a module's hook before the forward leaves for the one after it.
        waiting: outputs that were computed ahead.
        multiplied: modules whose output has the products already.
    """

    def __init__(self, slots: Sequence[int], count: int, device: torch.device) -> None:
        self.slots = tuple(slots) if len(set(slots)) > 1 else tuple(slots[:1])
        self.count = count
        self.device = device
        self.used = frozenset(slots) - {BASE}
        self.rows = self.tokens = 0
        self.stash: dict[int, torch.Tensor] = {}
        self.waiting: Waiting | None = None
        self.multiplied: set[int] = set()
        self._names = len(slots)
        self._row_slots = torch.tensor(self.slots, dtype=torch.int32).to(device)
        self._memo: dict[Hashable, object] = {}
        self._segments: dict[int, Segments] = {}

    @property
    def uniform(self) -> bool:
        """Whether all rows use the same slot."""
        return len(self.slots) == 1

    def enter(self, rows: int, tokens: int, where: str) -> None:
        """Note the rows and tokens of the batch that the model is called with.

        Raises:
            UsageError: the names do not divide them.
        """
        if rows % self._names:
            raise UsageError(f"{self._names} names of deltas do not divide the {rows} rows that {where} is given")
        self.rows, self.tokens = rows, tokens

    def check(self, shape: Sequence[int], where: str) -> None:
        """Refuse a module's input whose rows are not those of the batch, where it matters which is which.

        Raises:
            UsageError: they are not.
        """
        if not self.uniform and shape[0] not in (self.rows, self.tokens):
            raise mixed_error(where, shape)

    def share(self, size: int, where: str) -> int:
        """Return how many of ``size`` rows or tokens belong to each slot.

        Raises:
            UsageError: the names do not divide them.
        """
        if size % len(self.slots):
            raise UsageError(f"{len(self.slots)} names of deltas do not divide the {size} rows of {where}")
        return size // len(self.slots)

    def segments(self, tokens: int, where: str) -> Segments:
        """Return the tokens by slot; made once for each number of tokens."""
        if tokens not in self._segments:
            if len(self._segments) == _KEPT:
                self._segments.pop(next(iter(self._segments)))
            each = self.share(tokens, where)
            lengths = {slot: each * self.slots.count(slot) for slot in self.used}
            slots = self._row_slots[:, None].expand(-1, each).reshape(-1)
            self._segments[tokens] = Segments(slots, self.count, lengths)
        return self._segments[tokens]

    def members(self, slot: int, size: int, where: str) -> torch.Tensor | slice:
        """Return which of ``size`` rows or tokens use a slot that is in use."""
        if self.uniform:
            return slice(None)

        def build() -> torch.Tensor:
            each = self.share(size, where)
            rows = torch.tensor([row for row, found in enumerate(self.slots) if found == slot], dtype=torch.long)
            return (rows[:, None] * each + torch.arange(each)).reshape(-1).to(self.device)

        return self.memo(("members", slot, size), build)

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return what was built for a key before, or build it."""
        if key not in self._memo:
            if len(self._memo) > 4096:
                self._memo.clear()
            self._memo[key] = build()
        return cast("T", self._memo[key])


def mixed_error(where: str, shape: Sequence[int]) -> UsageError:
    """Return the error for a module whose input cannot be told apart by rows."""
    return UsageError(
        f"{where} is given the shape {list(shape)}, which does not follow the batch's rows; "
        "such a model serves one delta at a time"
    )
