"""Differences of units, sorted by the exponent of what is predicted, as planes of bytes (spec, sections 17.3, 17.5).

Compiled: ``kernels/cpu/loops/exact.c`` and ``ranks.c``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.exact.units import Unit, Units

Planes = NDArray[np.uint8]
Counts = NDArray[np.uint64]
Places = NDArray[np.int64]
Marks = NDArray[np.bool_]


def ordered(units: Units, unit: Unit) -> Units:
    """Return units as integers that ascend with the values of floats; units that are not floats stay as they are."""
    if not unit.is_float:
        return units
    sign = unit.dtype.type(1 << (8 * unit.width - 1))
    integers: Units = np.where(units & sign, ~units, units | sign)
    return integers


def unordered(integers: Units, unit: Unit) -> Units:
    """Return the units of ordered integers."""
    if not unit.is_float:
        return integers
    sign = unit.dtype.type(1 << (8 * unit.width - 1))
    units: Units = np.where(integers & sign, integers ^ sign, ~integers)
    return units


def zigzag(differences: Units, unit: Unit) -> Units:
    """Return 0, 1, 2, 3, ... for the differences 0, -1, 1, -2, ..., which are integers modulo the unit's bits."""
    one, top = unit.dtype.type(1), unit.dtype.type(8 * unit.width - 1)
    codes: Units = differences << one ^ (unit.dtype.type(0) - (differences >> top))
    return codes


def unzigzag(codes: Units, unit: Unit) -> Units:
    """Return the differences of zigzag codes."""
    one = unit.dtype.type(1)
    differences: Units = codes >> one ^ (unit.dtype.type(0) - (codes & one))
    return differences


def exponents(prediction: Units, unit: Unit) -> NDArray[np.uint16]:
    """Return the exponents of the units that are predicted: the keys by which differences are sorted."""
    mask = unit.dtype.type((1 << unit.bits) - 1)
    keys: Units = prediction >> unit.dtype.type(unit.shift) & mask
    return keys.astype(np.uint16)


def _sorted_planes(native: Native, values: Units, prediction: Units, unit: Unit, key: Unit) -> tuple[Planes, Counts]:
    planes = np.empty((unit.width, values.size), np.uint8)
    counts = np.zeros(1 << key.bits, np.uint64)
    native.exact_split(values, prediction, unit.is_float, key.shift, key.bits, planes, counts)
    return planes, counts


@loop(_sorted_planes)
def sorted_planes(values: Units, prediction: Units, unit: Unit, key: Unit) -> tuple[Planes, Counts]:
    """Return the planes of the zigzag differences between units, stably sorted by the prediction's exponent.

    Args:
        values, prediction: arrays of as many units.
        unit: their unit.
        key: the unit whose exponent sorts; one without an exponent leaves the order as it is.

    Returns:
        Planes of shape (bytes of a unit, units), the lowest bytes first; and how many units have each exponent.
    """
    with np.errstate(over="ignore"):
        codes = zigzag(ordered(values, unit) - ordered(prediction, unit), unit)
    keys = exponents(prediction, key)
    counts = np.bincount(keys, minlength=1 << key.bits).astype(np.uint64)
    return planes_of(codes[np.argsort(keys, kind="stable")], unit), counts


def _joined(native: Native, planes: Planes, prediction: Units, unit: Unit, key: Unit) -> Units:
    out = np.empty(prediction.size, unit.dtype)
    native.exact_join(planes, prediction, unit.is_float, key.shift, key.bits, out)
    return out


@loop(_joined)
def joined(planes: Planes, prediction: Units, unit: Unit, key: Unit) -> Units:
    """Return the units whose sorted planes these are; the inverse of :func:`sorted_planes`."""
    codes = np.empty(prediction.size, unit.dtype)
    codes[np.argsort(exponents(prediction, key), kind="stable")] = units_of(planes, unit)
    with np.errstate(over="ignore"):
        return unordered(ordered(prediction, unit) + unzigzag(codes, unit), unit)


def _ranks_of(native: Native, places: Places, prediction: Units, key: Unit) -> tuple[Places, Counts]:
    ranks, counts = np.empty(places.size, np.int64), np.empty(1 << key.bits, np.uint64)
    native.exact_ranks(prediction, 0, key.shift, key.bits, places, counts, ranks)
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


def marked_planes(
    values: Units, prediction: Units, unit: Unit, key: Unit, marks: Marks | None
) -> tuple[Planes, Counts]:
    """Return what :func:`sorted_planes` does, with the units that are marked behind all others (section 17.8).

    Args:
        values, prediction, unit, key: as there.
        marks: which units are marked; None if there are no marks.

    Returns:
        The planes, and how many units have each exponent: first of those that are not marked.
    """
    if marks is None:
        return sorted_planes(values, prediction, unit, key)
    halves = [sorted_planes(values[half], prediction[half], unit, key) for half in (~marks, marks)]
    return np.concatenate([planes for planes, _ in halves], axis=1), np.concatenate([counts for _, counts in halves])


def marked_units(planes: Planes, prediction: Units, unit: Unit, key: Unit, marks: Marks | None) -> Units:
    """Return the units whose planes :func:`marked_planes` gives."""
    if marks is None:
        return joined(planes, prediction, unit, key)
    units = np.empty(prediction.size, unit.dtype)
    first = prediction.size - int(np.count_nonzero(marks))
    for half, part in ((~marks, planes[:, :first]), (marks, planes[:, first:])):
        units[half] = joined(np.ascontiguousarray(part), prediction[half], unit, key)
    return units


def planes_of(units: Units, unit: Unit) -> Planes:
    """Return the planes of units: shape (bytes of a unit, units), the lowest bytes first."""
    return np.ascontiguousarray(units.view(np.uint8).reshape(units.size, unit.width).T)


def units_of(planes: Planes, unit: Unit) -> Units:
    """Return the units whose planes these are."""
    return np.ascontiguousarray(planes.T).reshape(-1).view(unit.dtype)
