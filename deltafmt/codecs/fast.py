"""The hot loops of the codecs, compiled by numba; each equals its numpy reference bit for bit.

Importing this module imports numba (optional, extra ``fast``). Every function releases the GIL.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.accel import compiled
from deltafmt.codecs import floats, positions, words
from deltafmt.layout.nm import stream_words, tiles

_ROW_STEP = np.uint32(positions.ROW_STEP)
_BLOCK_STEP = np.uint32(positions.BLOCK_STEP)


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
def _pack_bytes(fields, width, out):  # type: ignore[no-untyped-def]
    rows, count = fields.shape
    low = np.uint64(0xFFFFFFFF)
    for r in range(rows):
        t, lane = r // 32, r % 32
        held = np.uint64(0)
        have = 0
        w = 0
        for start in range(0, count, 8):
            eight = np.uint64(0)
            if start + 8 <= count:
                for j in range(8):
                    eight |= np.uint64(fields[r, start + j]) << np.uint64(8 * j)
            else:
                for j in range(count - start):
                    eight |= np.uint64(fields[r, start + j]) << np.uint64(8 * j)
            bits = _squeeze(eight, width)
            held |= (bits & low) << np.uint64(have)
            have += min(8 * width, 32)
            # The last eight may be short, and its missing fields may lie beyond the last word.
            if have >= 32 and w < out.shape[1]:
                out[t, w, lane] = np.uint32(held & low)
                w += 1
                held >>= np.uint64(32)
                have -= 32
            if width > 4:
                held |= (bits >> np.uint64(32)) << np.uint64(have)
                have += 8 * width - 32
                if have >= 32 and w < out.shape[1]:
                    out[t, w, lane] = np.uint32(held & low)
                    w += 1
                    held >>= np.uint64(32)
                    have -= 32
        if have and w < out.shape[1]:
            out[t, w, lane] = np.uint32(held & low)


@compiled
def _unpack(packed, count, width, out):  # type: ignore[no-untyped-def]
    mask = np.uint64((1 << width) - 1)
    for r in range(out.shape[0]):
        t, lane = r // 32, r % 32
        held = np.uint64(0)
        have = 0
        w = 0
        for i in range(count):
            if have < width:
                held |= np.uint64(packed[t, w, lane]) << np.uint64(have)
                have += 32
                w += 1
            out[r, i] = np.uint8(held & mask)
            held >>= np.uint64(width)
            have -= width


@compiled
def _mix(x):  # type: ignore[no-untyped-def]
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def _seeded(seed, first, keep, log_m, width, out):  # type: ignore[no-untyped-def]
    count, groups = out.shape[0], out.shape[1]
    per_hash = 32 // width
    mask = np.uint32((1 << log_m) - 1)
    lane_mask = np.uint32((1 << width) - 1)
    for r in range(count):
        key = _mix(np.uint32(np.uint32(seed) + np.uint32(np.uint32(first + r) * _ROW_STEP)))
        g = 0
        block = np.uint32(0)
        while g < groups:
            h = _mix(np.uint32(key + np.uint32(block * _BLOCK_STEP)))
            for _ in range(min(per_hash, groups - g)):
                lane = h & lane_mask
                h = np.uint32(h >> np.uint32(width))
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
    whole = columns // group
    for r in range(rows):
        m = r // share
        row = out[r]
        row[:] = np.float32(0)
        half = scales[r, 0] * np.float32(0.5)
        e = 0
        for g in range(groups):
            start = g * group
            for i in range(keep):
                if scale_group:
                    half = scales[r, e // scale_group] * np.float32(0.5)
                column = start + np.int64(pos[m, g, i])
                if g < whole or column < columns:
                    row[column] = np.float32(2 * np.int32(codes[r, e]) - top) * half
                e += 1


@compiled
def _subtract_bf16(finetuned, base, out):  # type: ignore[no-untyped-def]
    largest = np.int32(0)
    for start in range(0, out.size, 4096):  # three passes over what the first-level cache holds vectorize best
        f, b, o = finetuned[start : start + 4096], base[start : start + 4096], out[start : start + 4096]
        bits = o.view(np.int32)
        for i in range(o.size):
            o[i] = np.uint32(np.uint32(f[i]) << np.uint32(16)).view(np.float32)
        for i in range(o.size):
            o[i] -= np.uint32(np.uint32(b[i]) << np.uint32(16)).view(np.float32)
        for i in range(o.size):
            largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest < np.int32(0x7F800000)


@compiled
def _add_bf16(base, delta, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        total = np.float32(np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32) + delta[i])
        bits = np.float32(total).view(np.uint32)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded = (bits >> np.uint32(16)) | np.uint32(0x40)
        out[i] = base[i] if delta[i] == np.float32(0) else np.uint16(rounded)


def pack(fields: NDArray[np.unsignedinteger], width: int) -> NDArray[np.uint32]:
    """See :func:`deltafmt.codecs.words.pack`."""
    if not 1 <= width <= 8:
        return words.pack(fields, width)
    rows, count = fields.shape
    out = np.zeros((tiles(rows), stream_words(count, width), 32), np.uint32)
    _pack_bytes(fields.astype(np.uint8, copy=False), width, out)
    return out


def unpack(packed: NDArray[np.uint32], rows: int, count: int, width: int) -> NDArray[np.uint8]:
    """See :func:`deltafmt.codecs.words.unpack`; fields of at most 8 bits, as uint8."""
    out = np.empty((rows, count), np.uint8)
    _unpack(packed, count, width, out)
    return out


def seeded(seed: int, first: int, count: int, groups: int, keep: int, group: int) -> NDArray[np.uint8]:
    """See :func:`deltafmt.codecs.positions.seeded`."""
    out = np.empty((count, groups, keep), np.uint8)
    _seeded(np.uint32(seed), first, keep, group.bit_length() - 1, positions.lane_bits(keep, group), out)
    return out


def scatter(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    pos: NDArray[np.uint8],
    columns: int,
    group: int,
    share: int,
    top: int,
    scale_group: int,
) -> NDArray[np.float32]:
    """See :func:`deltafmt.codecs.scatter.scatter`."""
    out = np.empty((codes.shape[0], columns), np.float32)
    _scatter(codes, scales, pos, group, share, np.int32(top), scale_group, out)
    return out


def subtract(
    finetuned: floats.Raw, finetuned_dtype: str, base: floats.Raw, base_dtype: str
) -> tuple[floats.Floats, bool]:
    """See :func:`deltafmt.codecs.floats.subtract`."""
    if (finetuned_dtype, base_dtype) != ("BF16", "BF16"):
        return floats.subtract(finetuned, finetuned_dtype, base, base_dtype)
    out = np.empty(finetuned.shape, np.float32)
    finite = _subtract_bf16(finetuned.reshape(-1), base.reshape(-1), out.reshape(-1))
    return out, bool(finite)


def add(base: floats.Raw, base_dtype: str, delta: floats.Floats, dtype: str) -> floats.Raw:
    """See :func:`deltafmt.codecs.floats.add`."""
    if (base_dtype, dtype) != ("BF16", "BF16"):
        return floats.add(base, base_dtype, delta, dtype)
    out = np.empty(base.shape, np.uint16)
    _add_bf16(base.reshape(-1), delta.reshape(-1), out.reshape(-1))
    return out
