"""One chunk of an exact tensor: units to bytes, and back (spec/deltafmt-v1.md, section 17.5).

A chunk has one of six forms, from nothing at all (it equals the prediction) to the units as they are. :func:`encode`
takes the smallest, as far as samples tell.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.exact.differences import (
    Counts,
    Marks,
    Planes,
    joined,
    new_planes,
    planes_of,
    sorted_planes,
    units_of,
)
from deltafmt.exact.few import Places, differing, filled, gap_counts, places_of, put, ranks_of, taken
from deltafmt.exact.frames import decompress_into
from deltafmt.exact.plane_frames import frame_room, plane_frame
from deltafmt.exact.repeats import may_repeat, searched_frame
from deltafmt.exact.samples import SAMPLE, bits, entropy, is_unrelated, sampled
from deltafmt.exact.scratch import scratch, scratch_planes
from deltafmt.exact.units import Unit, Units
from deltafmt.output import Bytes

# The forms of a chunk.
SAME: Final = 0  # the prediction itself
STORED: Final = 1  # the units as they are
VALUES: Final = 2  # planes of the units
DIFFERENCES: Final = 3  # planes of the zigzag differences
SORTED: Final = 4  # the same, sorted by the prediction's exponent
SPARSE: Final = 5  # the places of the units that differ, and their differences, sorted
FORMS: Final = (SAME, STORED, VALUES, DIFFERENCES, SORTED, SPARSE)

LEVELS: Final = ("default", "fast")

# A gap byte that stands for no unit: so many units are passed over.
_FILLER: Final = 255

# Blocks of a frame end where an exponent does, unless the block would be shorter than this.
_LEAST_BLOCK: Final = 4096

# Bytes of the numbers of a sparse chunk: places, gaps, and stored bytes of the gaps.
_SPARSE_HEAD: Final = 12

# Planes that take more bytes for each unit hold many differences: a decoder does not look for few.
_FEW_BYTES: Final = 0.25

# Where a larger share of a sample differs, few units are not looked for: twice what few may be.
_FEW_SAMPLED: Final = 0.25

# So many bytes of a plane are looked at first for one that is not zero.
_BEGINNING: Final = 256

# The bits a byte from which no code is tried.
_RANDOM_BITS: Final = 7.9


# A plane's bytes, or None for zeros.
Plane = NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """An encoded chunk.

    Attributes:
        form: its form.
        data: its bytes.
        places: where the units are not the prediction, ascending; None if they are many.
    """

    form: int
    data: bytes
    places: Places | None = field(default=None, compare=False)


def encode(
    values: Units,
    prediction: Units,
    unit: Unit,
    level: str = "default",
    marks: Marks | None = None,
) -> Chunk:
    """Return a chunk in the form that is smallest, as far as samples tell.

    Args:
        values: the units, at least one.
        prediction: what the decoder has in their place, as many.
        unit: their unit.
        level: ``default``, or ``fast`` to leave differences unsorted, and to write the places of few.
        marks: which units are sorted behind the others; None if there are no marks.
    """
    sample = sampled(values), sampled(prediction)
    is_few = np.count_nonzero(sample[0] != sample[1]) <= _FEW_SAMPLED * sample[0].size
    places = differing(values, prediction) if is_few else None
    if places is not None and not places.size:
        return Chunk(SAME, b"", places)
    chunk = _smallest(values, prediction, unit, level, marks, places, sample)
    if len(chunk.data) >= values.nbytes:
        chunk = Chunk(STORED, values.tobytes())
    return replace(chunk, places=places)


def _smallest(
    values: Units,
    prediction: Units,
    unit: Unit,
    level: str,
    marks: Marks | None,
    places: Places | None,
    sample: tuple[Units, Units],
) -> Chunk:
    """Return a chunk in the form that promises to be smallest, though storing the units may be smaller yet."""
    if places is not None and (level == "fast" or (unit.is_float and marks is None)):
        if level == "fast":
            return _sparse(values, prediction, places, unit, marks)
        return _few(values, prediction, places, unit)
    found = [] if places is None else [_sparse(values, prediction, places, unit, marks)]
    if not is_unrelated(*sample, unit):
        key = unit if level == "default" else Unit(unit.width)
        form = SORTED if key.is_float else DIFFERENCES
        room = scratch_planes(unit.width, values.size)
        behind = marks if key.is_float else None
        codes = scratch("sorted", values.nbytes if key.is_float else 0)
        planes, counts = sorted_planes(values, prediction, unit, key, behind, room, codes)
        found.append(Chunk(form, _write_planes(planes, _ends(counts) if form == SORTED else ())))
    else:
        found.append(Chunk(VALUES, _write_planes(planes_of(values, unit))))
    return min(found, key=lambda chunk: len(chunk.data))


def decode(form: int, data: Bytes, prediction: Units, unit: Unit, marks: Marks | None = None) -> Units:
    """Return the units of a chunk.

    Args:
        form, data: the chunk.
        prediction: what the encoder had as the prediction; its size is that of the chunk.
        unit: the unit.
        marks: which units are sorted behind the others; None if there are no marks.

    Raises:
        InvalidFileError: the bytes break the format.
    """
    places, units = changes(form, data, prediction, unit, marks)
    return units if places is None else patched(prediction, places, units)


def patched(prediction: Units, places: Places, units: Units, room: Units | None = None) -> Units:
    """Return a prediction with other units at some places; the prediction itself without any places.

    Args:
        prediction, places, units: as :func:`changes` has them.
        room: where the result is made, as large as the prediction; anew if None.
    """
    if not places.size:
        return prediction
    whole = np.empty_like(prediction) if room is None else room
    whole[:] = prediction
    put(whole, places, units)
    return whole


def changes(
    form: int, data: Bytes, prediction: Units, unit: Unit, marks: Marks | None = None
) -> tuple[Places | None, Units]:
    """Return where the units of a chunk are not the prediction, and these units.

    Args:
        form, data, prediction, unit, marks: as :func:`decode` takes them.

    Returns:
        Places in any order, each once, and a unit for each; or None and all units, where they are many.

    Raises:
        InvalidFileError: the bytes break the format.
    """
    count, view = prediction.size, memoryview(data).cast("B")
    if form == SAME:
        _expect(len(view), 0)
        return np.empty(0, np.int64), np.empty(0, unit.dtype)
    if form == STORED:
        _expect(len(view), count * unit.width)
        units = np.frombuffer(view, unit.dtype)
        return None, units if units.flags.aligned else units.copy()
    if form == SPARSE:
        places, differences = _read_sparse(view, count, unit)
        of_places = None if marks is None else marks[places]
        return places, joined(differences, prediction.take(places), unit, unit, of_places)
    if form == VALUES:
        return None, units_of(_read_planes(view, count, unit.width), unit)
    key = unit if form == SORTED else Unit(unit.width)
    marked = marks if form == SORTED else None
    stored, planes = _stored_planes(view, unit.width), scratch_planes(unit.width, count)
    # Planes above the last one that is stored hold zeros, and are not looked at where units are few.
    last = max((number for number, held in enumerate(stored) if len(held)), default=0)
    held = planes[: last + 1] if len(view) <= _FEW_BYTES * count else planes
    for plane, bytes_of in zip(held, stored, strict=False):
        _read_plane(bytes_of, plane)
    ranks = filled(held) if len(view) <= _FEW_BYTES * count else None
    if ranks is None:
        planes[len(held) :] = 0
        return None, joined(planes, prediction, unit, key, marked, scratch("sorted", planes.size))
    places = places_of(ranks, prediction, key, marked) if form == SORTED else ranks
    codes = new_planes(unit.width, ranks.size)
    codes[len(held) :] = 0
    for plane, codes_of in zip(held, codes, strict=False):
        codes_of[:] = taken(plane, ranks)
    return places, joined(codes, taken(prediction, places), unit, Unit(unit.width))


def parts(form: int, data: Bytes, count: int, unit: Unit) -> tuple[Places | None, Planes]:
    """Return the places and the planes of a chunk, for a decoder elsewhere.

    Args:
        form, data: the chunk; not of the form SAME.
        count: its units.
        unit: the unit.

    Returns:
        The places that the planes are for, ascending, or None for all places; and the planes: of units if the form is
        STORED or VALUES, otherwise of zigzag differences.

    Raises:
        InvalidFileError: the bytes break the format.
    """
    view = memoryview(data).cast("B")
    if form == STORED:
        _expect(len(view), count * unit.width)
        return None, planes_of(np.frombuffer(view, unit.dtype), unit)
    if form == SPARSE:
        return _read_sparse(view, count, unit)
    return None, _read_planes(view, count, unit.width)


def check(form: int, data: Bytes, count: int, unit: Unit) -> None:
    """Check whatever can be known of a chunk without the prediction.

    Raises:
        InvalidFileError: the bytes break the format.
    """
    view = memoryview(data).cast("B")
    if form == SAME:
        _expect(len(view), 0)
    elif form == STORED:
        _expect(len(view), count * unit.width)
    elif form == SPARSE:
        _read_sparse(view, count, unit)
    else:
        _read_planes(view, count, unit.width, scratch_planes(unit.width, count))


def _expect(found: int, needed: int) -> None:
    if found != needed:
        raise InvalidFileError(f"{found} bytes where {needed} are needed")


def _ends(counts: Counts) -> list[int]:
    """Return where blocks end: at the ends of exponents, none closer than the least block."""
    ends = [0]
    for end in np.cumsum(counts).tolist():
        if end - ends[-1] >= _LEAST_BLOCK:
            ends.append(end)
    return ends


def _write_planes(planes: Iterable[Plane], ends: Sequence[int] = ()) -> bytes:
    """Return the lengths of planes, and the planes: nothing for zeros, a frame, or the bytes where no frame is less."""
    parts: list[Bytes] = []
    for number, plane in enumerate(planes):
        # Most planes have something in their first bytes; numpy converts all bytes before it looks at them.
        if plane is None or not (plane[:SAMPLE].any() or plane.any()):
            parts.append(b"")
            continue
        is_random = plane.size >= SAMPLE and bits(sampled(plane)) > _RANDOM_BITS
        found: list[Bytes] = [plane.data]
        if not is_random:
            found.append(plane_frame(plane, ends, scratch(f"frame{number}", frame_room(plane.size, ends))))
        if may_repeat(plane):
            found.append(searched_frame(plane))
        parts.append(min(found, key=len))
    return b"".join((struct.pack(f"<{len(parts)}I", *map(len, parts)), *parts))


def _stored_planes(view: memoryview, width: int) -> list[memoryview]:
    """Return the bytes of each plane as they are stored."""
    head = 4 * width
    if len(view) < head:
        raise InvalidFileError(f"{len(view)} bytes cannot hold the lengths of {width} planes")
    lengths = struct.unpack(f"<{width}I", view[:head])
    _expect(len(view), head + sum(lengths))
    ends = [head, *(head + end for end in itertools.accumulate(lengths))]
    return [view[start:end] for start, end in itertools.pairwise(ends)]


def _read_planes(view: memoryview, count: int, width: int, room: Planes | None = None) -> Planes:
    """Return planes of ``count`` bytes, in ``room`` if it is given."""
    planes = new_planes(width, count) if room is None else room
    for row, stored in zip(planes, _stored_planes(view, width), strict=True):
        _read_plane(stored, row)
    return planes


def _read_plane(stored: memoryview, plane: NDArray[np.uint8]) -> None:
    """Read a plane."""
    count = plane.size
    if not len(stored):
        plane[:] = 0
        return
    if len(stored) > count:
        raise InvalidFileError(f"a plane of {count} bytes takes {len(stored)}")
    if len(stored) == count:
        plane[:] = np.frombuffer(stored, np.uint8)
    else:
        decompress_into(stored, plane.data)
    # Few planes begin with many zeros: the whole is seldom looked at.
    if not (plane[:_BEGINNING].any() or plane.any()):
        raise InvalidFileError("a plane of zeros is stored")


def _few(values: Units, prediction: Units, places: Places, unit: Unit) -> Chunk:
    """Return a chunk of which few units differ, as sorted planes or by their places: what promises to be smaller."""
    ranks, counts = ranks_of(places, prediction, unit)
    if _gap_bits(places, values.size) < _gap_bits(ranks, values.size):
        return _sparse(values, prediction, places, unit)
    planes, _ = sorted_planes(taken(values, places), taken(prediction, places), unit, Unit(unit.width))
    return Chunk(SORTED, _write_planes(_scattered(planes, ranks, values.size), _ends(counts)))


def _scattered(planes: Planes, places: Places, count: int) -> Iterator[Plane]:
    """Give planes that have some bytes at their places, and zeros elsewhere."""
    room = scratch_planes(len(planes), count)
    for plane, whole in zip(planes, room, strict=True):
        held = plane.nonzero()[0]
        if not held.size:
            yield None
            continue
        whole[:] = 0
        if held.size < plane.size // 2:
            put(whole, places.take(held), plane.take(held))
        else:
            put(whole, places, plane)
        yield whole


def _gap_bits(numbers: Places, end: int) -> float:
    """Return the entropy of gaps between numbers below an end, in bits a gap; those above 255 count as such."""
    return entropy(gap_counts(numbers, end)) if numbers.size > 1 else 0.0


def _sparse(values: Units, prediction: Units, places: Places, unit: Unit, marks: Marks | None = None) -> Chunk:
    """Return the places of the units that differ, as gaps, and their differences, sorted."""
    of_places = None if marks is None else marks[places]
    planes, counts = sorted_planes(values.take(places), prediction.take(places), unit, unit, of_places)
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // _FILLER + 1)
    stream = np.full(int(ends[-1]), _FILLER, np.uint8)
    stream[ends - 1] = gaps % _FILLER
    head = struct.pack("<II", places.size, stream.size)
    return Chunk(SPARSE, head + _write_planes(stream[None]) + _write_planes(planes, _ends(counts)))


def _read_sparse(view: memoryview, count: int, unit: Unit) -> tuple[Places, Planes]:
    """Return the places of the units that differ, ascending, and the planes of their differences."""
    if len(view) < _SPARSE_HEAD:
        raise InvalidFileError(f"{len(view)} bytes cannot hold the numbers of a sparse chunk")
    changed, length, stored = struct.unpack("<III", view[:_SPARSE_HEAD])
    if not 1 <= changed <= count or not changed <= length <= changed + count // _FILLER:
        raise InvalidFileError(f"{changed} places in {length} gaps, of {count} units")
    end = _SPARSE_HEAD + stored
    gaps = _read_planes(view[_SPARSE_HEAD - 4 : end], length, 1)[0]
    is_place = gaps != _FILLER
    places = np.cumsum(gaps + is_place.astype(np.int64))[is_place] - 1
    if places.size != changed or not is_place[-1] or int(places[-1]) >= count:
        raise InvalidFileError(f"the gaps do not give {changed} places among {count} units")
    planes = _read_planes(view[end:], changed, unit.width)
    if not planes.any(axis=0).all():
        raise InvalidFileError("a place has no difference")
    return places, planes
