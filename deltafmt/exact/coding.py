"""A whole exact tensor as one buffer: chunks, and the table behind them (spec/deltafmt-v1.md, section 17.4)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from deltafmt.errors import InvalidFileError
from deltafmt.exact.chunk import DIFFERENCES, FORMS, SORTED, STORED, VALUES, Chunk, changes, check, encode, patched
from deltafmt.exact.differences import Marks
from deltafmt.exact.few import Places, put, taken
from deltafmt.exact.units import Unit, Units, unit_count, unit_of

# Units of a chunk, as a writer chooses them.
CHUNK_UNITS: Final = 1 << 20

# The table has for each chunk the checksum of what it restores, the length of its bytes, and its form.
_ROW: Final = struct.Struct("<QII")
ROW_BYTES: Final = _ROW.size


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk's bytes and its row of the table."""

    data: bytes
    row: bytes


def encode_chunk(
    values: Units,
    prediction: Units,
    unit: Unit,
    level: str = "default",
    marks: Marks | None = None,
) -> EncodedChunk:
    """Return one chunk, as :func:`deltafmt.exact.chunk.encode` gives it, with its row of the table."""
    return _with_row(encode(values, prediction, unit, level, marks), values)


def advance_chunk(values: Units, kept: Units, unit: Unit, level: str = "default") -> EncodedChunk:
    """Return one chunk whose prediction is a kept copy of earlier units, and bring the copy up to date.

    Args:
        values: the units; nobody may change them meanwhile.
        kept: as many, which are the values afterwards.
        unit, level: as :func:`deltafmt.exact.chunk.encode` takes them.
    """
    chunk = encode(values, kept, unit, level)
    if chunk.places is None:
        kept[:] = values
    else:
        put(kept, chunk.places, taken(values, chunk.places))
    return _with_row(chunk, values)


def _with_row(chunk: Chunk, values: Units) -> EncodedChunk:
    return EncodedChunk(chunk.data, _ROW.pack(_checksum(values), len(chunk.data), chunk.form))


def assemble(chunks: Sequence[EncodedChunk]) -> list[bytes]:
    """Return the pieces of a tensor's buffer."""
    return [*(chunk.data for chunk in chunks), b"".join(chunk.row for chunk in chunks)]


def _checksum(units: Units) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(units).view(np.uint8).data)


class ExactDecoder:
    """The chunks of one exact tensor; chunks may be decoded in any order and by several threads.

    Args:
        buffer: the tensor's buffer.
        dtype, shape: of the tensor.
        chunk_units: units of a chunk; the last one may have fewer.

    Raises:
        InvalidFileError: the table does not cover the buffer exactly, or names an unknown form.
    """

    def __init__(self, buffer: memoryview, dtype: str, shape: tuple[int, ...], chunk_units: int) -> None:
        self.unit = unit_of(dtype)
        self.units = unit_count(dtype, shape)
        self.chunk_units = chunk_units
        count = -(-self.units // chunk_units)
        end = len(buffer) - _ROW.size * count
        if end < 0:
            raise InvalidFileError(f"{len(buffer)} bytes cannot hold a table of {count} chunks")
        self._buffer = buffer
        self._rows = list(_ROW.iter_unpack(buffer[end:]))
        self._starts = [0]
        for number, (_, length, form) in enumerate(self._rows):
            if form not in FORMS:
                raise InvalidFileError(f"chunk {number}: unknown form {form}")
            self._starts.append(self._starts[-1] + length)
        if self._starts[-1] != end:
            raise InvalidFileError(f"the chunks take {self._starts[-1]} bytes, not {end}")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def memory(self) -> int:
        """Bytes that restoring a chunk takes at most: its planes, its units and the prediction."""
        return 3 * min(self.chunk_units, self.units) * self.unit.width

    @property
    def decoded(self) -> int:
        """Bytes that checking all chunks makes, whatever the base; places are counted where there are few."""
        spans = map(self.span, range(len(self)))
        whole = (VALUES, DIFFERENCES, SORTED)
        units = (end - first for (first, end), row in zip(spans, self._rows, strict=True) if row[2] in whole)
        return sum(units) * self.unit.width

    def span(self, number: int) -> tuple[int, int]:
        """Return the first unit of a chunk, and the one behind its last."""
        first = number * self.chunk_units
        return first, min(first + self.chunk_units, self.units)

    def decode(self, number: int, prediction: Units, marks: Marks | None = None) -> Units:
        """Return the units of a chunk, whose checksum is then right.

        Args:
            number: the chunk's number.
            prediction: the prediction of these units.
            marks: which of them are marked; None if there are no marks.

        Raises:
            InvalidFileError: the chunk breaks the format, or the prediction is not the one that it was made with.
        """
        return self.changes(number, prediction, marks)[0]

    def changes(
        self, number: int, prediction: Units, marks: Marks | None = None, room: Units | None = None
    ) -> tuple[Units, Places | None, Units]:
        """Return the units of a chunk as :meth:`decode` does, where they are not the prediction, and these units.

        Args:
            number, prediction, marks: as there.
            room: as many units, where all units may be put; they are put elsewhere if it is None.

        Returns:
            All units; places in any order, each once, and a unit for each. If they are many, None and all units.

        Raises:
            InvalidFileError: as there.
        """
        checksum, _, form = self._rows[number]
        try:
            places, new = changes(form, self._data(number), prediction, self.unit, marks)
        except InvalidFileError as error:
            raise error.located(f"chunk {number}") from error
        units = new if places is None else patched(prediction, places, new, room)
        if _checksum(units) != checksum:
            raise InvalidFileError(f"chunk {number}: what it restores is not what was packed")
        return units, places, new

    def stored(self, number: int) -> tuple[int, int, memoryview]:
        """Return the checksum of what a chunk restores, the chunk's form and its bytes."""
        checksum, _, form = self._rows[number]
        return checksum, form, self._data(number)

    def check(self, number: int) -> None:
        """Check what can be known of a chunk without the base.

        Raises:
            InvalidFileError: it breaks the format.
        """
        _, _, form = self._rows[number]
        first, end = self.span(number)
        if form in (STORED, VALUES):
            self.decode(number, np.zeros(end - first, self.unit.dtype))
            return
        try:
            check(form, self._data(number), end - first, self.unit)
        except InvalidFileError as error:
            raise error.located(f"chunk {number}") from error

    def _data(self, number: int) -> memoryview:
        return self._buffer[self._starts[number] : self._starts[number + 1]]
