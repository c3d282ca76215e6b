"""Where the rows of the batch stand in the inputs of the served modules, as found by following one call.

A call's *form* is what may decide the way through the model: the entry, the names of the inputs, their numbers of
dimensions, which dimensions are 1, and the values of other arguments. The first call of each form that mixes deltas is
followed (:mod:`deltafmt.runtime.follow`). If no value decided where rows went, later calls of the form find them in the
same places, for any sizes. Otherwise, as with routed tokens, each call is followed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from deltafmt.runtime.owners import Found, Lost, Owners, in_order

_KEPT: Final = 256  # forms of calls

# Numbers beside those of a module's arguments.
OUTPUT: Final = -1
LOOKED_UP: Final = -2  # the ids that an embedding looks up
MERGED: Final = -100  # and below: the first value per delta that a module merges, and the next ones
MET: Final = -3  # what an output meets that is the same for all rows


@dataclass(frozen=True, slots=True)
class Place:
    """Where the items of a source stand in a tensor: in order, each with an equal share, along one dimension.

    Attributes:
        source: the number of the source; 0 for the rows of the batch.
        dim: the dimension.
        dims: the tensor's number of dimensions.
    """

    source: int
    dim: int
    dims: int


@dataclass(slots=True, eq=False, weakref_slot=True)
class Form:
    """What is known about the calls of one form.

    Attributes:
        places: by the id of a module's site and the number of an argument; None where it depends on no row, and LOST
            where it cannot be told.
        steady: True if later calls find the rows in these places.
    """

    places: dict[tuple[int, int], Place | Lost | None] = field(default_factory=dict)
    steady: bool = True
    _rows_first: bool | None = None

    def rows_first(self, sites: Iterable[int]) -> bool:
        """Tell whether the first arguments of modules have the batch's rows in order, along their first dimension.

        Args:
            sites: the ids of the modules' sites, the same in every call.
        """
        if self._rows_first is None:
            found = (self.places[site, 0] for site in sites if (site, 0) in self.places)
            self._rows_first = all(isinstance(one, Place) and (one.source, one.dim) == (0, 0) for one in found)
        return self._rows_first

    def note(self, key: tuple[int, int], owners: Found, counts: Mapping[int, int]) -> None:
        """Note what was found in one call of a module.

        Args:
            key: the site's id and the number of the argument.
            owners: the owners of the argument.
            counts: the number of items of each source.
        """
        place: Place | Lost | None
        if isinstance(owners, Owners):
            dim, line = owners.line()
            count = counts[owners.source]
            if owners.routed or dim is None or count < 2 or not in_order(line, count):
                self.steady = False
                return
            place = Place(owners.source, dim, owners.items.dim())
        else:
            place = owners
        if self.places.setdefault(key, place) != place:
            self.steady = False


class Forms:
    """The forms of one model's calls."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Form] = {}

    def find(self, key: Hashable) -> Form | None:
        """Return what is known about calls of a form, if they need not be followed."""
        found = self._known.get(key)
        return found if found is not None and found.steady else None

    def keep(self, key: Hashable, form: Form) -> None:
        """Keep what a call that was followed to its end has shown."""
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[key] = form

    def forget(self) -> None:
        """Forget everything, because the model or its served modules have changed."""
        self._known.clear()


def form_of(entry: Hashable, given: Mapping[str, Any]) -> Hashable:
    """Return what may decide the way of a call through the model."""
    return entry, tuple((name, _kind(value)) for name, value in given.items() if value is not None)


def _kind(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple([size == 1 for size in value.shape])
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple([_kind(one) for one in value])
    return type(value).__qualname__
