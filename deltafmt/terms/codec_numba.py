"""The hot loops of the codecs, compiled by numba; each equals its numpy reference bit for bit.

Importing this module imports numba (optional, extra ``fast``). Every function releases the GIL. The functions below
the loops take a :class:`Scratch` and return arrays that live in it: one thread's results stay valid until that thread
calls the same function again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.accel import compiled
from deltafmt.terms import floats, words
from deltafmt.terms.nm import hashing
from deltafmt.terms.tiles import TILE_ROWS, plane_words, planes

_ROW_STEP = np.uint32(hashing.ROW_STEP)
_BLOCK_STEP = np.uint32(hashing.BLOCK_STEP)
_MIX_FIRST = np.uint32(hashing.MIX_FIRST)
_MIX_SECOND = np.uint32(hashing.MIX_SECOND)
_FOLD = np.uint64(hashing.FOLD)
_SPREAD = np.uint64(hashing.SPREAD)


@compiled
def _squeeze(eight, width):  # type: ignore[no-untyped-def]
    """Bring eight fields, one in each byte of a uint64, together into ``8 * width`` bits."""
    k = np.uint64(width)
    gap = np.uint64(8 - width)
    one = np.uint64(1)
    low = ((one << k) - one) * np.uint64(0x0001000100010001)
    x = (eight & low) | ((eight >> gap) & (low << k))
    low = ((one << (k + k)) - one) * np.uint64(0x0000000100000001)
    x = (x & low) | ((x >> (gap + gap)) & (low << (k + k)))
    low = (one << (k * np.uint64(4))) - one
    return (x & low) | ((x >> (gap * np.uint64(4))) & (low << (k * np.uint64(4))))


@compiled
def _spread(bits, width):  # type: ignore[no-untyped-def]
    """Undo :func:`_squeeze`."""
    k = np.uint64(width)
    gap = np.uint64(8 - width)
    one = np.uint64(1)
    low = (one << (k * np.uint64(4))) - one
    x = (bits & low) | ((bits & (low << (k * np.uint64(4)))) << (gap * np.uint64(4)))
    low = ((one << (k + k)) - one) * np.uint64(0x0000000100000001)
    x = (x & low) | ((x & (low << (k + k))) << (gap + gap))
    low = ((one << k) - one) * np.uint64(0x0001000100010001)
    return (x & low) | ((x & (low << k)) << gap)


@compiled
def _pack_plane(eights, low, width, first, last, share, out):  # type: ignore[no-untyped-def]
    """Pack bits ``low`` to ``low + width`` of every field, one plane, into words ``first`` to ``last`` of the rows.

    The rows are of uint64, each of eight one-byte fields; what lies behind the last word is padding. They are taken in
    the order of their lanes, so that a tile is written while it is in the first-level cache.
    """
    every = np.uint64((1 << width) - 1) * np.uint64(0x0101010101010101)
    for t in range(out.shape[0]):
        start = t // share * share * 32 + t % share
        for lane in range(32):
            r = start + lane * share
            if r >= eights.shape[0]:
                break
            if width == 8:
                for w in range(last):
                    out[t, w, lane] = np.uint32(eights[r, w >> 1] >> np.uint64((w & 1) * 32))
                continue
            # Eight fields take 8, 16 or 32 bits, so that a word is filled exactly.
            held = np.uint64(0)
            have = 0
            w = first
            for n in range(eights.shape[1]):
                held |= _squeeze((eights[r, n] >> np.uint64(low)) & every, width) << np.uint64(have)
                have += 8 * width
                if have == 32:
                    out[t, w, lane] = np.uint32(held)
                    w += 1
                    held = np.uint64(0)
                    have = 0
            if have:
                out[t, w, lane] = np.uint32(held)


@compiled
def _unpack_plane(packed, low, width, first, last, share, out):  # type: ignore[no-untyped-def]
    """Undo :func:`_pack_plane`; the plane of the lowest bits comes first and sets the fields."""
    field_mask = (np.uint64(1) << np.uint64(4 * width) << np.uint64(4 * width)) - np.uint64(1)
    for t in range(packed.shape[0]):
        start = t // share * share * 32 + t % share
        for lane in range(32):
            r = start + lane * share
            if r >= out.shape[0]:
                break
            held = np.uint64(0)
            have = 0
            w = first
            for n in range(out.shape[1]):
                while have < 8 * width and w < last:
                    held |= np.uint64(packed[t, w, lane]) << np.uint64(have)
                    have += 32
                    w += 1
                eight = _spread(held & field_mask, width) << np.uint64(low)
                out[r, n] = out[r, n] | eight if low else eight
                # In two steps, because a shift by 64 bits is not defined.
                held = held >> np.uint64(4 * width) >> np.uint64(4 * width)
                have -= 8 * width


@compiled
def _mix(x):  # type: ignore[no-untyped-def]
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * _MIX_FIRST)
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * _MIX_SECOND)
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def _mix64(x):  # type: ignore[no-untyped-def]
    wide = np.uint64(np.uint32(x ^ (x >> np.uint32(16)))) * _FOLD
    return np.uint64((wide >> np.uint64(32)) ^ (wide & np.uint64(0xFFFFFFFF))) * _SPREAD


@compiled
def _seeded(seed, first, keep, log_m, width, out):  # type: ignore[no-untyped-def]
    count, groups = out.shape[0], out.shape[1]
    per_hash = 64 // width
    mask = np.uint32((1 << log_m) - 1)
    lane_mask = np.uint32((1 << width) - 1)
    for r in range(count):
        key = _mix(np.uint32(np.uint32(seed) + np.uint32(np.uint32(first + r) * _ROW_STEP)))
        g = 0
        block = np.uint32(0)
        while g < groups:
            h = _mix64(np.uint32(key + np.uint32(block * _BLOCK_STEP)))
            for _ in range(min(per_hash, groups - g)):
                lane = np.uint32(h) & lane_mask
                h = np.uint64(h >> np.uint64(width))
                b = lane & mask
                a = np.uint32((lane >> np.uint32(log_m - 1)) & mask) | np.uint32(1)
                for i in range(keep):
                    out[r, g, i] = np.uint8(np.uint32(a * np.uint32(i) + b) & mask)
                g += 1
            block += np.uint32(1)


@compiled
def _scatter(codes, scales, pos, group, share, top, scale_group, out):  # type: ignore[no-untyped-def]
    rows, columns = out.shape
    groups, keep = pos.shape[1], pos.shape[2]
    kept = groups * keep
    whole = columns // group * keep
    size = scale_group or max(kept, 1)
    at = np.empty(kept, np.uint32)  # unsigned, so that no index is checked for being negative
    values = np.empty(kept, np.float32)
    for r in range(rows):
        if r % share == 0:
            m = r // share
            for g in range(groups):
                for i in range(keep):
                    at[g * keep + i] = np.uint32(g * group) + np.uint32(pos[m, g, i])
        row, fields = out[r], codes[r]
        for c in range(scales.shape[1]):
            half = scales[r, c] * np.float32(0.5)
            for e in range(c * size, min(kept, (c + 1) * size)):
                values[e] = np.float32(np.int32(2) * np.int32(fields[e]) - top) * half
        row[:] = np.float32(0)
        for e in range(whole):
            row[at[e]] = values[e]
        for e in range(whole, kept):
            if at[e] < columns:
                row[at[e]] = values[e]


@compiled
def _dequantize(codes, step, offsets, factors, group, out):  # type: ignore[no-untyped-def]
    rows, count = codes.shape
    for r in range(rows):
        for c in range(factors.shape[1]):
            offset, factor = offsets[r, c], factors[r, c]
            start, stop = c * group, min(count, (c + 1) * group)
            cell, values = codes[r, start:stop], out[r, start:stop]
            for i in range(cell.size):
                values[i] = np.float32(np.int32(step * np.int32(cell[i])) - offset) * factor


@compiled
def _dequantize_each(codes, step, offsets, factors, out):  # type: ignore[no-untyped-def]
    """Do the same where every field has an offset and a factor of its own."""
    for r in range(codes.shape[0]):
        fields, offset, factor, values = codes[r], offsets[r], factors[r], out[r]
        for i in range(fields.size):
            values[i] = np.float32(np.int32(step * np.int32(fields[i])) - offset[i]) * factor[i]


@compiled
def _add_outer(u, v, out):  # type: ignore[no-untyped-def]
    """Add outer products; without fast-math, the compiler fuses no product with its sum."""
    vectors = u.shape[0]
    for r in range(out.shape[0]):
        row = out[r]
        for n in range(vectors):
            left, right = u[n, r], v[n]
            for i in range(row.size):
                row[i] = np.float32(row[i] + np.float32(left * right[i]))


@compiled
def _difference(a, b):  # type: ignore[no-untyped-def]
    """Return a - b in float32 for two BF16 bit patterns."""
    wide = np.uint32(np.uint32(a) << np.uint32(16)).view(np.float32)
    return np.float32(wide - np.uint32(np.uint32(b) << np.uint32(16)).view(np.float32))


@compiled
def _subtract_bf16(finetuned, base, out):  # type: ignore[no-untyped-def]
    largest = np.uint32(0)
    for i in range(out.size):
        difference = _difference(finetuned[i], base[i])
        out[i] = difference
        largest = max(largest, np.float32(difference).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return largest < np.uint32(0x7F800000)


@compiled
def _add_bf16(base, delta, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        total = np.float32(np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32) + delta[i])
        bits = np.float32(total).view(np.uint32)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded = (bits >> np.uint32(16)) | np.uint32(0x40)
        out[i] = base[i] if delta[i] == np.float32(0) else np.uint16(rounded)


class Scratch:
    """Memory that one thread uses again from run to run: fresh pages cost as much as the loops that fill them."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Return an uninitialized array in the memory called ``name``, which grows as needed."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, np.uint8)
        return held[:size].view(dtype).reshape(shape)


