"""The selection: which delta each row of a batch uses, within one ``with`` block.

Rows follow each other in the order of the names. While it generates, a model may have several rows for each name
(beams, samples); they stand side by side, as transformers repeats them. A module may also see rows as tokens, or
flattened. In all these cases the first dimension, or the product of the leading ones, is a multiple of the number of
names, and each name has an equal share of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.segments import Segments, is_captured

T = TypeVar("T")

BASE = -1
_KEPT = 8  # numbers of tokens whose segments are kept: prefill, decoding and a few in between


@dataclass(slots=True, eq=False)
class Waiting:
    """Outputs that were computed ahead; each waits until its module is called with the same input.

    Attributes:
        given: the input.
        version: the input's version when the outputs were computed.
        outputs: the outputs by the site's id.
    """

    given: torch.Tensor
    version: int
    outputs: dict[int, torch.Tensor]


class Selection:
    """The slots of the rows of a batch.

    Args:
        slots: each row's slot in the operand tables; -1 for the base alone; a lower number for a sum with weights.
        count: the number of slots of the operand tables.
        device: the model's device.
        each: True if there is a slot for each row; False if the only slot is for any number of rows.
        mixes: the slots and weights of each sum, by its number.

    Attributes:
        packed: True if the batch is one row with the tokens of several requests.
        slots: each row's slot; or a single slot, if all rows have the same one.
        used: the slots that occur, without negative ones.
        mixes: the slots and weights of each sum, by its number.
        touched: the slots that occur, alone or in a sum.
        rows, tokens: the size of the batch that the model was last called with; the names and 0 before the first call.
        copies: how many rows side by side the model may be given for each name; set while it generates.
        stash: tensors that a module's hook before the forward leaves for its hook after it, by the site's id.
        waiting: outputs that were computed ahead.
        multiplied: the ids of the sites whose output contains the deltas' products already.
    """

    packed = False

    def __init__(
        self,
        slots: Sequence[int],
        count: int,
        device: torch.device,
        *,
        each: bool = False,
        mixes: Mapping[int, tuple[tuple[int, float], ...]] | None = None,
    ) -> None:
        self.slots = tuple(slots) if len(set(slots)) > 1 else tuple(slots[:1])
        self.count = count
        self.device = device
        self.used = frozenset(slot for slot in slots if slot >= 0)
        self.mixes = dict(mixes or {})
        self.touched = self.used.union(slot for terms in self.mixes.values() for slot, _ in terms)
        self.rows, self.tokens = (len(slots) if each else 0), 0
        self.copies = frozenset((1,))
        self.stash: dict[int, torch.Tensor] = {}
        self.waiting: Waiting | None = None
        self.multiplied: set[int] = set()
        self._each = each
        self._names = len(slots)
        self._row_slots = torch.tensor([max(slot, BASE) for slot in self.slots], dtype=torch.int32).to(device)
        self._alone: dict[int, Selection] = {}
        self._memo: dict[Hashable, object] = {}
        self._segments: dict[int, Segments] = {}
        self._captured: set[int] = set()

    @property
    def uniform(self) -> bool:
        """True if all rows use the same slot."""
        return len(self.slots) == 1

    def enter(self, rows: int, tokens: int, where: str, *, root: bool = False) -> None:
        """Note the rows and tokens of the batch that the model, or a model inside it, is called with.

        Args:
            rows, tokens: the size of the batch.
            where: the model's class, for the message.
            root: True for the model itself, which has a row for each name; False for a model inside it.

        Raises:
            UsageError: the rows are not those that the caller named.
        """
        if root and self._each and rows not in {self._names * copies for copies in self.copies}:
            raise rows_error(where, rows, self._names)
        if rows % self._names:
            raise UsageError(
                f"{where} is given {rows} rows, which is not a multiple of the {self._names} names of deltas"
            )
        self.rows, self.tokens = rows, tokens

    def check(self, shape: Sequence[int], where: str) -> None:
        """Refuse a module's input whose first dimension is neither the batch's rows nor its tokens.

        If all rows use the same slot, any shape will do.

        Raises:
            UsageError: the rows of the input cannot be told apart.
        """
        if not self.uniform and shape[0] not in (self.rows, self.tokens):
            raise mixed_error(where, shape)

    def alone(self, slot: int) -> Selection:
        """Return the selection of one slot for all rows of the same batch."""
        found = self._alone.get(slot)
        if found is None:
            found = self._alone[slot] = Selection([slot], self.count, self.device)
        found.rows, found.tokens = self.rows, self.tokens
        return found

    def share(self, size: int, where: str) -> int:
        """Return how many of ``size`` rows or tokens belong to each name.

        Raises:
            UsageError: ``size`` is not a multiple of the number of names.
        """
        if size % len(self.slots):
            raise UsageError(
                f"{where} has {size} rows, which is not a multiple of the {len(self.slots)} names of deltas"
            )
        return size // len(self.slots)

    def segments(self, tokens: int, where: str) -> Segments:
        """Return the segments of a batch of tokens: which tokens use which slot. They are kept for the next module."""
        captured = is_captured(self._row_slots)
        found = self._segments.get(tokens)
        if found is None:
            each = self.share(tokens, where)
            lengths = {slot: each * self.slots.count(slot) for slot in self.used}
            slots = self._row_slots[:, None].expand(-1, each).reshape(-1)
            found = Segments(slots, self.count, lengths)
            if captured:
                return found  # its memory is the graph's
            idle = [size for size in self._segments if size not in self._captured]
            if len(idle) >= _KEPT:
                del self._segments[idle[0]]
            self._segments[tokens] = found
        elif captured:
            self._captured.add(tokens)  # the graph reads it for as long as it lives
        return found

    def members(self, slot: int, size: int, where: str) -> torch.Tensor | slice:
        """Return the numbers of those rows or tokens, of ``size``, that use a slot."""
        if self.uniform:
            return slice(None)

        def build() -> torch.Tensor:
            each = self.share(size, where)
            rows = torch.tensor([row for row, found in enumerate(self.slots) if found == slot], dtype=torch.long)
            return (rows[:, None] * each + torch.arange(each)).reshape(-1).to(self.device)

        return self.memo(("members", slot, size), build)

    def slots_of(self, size: int, where: str) -> list[int]:
        """Return the slot of each of ``size`` rows or tokens."""
        each = self.share(size, where)
        return [slot for slot in self.slots for _ in range(each)]

    def spread(self, values: torch.Tensor, size: int, where: str) -> torch.Tensor:
        """Return, for each of ``size`` rows or tokens, the value of its slot; ``values`` has one for each of them."""
        return values.repeat_interleave(self.share(size, where), 0)

    def add_(self, y: torch.Tensor, values: torch.Tensor, where: str) -> None:
        """Add to the rows or tokens of each slot the slot's values, to the first columns of ``y``."""
        each = self.share(len(y), where)
        y.view(len(values), each, -1)[:, :, : values.shape[-1]] += values[:, None]

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the object that was built for a key before, or build it."""
        if key not in self._memo:
            if len(self._memo) > 4096:
                self._memo.clear()
            self._memo[key] = build()
        return cast("T", self._memo[key])


def rows_error(where: str, rows: int, names: int) -> UsageError:
    """Return the error for a batch with other rows than the caller has named."""
    return UsageError(
        f"{where} is given {rows} rows and {names} names of deltas; give a name for each row, or one name for all rows"
    )


def mixed_error(where: str, shape: Sequence[int]) -> UsageError:
    """Return the error for a module whose input cannot be told apart by rows."""
    return UsageError(
        f"{where} is given the shape {list(shape)}, which does not follow the batch's rows; "
        "such a model serves one delta at a time"
    )
