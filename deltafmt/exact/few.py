"""Chunks of which few units differ: where they do, and where a decoder finds them again (spec, section 17.5).

Compiled: ``kernels/cpu/loops/few.c`` and ``ranks.c``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.exact.differences import Counts, Marks, Planes, exponents, native_marks, sort_keys
from deltafmt.exact.units import Unit, Units

Places = NDArray[np.int64]

# So many of the units are few, at most.
FEW: Final = 0.125

# A compiled loop writes places for a run of units at once, and so behind the last one that counts.
_RUN: Final = 64


def most_places(units: int) -> int:
    """Return how many of so many units are few."""
    return int(FEW * units)


def _room(units: int) -> Places:
    return np.empty(most_places(units) + _RUN, np.int64)


def _differing(native: Native, values: Units, prediction: Units) -> Places | None:
    places = _room(values.size)
    count = native.exact_differ(values, prediction, places)
    return places[:count] if count <= most_places(values.size) else None


@loop(_differing)
def differing(values: Units, prediction: Units) -> Places | None:
    """Return the places where units differ, ascending; None if they are not few."""
    places = np.flatnonzero(values != prediction)
    return places if places.size <= most_places(values.size) else None


def _filled(native: Native, planes: Planes) -> Places | None:
    places = _room(planes.shape[1])
    count = native.exact_filled(planes, places)
    return places[:count] if count <= most_places(planes.shape[1]) else None


@loop(_filled)
def filled(planes: Planes) -> Places | None:
    """Return the places that are not zero in all planes, ascending; None if they are not few."""
    places = np.flatnonzero(planes.any(axis=0))
    return places if places.size <= most_places(planes.shape[1]) else None


def _taken(native: Native, units: Units, places: Places) -> Units:
    out = np.empty(places.size, units.dtype)
    native.exact_take(units, places, out)
    return out


@loop(_taken)
def taken(units: Units, places: Places) -> Units:
    """Return the units at some places."""
    return units.take(places)


def _put(native: Native, units: Units, places: Places, values: Units) -> None:
    native.exact_put(units, places, values)


@loop(_put)
def put(units: Units, places: Places, values: Units) -> None:
    """Write units at some places, each of which is there once."""
    units[places] = values


def _gap_counts(native: Native, numbers: Places, end: int) -> Counts:
    counts = np.empty(256, np.uint64)
    native.exact_gaps(numbers, end, counts)
    return counts


@loop(_gap_counts)
def gap_counts(numbers: Places, end: int) -> Counts:  # noqa: ARG001 - for the compiled loop
    """Return how often each gap is there between numbers in ascending order; gaps above 255 count as 255.

    Args:
        numbers: in any order, each once.
        end: what they are below, at most ``2**31 - 1``.
    """
    return np.bincount(np.minimum(np.diff(np.sort(numbers)), 255), minlength=256).astype(np.uint64)


def _ranks_of(native: Native, places: Places, prediction: Units, key: Unit) -> tuple[Places, Counts]:
    ranks, counts = np.empty(places.size, np.int64), np.empty(1 << key.bits, np.uint64)
    native.exact_ranks(prediction, 0, key.shift, key.bits, native_marks(None), places, counts, ranks)
    return ranks, counts


@loop(_ranks_of)
def ranks_of(places: Places, prediction: Units, key: Unit) -> tuple[Places, Counts]:
    """Return where some units stand when all are stably sorted by the prediction's exponent.

    Args:
        places: the numbers of these units, ascending.
        prediction: of all units.
        key: the unit whose exponent sorts.

    Returns:
        A rank for each place, and how many units have each exponent.
    """
    keys = exponents(prediction, key)
    ranks = np.empty(prediction.size, np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(prediction.size)
    return ranks[places], np.bincount(keys, minlength=1 << key.bits).astype(np.uint64)


def _places_of(native: Native, ranks: Places, prediction: Units, key: Unit, marks: Marks | None = None) -> Places:
    places = np.empty(ranks.size, np.int64)
    native.exact_find(prediction, 0, key.shift, key.bits, native_marks(marks), ranks, places)
    return places


@loop(_places_of)
def places_of(ranks: Places, prediction: Units, key: Unit, marks: Marks | None = None) -> Places:
    """Return which units stand at some ranks when all are sorted as :func:`sorted_planes` sorts them.

    Args:
        ranks: ascending.
        prediction, key, marks: as there.
    """
    return np.argsort(sort_keys(prediction, key, marks), kind="stable")[ranks]
