"""One call of a model with several deltas: where the rows stand in each tensor that a served module asks about.

This is the whole interface between the served modules and the question whose rows they see: a module asks
:meth:`Walk.order` for the slots of a tensor, and gets them, None (the tensor depends on no row), or a refusal by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.batch_inputs import Input
from deltafmt.runtime.follow import Follower
from deltafmt.runtime.orders import Order
from deltafmt.runtime.owners import LOST, Lost, Owners, owners_along
from deltafmt.runtime.row_places import MERGED, MET, OUTPUT, Form, Forms, Place

_KEPT = 64  # orders of a batch that are kept: a few for each length of a prompt


class Kept:
    """What calls of one batch have made, for the calls after them.

    Attributes:
        slots: for each source, the slot of each item; the first source is the rows of the batch.
        orders: the orders of the deltas in tensors, by source, dimension and shape.
        routines: for each form of a call, what groups of modules have decided
            (:mod:`deltafmt.runtime.product_group`).
    """

    def __init__(self, slots: Sequence[torch.Tensor]) -> None:
        self.slots = slots
        self.orders: dict[Hashable, Order] = {}
        self.routines: weakref.WeakKeyDictionary[Form, dict[object, Any]] = weakref.WeakKeyDictionary()


class Walk:
    """A context manager: one call, from the model that is called first to its end.

    Args:
        forms: the forms of the model's calls.
        key: this call's form.
        inputs: a function that returns the inputs whose items are known.
        count: the number of slots of the operand tables.
        device: the device of the deltas.
        kept: the slots of the batch's items, and what earlier calls of the batch have made.

    Attributes:
        follower: the mode that follows the call; None if its form is known.
        slots: for each source, the slot of each item.
        rows: for each source, the row of each item; None for the rows of the batch themselves.
        routines: what groups of modules have decided for calls of this form and batch; None while the call is followed.
    """

    def __init__(
        self,
        forms: Forms,
        key: Hashable,
        inputs: Callable[[], Sequence[Input]],
        count: int,
        device: torch.device,
        kept: Kept,
    ) -> None:
        found = forms.find(key)
        self.slots = kept.slots
        self.follower = Follower() if found is None else None  # type: ignore[no-untyped-call]
        self._form = Form() if found is None else found
        self._forms, self._key, self._inputs = forms, key, inputs
        self._count, self._device, self._orders = count, device, kept.orders
        self.routines = None if found is None else kept.routines.setdefault(found, {})
        self._leaf = False
        self.rows: list[torch.Tensor | None] = [None]
        self._merged: dict[int, int] = {}

    def of_leaf(self) -> Self:
        """Return the walk of a model that is itself a served module: its input's first dimension is the rows."""
        self.follower, self.routines, self._leaf = None, None, True
        return self

    def __enter__(self) -> Self:
        """Begin to follow the call, if its form is not known."""
        if self.follower is not None:
            source = 0
            for one in self._inputs():
                if one.packed:
                    owners = owners_along(one.tensor.shape, 0, torch.tensor(one.rows, device="cpu"))
                    self.follower.mark(one.tensor, Owners(owners.items, routed=True))
                    continue
                items = torch.arange(one.tensor.shape[0], device="cpu")
                rows = None if one.rows is None else torch.tensor(one.rows, device="cpu")
                if rows is not None:
                    source += 1
                    self.rows.append(rows)
                owners = owners_along(one.tensor.shape, 0, items, 0 if rows is None else source)
                self.follower.mark(one.tensor, Owners(owners.items, owners.source, rows=rows))
            self.follower.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what was found, if the call has come to its end."""
        if self.follower is not None:
            self.follower.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
            if kind is None:
                self._forms.keep(self._key, self._form)

    def note(self, site: object, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note a module's call while the model's call is followed, whether a delta of this call changes it or not."""
        if self.follower is None:
            return
        numbered = [*enumerate((*args, *kwargs.values())), (OUTPUT, output)]
        for number, value in numbered:
            if isinstance(value, torch.Tensor):
                self.note_tensor(site, number, value)

    def note_tensor(self, site: object, number: int, tensor: torch.Tensor) -> None:
        """Note one tensor of a module's call, while the model's call is followed."""
        if self.follower is None:
            return
        counts = {source: len(slots) for source, slots in enumerate(self.slots)}
        self._form.note((id(site), number), self.follower.owners(tensor), counts)

    def same_rows(self, made: Any, given: torch.Tensor) -> None:
        """Give what a module made the rows of another tensor, while the model's call is followed."""
        if self.follower is not None:
            self.follower.same_rows(made, given)

    def rows_first(self, sites: Iterable[int]) -> bool:
        """Tell whether the call's form is known, and the modules of some sites are given the batch's rows in order."""
        return self.follower is None and not self._leaf and self._form.rows_first(sites)

    def merging(self, site: object, alike: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return which of several tensors of one shape tells the rows of a value that is merged, and its number.

        Args:
            site: the site of the module that merges.
            alike: the tensors.
        """
        number = MERGED - self._merged.setdefault(id(site), 0)
        self._merged[id(site)] += 1
        given = alike[0]
        if self.follower is not None:
            given = next((one for one in alike if self.follower.owners(one) is not None), given)
            self.note_tensor(site, number, given)
        return given, number

    def meet(self, site: object, source: int) -> None:
        """Note the source whose items an output meets that is the same for all of them."""
        place = Place(source, 0, 0)
        if self._form.places.setdefault((id(site), MET), place) != place:
            self._form.steady = False

    def met(self, site: object) -> int | None:
        """Return the source that :meth:`meet` has noted."""
        found = self._form.places.get((id(site), MET))
        return found.source if isinstance(found, Place) else None

    def unsteady(self) -> None:
        """Let each call of this form be followed."""
        self._form.steady = False

    def order(self, site: object, number: int, tensor: torch.Tensor, shape: Sequence[int], where: str) -> Order | None:
        """Return the order of the deltas in a tensor; None if it depends on no row of the batch.

        Args:
            site: the module's site.
            number: the number of the argument, or ``OUTPUT``.
            tensor: the tensor.
            shape: its leading dimensions, which are taken as one.
            where: the module's name, for the message.

        Raises:
            UsageError: whose rows these are cannot be told.
        """
        if self._leaf:
            return self._placed(Place(0, 0, tensor.dim()), self.slots[0], tuple(shape))
        if self.follower is None:
            place = self._form.places.get((id(site), number), LOST)
            if place is None:
                return None
            if isinstance(place, Lost) or place.dims != tensor.dim() or place.dim >= len(shape):
                self._form.steady = False  # values may have decided; the next call is followed
                raise mixed_error(where, tensor.shape)
            slots = self.slots[place.source]
            if tensor.shape[place.dim] % len(slots):
                self._form.steady = False
                raise mixed_error(where, tensor.shape)
            return self._placed(place, slots, tuple(shape))
        owners = self.follower.owners(tensor)
        if owners is None:
            return None
        if isinstance(owners, Lost):
            raise mixed_error(where, tensor.shape)
        dim, line = owners.line()
        if dim is None:
            dim, line = 0, line.expand(shape[0] if shape else 1)
        if dim >= len(shape) or bool((line < 0).any()):
            raise mixed_error(where, tensor.shape)
        slots = self.slots[owners.source][line]
        return Order(shape, dim, slots, self._count, self._device, uniform=False)

    def _placed(self, place: Place, slots: torch.Tensor, shape: tuple[int, ...]) -> Order:
        key = (place.source, place.dim, shape)
        found = self._orders.get(key)
        if found is None:
            if len(self._orders) >= _KEPT:
                self._orders.clear()
            line = slots.repeat_interleave(shape[place.dim] // len(slots))
            found = self._orders[key] = Order(shape, place.dim, line, self._count, self._device, uniform=False)
        return found


def mixed_error(where: str, shape: Sequence[int]) -> UsageError:
    """Return the error for a module whose input cannot be told apart by rows."""
    return UsageError(
        f"{where} is given the shape {list(shape)}, which cannot be told apart by the batch's rows; such a model "
        "serves one delta at a time"
    )
