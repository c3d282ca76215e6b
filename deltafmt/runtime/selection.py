"""The selection: which delta each row of a batch uses, within one ``with`` block.

Rows follow each other in the order of the names. While it generates, a model may have several rows for each name
(beams, samples); they stand side by side, as transformers repeats them. Where the rows stand in the tensors inside the
model is another question (:mod:`deltafmt.runtime.call_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.batch_inputs import Input, inputs_of, rows_of, shapes_of
from deltafmt.runtime.call_rows import Kept, Walk
from deltafmt.runtime.orders import Order
from deltafmt.runtime.row_places import Forms, form_of

T = TypeVar("T")

BASE = -1
_KEPT = 8  # numbers of tokens whose order is kept: prefill, decoding and a few in between


@dataclass(slots=True, eq=False)
class Waiting:
    """Outputs that were computed ahead; each waits until its module is called with the same input.

    Attributes:
        given: the input.
        version: the input's version when the outputs were computed.
        outputs: the outputs by the site's id.
        complete: True if they have all that the deltas change.
    """

    given: torch.Tensor
    version: int
    outputs: dict[int, torch.Tensor]
    complete: bool = False


class BoundCall(Protocol):
    """The call of a model that a thread is in."""

    bound: bool
    selection: Selection | None


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
        walk: the call that is under way, if its rows use several deltas.
        entered: True while a call of the model, or of a model inside it, is under way.
        copies: how many rows side by side the model may be given for each name; set while it generates.
        stash: tensors that a module's hook before the forward leaves for its hook after it, by the site's id.
        waiting: outputs that were computed ahead.
        multiplied: the ids of the sites whose output contains the deltas' products already.
        finished: the ids of the sites whose output contains all of the deltas already, for the modules' hooks.
        call: the call that is bound to it (:class:`.scope.Call`); None for a module that is called by itself.
        routines: what groups of modules have decided in earlier calls whose rows stood in the same places; None outside
            of calls, and in calls that are followed.
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
        self.walk: Walk | None = None
        self.entered = False
        self.copies = frozenset((1,))
        self.stash: dict[int, torch.Tensor] = {}
        self.waiting: Waiting | None = None
        self.multiplied: set[int] = set()
        self.finished: set[int] = set()
        self.routines: dict[object, Any] | None = None
        self.call: BoundCall | None = None
        self._each = each
        self._names = len(slots)
        self._alone: dict[int, Selection] = {}
        self._memo: dict[Hashable, object] = {}
        self._whole: dict[int, Order] = {}

    @property
    def uniform(self) -> bool:
        """True if all rows use the same slot."""
        return len(self.slots) == 1

    def check_rows(self, rows: int, where: str, *, strict: bool = True) -> None:
        """Refuse a batch whose rows are not those that the caller named.

        Args:
            rows: the rows of the batch.
            where: the model's class, for the message.
            strict: True for the model that is called first; False for a model inside it.

        Raises:
            UsageError: the rows are not those of the names, or not a multiple of them.
        """
        if strict and self._each and rows not in {self._names * copies for copies in self.copies}:
            raise rows_error(where, rows, self._names)
        if rows % self._names:
            raise UsageError(
                f"{where} is given {rows} rows, which is not a multiple of the {self._names} names of deltas"
            )

    def begin(self, forms: Forms, entry: Hashable, given: Mapping[str, Any], config: Any, where: str) -> Walk | None:
        """Return the walk of a call that is about to begin; None if it needs none.

        Args:
            forms: the forms of the model's calls.
            entry: what is called.
            given: its arguments by name.
            config: its configuration, if it has one.
            where: its class, for messages.

        Raises:
            UsageError: the inputs' rows are not those that the caller named.
        """
        found = rows_of(given)
        if found is None:
            return None
        main, rows = found
        self.check_rows(rows, where)
        if self.uniform:
            return None

        def inputs() -> list[Input]:
            return list(inputs_of(given, rows, main, config, where))

        def build() -> Kept:
            owned = tuple(one.rows for one in inputs() if one.rows is not None and not one.packed)
            return self.memo(("items", rows, owned), lambda: Kept(self._items(rows, owned)))

        shapes = shapes_of(given)
        kept = build() if shapes is None else self.memo(("shapes", shapes), build)
        return Walk(forms, form_of(entry, given), inputs, self.count, self.device, kept)

    def _items(self, rows: int, owned: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the slots of the items of each source; those of the first are the rows."""
        slots = torch.tensor(self.slots, device="cpu").repeat_interleave(rows // len(self.slots))
        return [slots, *[slots[list(one)] for one in owned]]

    def order(self, site: object, number: int, tensor: torch.Tensor, shape: Sequence[int], where: str) -> Order | None:
        """Return the order of the deltas in a tensor that a module is given; see :meth:`Walk.order`.

        Raises:
            UsageError: whose rows these are cannot be told.
        """
        if self.uniform:
            return self.whole(math.prod(shape))
        if self.walk is None:
            raise outside_error(where)
        return self.walk.order(site, number, tensor, shape, where)

    def steady(self, tensor: torch.Tensor) -> bool:  # noqa: ARG002 - of packed batches
        """Tell whether the order of every tensor of this shape is the same, if the same module is given it."""
        return True

    def whole(self, tokens: int) -> Order:
        """Return the order of tokens that all use the one slot."""
        found = self._whole.get(tokens)
        if found is None:
            if len(self._whole) == _KEPT:
                self._whole.pop(next(iter(self._whole)))
            slot = torch.tensor(self.slots, device="cpu")
            found = self._whole[tokens] = Order((tokens,), 0, slot, self.count, self.device, uniform=True)
        return found

    def alone(self, slot: int) -> Selection:
        """Return the selection of one slot for all rows of the same batch."""
        found = self._alone.get(slot)
        if found is None:
            found = self._alone[slot] = Selection([slot], self.count, self.device)
        return found

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the object that was built for a key before, or build it."""
        if key not in self._memo:
            if len(self._memo) > 4096:
                self._memo.clear()
            self._memo[key] = build()
        return cast("T", self._memo[key])


class Entry:
    """A context manager: a call of a model, with what is known about its rows. Models inside it change nothing.

    Args:
        forms: the forms of the model's calls.
        selection: the slots of the rows.
        entry: what is called.
        given: its arguments by name.
        config: its configuration, if it has one.
        module: the model, for messages.
    """

    __slots__ = ("_forms", "_given", "_names", "_outer", "_selection")

    def __init__(
        self,
        forms: Forms,
        selection: Selection,
        entry: Hashable,
        given: Mapping[str, Any],
        config: Any,
        module: object,
    ) -> None:
        self._forms, self._selection, self._given = forms, selection, given
        self._names = entry, config, type(module).__name__
        self._outer = False

    def __enter__(self) -> None:
        """Begin the call."""
        selection = self._selection
        if selection.entered:
            return
        entry, config, where = self._names
        walk = selection.begin(self._forms, entry, self._given, config, where)
        if walk is not None:
            walk.__enter__()
        selection.walk, selection.entered, self._outer = walk, True, True
        if not selection.mixes:
            selection.routines = selection.memo("routines", dict) if walk is None else walk.routines

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the call."""
        if self._outer:
            walk, self._selection.walk, self._selection.entered = self._selection.walk, None, False
            self._selection.routines = None
            if walk is not None:
                walk.__exit__(kind, error, trace)


def outside_error(where: str) -> UsageError:
    """Return the error for a module that is called by itself where rows use several deltas."""
    return UsageError(
        f"{where} is called outside of its model, which knows the rows; call the model, or name one delta"
    )


def rows_error(where: str, rows: int, names: int) -> UsageError:
    """Return the error for a batch with other rows than the caller has named."""
    return UsageError(
        f"{where} is given {rows} rows and {names} names of deltas; give a name for each row, or one name for all rows"
    )
