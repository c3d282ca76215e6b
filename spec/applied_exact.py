"""An exact tensor restored, one sentence of the specification after the other (section 17)."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import zstandard

# Bytes of a unit, lowest bit and bits of the exponent (17.2).
FLOATS = {
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ"), (1, 3, 4)),
    **dict.fromkeys(("F8_E5M2", "F8_E5M2FNUZ"), (1, 2, 5)),
    "F16": (2, 10, 5),
    "BF16": (2, 7, 8),
    **dict.fromkeys(("F32", "C64"), (4, 23, 8)),
    "F64": (8, 52, 11),
}
WIDTHS = {"U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}


def predicted_by(dtype: str, size: int, base: tuple[str, bytes] | None) -> list[int]:
    """Return the prediction of an exact tensor (17.1).

    Args:
        dtype: its dtype.
        size: its bytes.
        base: dtype and bytes of its base.
    """
    width = width_of(dtype)
    count = size // width
    predicted = [] if base is None else prediction(*base, dtype, width)[:count]
    return predicted + [0] * (count - len(predicted))


def width_of(dtype: str) -> int:
    """Return the bytes of a unit."""
    return FLOATS[dtype][0] if dtype in FLOATS else WIDTHS.get(dtype, 1)


def restored(buffer: bytes, chunk: int, dtype: str, predicted: list[int], marks: list[bool] | None = None) -> bytes:
    """Return the bytes of an exact tensor, or of one with an exact part.

    Args:
        buffer: its buffer.
        chunk: units of a chunk.
        dtype: its dtype.
        predicted: the prediction of its units.
        marks: which of them are marked; none if not given.
    """
    width, count = width_of(dtype), len(predicted)
    # "First the units that are not marked, in ascending order of their keys, and then those that are marked": as if
    # the mark were the highest bit of the key.
    marked = [False] * count if marks is None else marks
    chunks = -(-count // chunk)
    table = struct.iter_unpack("<QII", buffer[len(buffer) - 16 * chunks :])
    out, position = b"", 0
    for number, (_, length, form) in enumerate(table):
        here = slice(number * chunk, (number + 1) * chunk)
        units = units_of(form, buffer[position : position + length], predicted[here], marked[here], dtype, width)
        out += b"".join(unit.to_bytes(width, "little") for unit in units)
        position += length
    return out


def prediction(base_dtype: str, data: bytes, dtype: str, width: int) -> list[int]:
    """Return the units that the base has, in the fine-tune's dtype (17.1)."""
    if base_dtype == dtype:
        return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]
    bits = np.frombuffer(data, f"<u{FLOATS[base_dtype][0]}")
    wide = (bits.astype("<u4") << 16).view("<f4") if base_dtype == "BF16" else bits.view(f"<f{bits.itemsize}")
    wide = wide.astype("<f4")
    if dtype == "F32":
        found = wide.view("<u4")
    elif dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            found = wide.astype("<f2").view("<u2")
    else:
        whole = wide.view("<u4").astype(np.uint64)
        found = whole + 0x7FFF + (whole >> 16 & 1) >> 16
    return [NAN[dtype] if nan else int(unit) for nan, unit in zip(np.isnan(wide), found, strict=True)]


def units_of(form: int, data: bytes, predicted: list[int], marks: list[bool], dtype: str, width: int) -> list[int]:
    """Return the units of a chunk (17.5)."""
    if form == 0:
        return predicted
    if form == 1:
        return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]
    if form == 2:
        return planes(data, len(predicted), width)
    if form == 5:
        number, gaps, length = struct.unpack("<III", data[:12])
        places, after = [], 0
        for gap in plane(data[12 : 12 + length], gaps):
            if gap < 255:
                places.append(after + gap)
            after += min(gap + 1, 255)
        units = list(predicted)
        codes = planes(data[12 + length :], number, width)
        known, marked = ([of[at] for at in places] for of in (predicted, marks))
        for place, unit in zip(places, unsorted(codes, known, marked, dtype, width), strict=True):
            units[place] = unit
        return units
    codes = planes(data, len(predicted), width)
    if form == 4:
        return unsorted(codes, predicted, marks, dtype, width)
    return [moved(code, unit, dtype, width) for code, unit in zip(codes, predicted, strict=True)]


def unsorted(codes: list[int], predicted: list[int], marks: list[bool], dtype: str, width: int) -> list[int]:
    """Return units whose differences are in the order of the keys of what is predicted, marked ones last."""
    _, low, bits = FLOATS.get(dtype, (width, 0, 0))
    order = sorted(range(len(predicted)), key=lambda at: (marks[at], (predicted[at] >> low) % (1 << bits)))
    units = [0] * len(predicted)
    for code, at in zip(codes, order, strict=True):
        units[at] = moved(code, predicted[at], dtype, width)
    return units


def moved(code: int, predicted: int, dtype: str, width: int) -> int:
    """Return the unit that has a zigzag difference from its prediction (17.3)."""
    every, half = 1 << 8 * width, 1 << 8 * width - 1

    def ordered(unit: int) -> int:
        return unit if dtype not in FLOATS else unit + half if unit < half else every - 1 - unit

    difference = code // 2 if code % 2 == 0 else every - (code + 1) // 2
    integer = (ordered(predicted) + difference) % every
    return integer if dtype not in FLOATS else integer - half if integer >= half else every - 1 - integer


def planes(data: bytes, count: int, width: int) -> list[int]:
    """Return the integers whose bytes lie in planes."""
    lengths = struct.unpack(f"<{width}I", data[: 4 * width])
    position, integers = 4 * width, [0] * count
    for number, length in enumerate(lengths):
        for at, byte in enumerate(plane(data[position : position + length], count)):
            integers[at] |= byte << 8 * number
        position += length
    return integers


def plane(data: bytes, count: int) -> Any:
    """Return the bytes of a plane."""
    return bytes(count) if not data else data if len(data) == count else zstandard.ZstdDecompressor().decompress(data)
