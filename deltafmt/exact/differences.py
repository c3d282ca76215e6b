"""Differences of units, sorted by the exponent of what is predicted, as planes of bytes (spec, sections 17.3, 17.5).

Compiled: ``kernels/cpu/loops/exact.c``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.exact.units import Unit, Units

Planes = NDArray[np.uint8]
Counts = NDArray[np.uint64]
Marks = NDArray[np.bool_]

# A step between planes has other lowest bits than any multiple of it, for up to eight planes.
_PAGE: Final = 4096
_APART: Final = _PAGE + 576

_NO_MARKS: Final = np.empty(0, np.bool_)


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


def sort_keys(prediction: Units, key: Unit, marks: Marks | None) -> NDArray[np.uint16]:
    """Return by what units are sorted: the exponents, and those of units that are marked behind all others."""
    keys = exponents(prediction, key)
    return keys if marks is None else keys | marks.astype(np.uint16) << np.uint16(key.bits)


def native_marks(marks: Marks | None) -> Marks:
    """Return marks as compiled loops take them: none are an empty array."""
    return _NO_MARKS if marks is None else np.ascontiguousarray(marks)


def key_count(key: Unit, marks: Marks | None) -> int:
    """Return how many keys there may be."""
    return (1 if marks is None else 2) << key.bits


def new_planes(width: int, count: int) -> Planes:
    """Return so many planes of so many bytes, whose contents are anything.

    Bytes at one place of several planes are written together. Processors take addresses with equal lowest bits for the
    same at first, and wait; so the planes lie apart by other steps.
    """
    return np.empty((width, count + _APART - count % _PAGE), np.uint8)[:, :count]


def _sorted_planes(
    native: Native,
    values: Units,
    prediction: Units,
    unit: Unit,
    key: Unit,
    marks: Marks | None = None,
    room: Planes | None = None,
    codes: NDArray[np.uint8] | None = None,
) -> tuple[Planes, Counts]:
    planes = new_planes(unit.width, values.size) if room is None else room
    counts = np.zeros(key_count(key, marks), np.uint64)
    if codes is None:
        codes = np.empty(values.nbytes if counts.size > 1 else 0, np.uint8)
    places = key.shift, key.bits, native_marks(marks)
    native.exact_split(values, prediction, unit.is_float, *places, planes, counts, codes)
    return planes, counts


@loop(_sorted_planes)
def sorted_planes(
    values: Units,
    prediction: Units,
    unit: Unit,
    key: Unit,
    marks: Marks | None = None,
    room: Planes | None = None,  # noqa: ARG001 - for the compiled loop
    codes: NDArray[np.uint8] | None = None,  # noqa: ARG001 - for the compiled loop
) -> tuple[Planes, Counts]:
    """Return the planes of the zigzag differences between units, stably sorted by the prediction's exponent.

    Args:
        values, prediction: arrays of as many units.
        unit: their unit.
        key: the unit whose exponent sorts; one without an exponent leaves the order as it is.
        marks: which units are marked, and lie behind all others (section 17.8); None if there are no marks.
        room: planes that may become the result.
        codes: as many bytes as the units have, or more, whose contents are lost.

    Returns:
        Planes of shape (bytes of a unit, units), the lowest bytes first; and how many units have each exponent: with
        marks, first of those that are not marked.
    """
    with np.errstate(over="ignore"):
        differences = zigzag(ordered(values, unit) - ordered(prediction, unit), unit)
    keys = sort_keys(prediction, key, marks)
    counts = np.bincount(keys, minlength=key_count(key, marks)).astype(np.uint64)
    return planes_of(differences[np.argsort(keys, kind="stable")], unit), counts


def _joined(
    native: Native,
    planes: Planes,
    prediction: Units,
    unit: Unit,
    key: Unit,
    marks: Marks | None = None,
    room: NDArray[np.uint8] | None = None,
) -> Units:
    out = np.empty(prediction.size, unit.dtype)
    if room is None:
        room = np.empty(out.nbytes, np.uint8)
    native.exact_join(planes, prediction, unit.is_float, key.shift, key.bits, native_marks(marks), out, room)
    return out


@loop(_joined)
def joined(
    planes: Planes,
    prediction: Units,
    unit: Unit,
    key: Unit,
    marks: Marks | None = None,
    room: NDArray[np.uint8] | None = None,  # noqa: ARG001 - for the compiled loop
) -> Units:
    """Return the units whose sorted planes these are; the inverse of :func:`sorted_planes`.

    Args:
        planes, prediction, unit, key, marks: as there.
        room: as many bytes as the units have, or more, whose contents are lost.
    """
    codes = np.empty(prediction.size, unit.dtype)
    codes[np.argsort(sort_keys(prediction, key, marks), kind="stable")] = units_of(planes, unit)
    with np.errstate(over="ignore"):
        return unordered(ordered(prediction, unit) + unzigzag(codes, unit), unit)


def planes_of(units: Units, unit: Unit) -> Planes:
    """Return the planes of units: shape (bytes of a unit, units), the lowest bytes first."""
    return np.ascontiguousarray(units.view(np.uint8).reshape(units.size, unit.width).T)


def units_of(planes: Planes, unit: Unit) -> Units:
    """Return the units whose planes these are."""
    return np.ascontiguousarray(planes.T).reshape(-1).view(unit.dtype)