def pack_into(
    scratch: Scratch, fields: NDArray[np.unsignedinteger], width: int, out: NDArray[np.uint32], share: int = 1
) -> None:
    """See :func:`deltafmt.terms.words.pack_into`."""
    if not 1 <= width <= 8:
        return words.pack_into(fields, width, out, share)
    rows, count = fields.shape
    if rows % (TILE_ROWS * share):
        out[-share:] = 0
    if count % 8 or fields.dtype != np.uint8 or not fields.flags.c_contiguous:
        padded = scratch.array("padded", (rows, -(-count // 8) * 8), np.uint8)
        padded[:, count:] = 0
        padded[:, :count] = fields
        fields = padded
    low = first = 0
    for plane in planes(width):
        last = first + plane_words(count, plane)
        _pack_plane(fields.view(np.uint64), low, plane, first, last, share, out)
        low, first = low + plane, last
    return None


def unpack(
    scratch: Scratch, packed: NDArray[np.uint32], rows: int, count: int, width: int, share: int = 1
) -> NDArray[np.unsignedinteger]:
    """See :func:`deltafmt.terms.words.unpack`; fields of at most 8 bits come as uint8."""
    if not 1 <= width <= 8:
        return words.unpack(packed, rows, count, width, share)
    eights = scratch.array("unpack", (rows, -(-count // 8)), np.uint64)
    low = first = 0
    for plane in planes(width):
        last = first + plane_words(count, plane)
        _unpack_plane(packed, low, plane, first, last, share, eights)
        low, first = low + plane, last
    fields = eights.view(np.uint8)
    if count % 8:
        out = scratch.array("unpadded", (rows, count), np.uint8)
        out[...] = fields[:, :count]
        return out
    return fields


def seeded(
    scratch: Scratch, seed: int, first: int, count: int, groups: int, keep: int, group: int
) -> NDArray[np.uint8]:
    """See :func:`deltafmt.terms.nm.hashing.seeded`."""
    out = scratch.array("seeded", (count, groups, keep), np.uint8)
    _seeded(np.uint32(seed), first, keep, group.bit_length() - 1, hashing.lane_bits(keep, group), out)
    return out


def scatter(
    scratch: Scratch,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    pos: NDArray[np.uint8],
    columns: int,
    group: int,
    share: int,
    top: int,
    scale_group: int,
) -> NDArray[np.float32]:
    """See :func:`deltafmt.terms.nm.scatter.scatter`."""
    out = scratch.array("scatter", (codes.shape[0], columns), np.float32)
    _scatter(codes, scales, pos, group, share, np.int32(top), scale_group, out)
    return out


def dequantize(
    scratch: Scratch,
    codes: NDArray[np.uint8],
    step: int,
    offsets: NDArray[np.int32],
    factors: NDArray[np.float32],
    group: int,
) -> NDArray[np.float32]:
    """See :func:`deltafmt.terms.levels.dequantize`."""
    out = scratch.array("dequantize", codes.shape, np.float32)
    if group == 1:
        _dequantize_each(codes, np.int32(step), offsets, factors, out)
    else:
        _dequantize(codes, np.int32(step), offsets, factors, max(min(group, codes.shape[1]), 1), out)
    return out


def add_outer(
    scratch: Scratch,  # noqa: ARG001 - as every loop has it
    u: NDArray[np.float32],
    v: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """See :func:`deltafmt.terms.levels.add_outer`."""
    _add_outer(u, v, out)


def subtract(
    scratch: Scratch, finetuned: floats.Raw, finetuned_dtype: str, base: floats.Raw, base_dtype: str
) -> tuple[floats.Floats, bool]:
    """See :func:`deltafmt.terms.floats.subtract`."""
    if (finetuned_dtype, base_dtype) != ("BF16", "BF16"):
        return floats.subtract(finetuned, finetuned_dtype, base, base_dtype)
    out = scratch.array("subtract", finetuned.shape, np.float32)
    finite = _subtract_bf16(finetuned.reshape(-1), base.reshape(-1), out.reshape(-1))
    return out, bool(finite)


def add(scratch: Scratch, base: floats.Raw, base_dtype: str, delta: floats.Floats, dtype: str) -> floats.Raw:
    """See :func:`deltafmt.terms.floats.add`."""
    if (base_dtype, dtype) != ("BF16", "BF16"):
        return floats.add(base, base_dtype, delta, dtype)
    out = scratch.array("add", base.shape, np.uint16)
    _add_bf16(base.reshape(-1), delta.reshape(-1), out.reshape(-1))
    return out
