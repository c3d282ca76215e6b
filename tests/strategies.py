"""Hypothesis strategies for the values that deltafmt works on: layouts, ragged arrays, float bit patterns, deltas."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.codecs import positions as pos
from deltafmt.codecs.floats import RAW_DTYPES, Raw, narrow, widen
from deltafmt.codecs.nm import NMArrays, outside
from deltafmt.layout.nm import BITS, INDEX_ENCODINGS, MAX_GROUP, SHARES, NMLayout

FLOAT_DTYPES = tuple(RAW_DTYPES)
# What a float's bits can hold beyond ordinary numbers: both zeros, the subnormals' ends, the largest, infinities and
# NaNs, quiet and signaling, with a payload.
SPECIAL_BITS = {
    "BF16": (0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFD5),
    "F16": (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFF55),
    "F32": (
        *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),
        *(0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFD51234),
    ),
}


def examples(count: int) -> settings:
    """Return the settings of a property that is tried ``count`` times."""
    return settings(max_examples=count, deadline=None)


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Give numpy generators: one drawn integer stands for a whole array."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def sizes(limit: int) -> st.SearchStrategy[int]:
    """Give sizes from 1 to ``limit``, often beside a multiple of 32."""
    beside = [n for m in range(32, limit, 32) for n in (m - 1, m, m + 1) if n <= limit]
    anything = st.integers(1, limit)
    return st.one_of(anything, st.sampled_from(beside)) if beside else anything


def shapes(max_rows: int = 70, max_columns: int = 300) -> st.SearchStrategy[tuple[int, int]]:
    """Give ragged numbers of rows and columns."""
    return st.tuples(sizes(max_rows), sizes(max_columns))


@cache
def _rankable(group: int) -> tuple[int, ...]:
    return tuple(keep for keep in range(1, group + 1) if math.comb(group, keep) < 2**64)


@st.composite
def layouts(draw: st.DrawFn, index: str | None = None, max_group: int = MAX_GROUP, **fixed: Any) -> NMLayout:
    """Give any valid layout.

    Args:
        draw: hypothesis's.
        index: draw this encoding only.
        max_group: the largest M.
        fixed: other fields of the layout that are given.
    """
    index = index or draw(st.sampled_from(INDEX_ENCODINGS))
    if "group" in fixed:
        group = fixed["group"]
    elif index == "seeded":
        group = 2 ** draw(st.integers(1, min(7, max_group.bit_length() - 1)))
    else:
        group = draw(st.one_of(st.integers(2, min(max_group, 20)), st.integers(2, max_group)))
    bits = fixed.get("bits") or draw(st.sampled_from(BITS))
    drawn = {
        "keep": st.sampled_from(_rankable(group)) if index == "rank" else st.integers(1, group),
        "grid": st.sampled_from(("midrise",) if bits == 1 else ("midtread", "midrise")),
        "share": st.sampled_from(SHARES),
        "scale_dtype": st.sampled_from(("BF16", "F32")),
        "scale_group": st.one_of(st.just(0), st.integers(1, 300)),
    }
    chosen = {name: fixed[name] if name in fixed else draw(strategy) for name, strategy in drawn.items()}
    return NMLayout(group=group, bits=bits, index=index, **chosen)


def ascending(rng: np.random.Generator, mask_rows: int, groups: int, keep: int, group: int) -> NDArray[np.uint8]:
    """Draw N of M positions for every group, in order."""
    shuffled = np.argsort(rng.random((mask_rows, groups, group)), axis=2)
    return np.sort(shuffled[:, :, :keep], axis=2).astype(np.uint8)


@st.composite
def nm_arrays(draw: st.DrawFn, layout: NMLayout, rows: int, columns: int, seed: int = 0) -> NMArrays:
    """Give canonical content of a term: what :func:`deltafmt.codecs.nm.check` must accept."""
    rng = draw(generators())
    mask_rows, groups = layout.mask_rows(rows), layout.groups(columns)
    if layout.index == "seeded":
        kept_at = pos.seeded(seed, 0, mask_rows, groups, layout.keep, layout.group)
    else:
        kept_at = ascending(rng, mask_rows, groups, layout.keep, layout.group)
    codes = rng.integers(0, layout.top, (rows, layout.kept(columns)), np.uint8, endpoint=True)
    scales = rng.random((rows, layout.scales_per_row(columns)), np.float32)
    scales *= np.float32(2) ** rng.integers(-100, 100, scales.shape).astype(np.float32)
    scales[rng.random(scales.shape) < 0.1] = 0
    if layout.scale_dtype == "BF16":
        scales = widen(narrow(scales, "BF16"), "BF16")
    arrays = NMArrays(kept_at, codes, scales)
    codes[outside(layout, arrays, columns)] = 0
    return arrays


@st.composite
def deltas(draw: st.DrawFn, rows: int, columns: int) -> NDArray[np.float32]:
    """Give finite float32 deltas; whole rows may be zero, constant, tiny (subnormal too) or huge."""
    rng = draw(generators())
    delta = rng.standard_normal((rows, columns), np.float32)
    exponent = draw(st.sampled_from((0, -8, -60, -110, -140, 100)))
    delta = np.ldexp(delta, exponent)
    for factor in (0.0, 2.0**-30, 2.0**-105, 2.0**20):
        if draw(st.booleans()):
            delta[rng.random(rows) < 0.2] *= np.float32(factor)
    if draw(st.booleans()):
        delta[rng.random(rows) < 0.2] = np.float32(0.125)
    delta[rng.random(delta.shape) < draw(st.sampled_from((0.0, 0.02, 0.6)))] = 0
    return delta


def special_raws(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Raw:
    """Draw raw arrays of any bit patterns, every special one among them if there is room."""
    raw_dtype = RAW_DTYPES[dtype]
    raw = rng.integers(0, np.iinfo(raw_dtype).max, shape, raw_dtype, endpoint=True)
    some = rng.random(shape) < 0.3
    raw[some] = rng.choice(np.array(SPECIAL_BITS[dtype], raw_dtype), int(some.sum()))
    return raw


def ordinary_raws(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], scale: float = 0.05) -> Raw:
    """Draw raw arrays as weights are: normal numbers with some zeros of both signs."""
    values = rng.standard_normal(shape, np.float32) * np.float32(scale)
    values[rng.random(shape) < 0.05] *= np.float32(0)
    return narrow(values, dtype)


@st.composite
def raws(draw: st.DrawFn, dtype: str, shape: tuple[int, ...], *, finite: bool = False) -> Raw:
    """Give raw BF16, F16 or F32 arrays: ordinary weights, or (unless ``finite``) any bit patterns."""
    rng = draw(generators())
    if finite or draw(st.booleans()):
        return ordinary_raws(rng, dtype, shape)
    return special_raws(rng, dtype, shape)
