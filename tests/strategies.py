"""Hypothesis strategies for the values that deltafmt works on: layouts, ragged arrays, float bit patterns, deltas."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.terms.coding import CODING_GRIDS, Coding
from deltafmt.terms.floats import RAW_DTYPES, Raw, narrow, widen
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import RAW_FACTORS, LowRankLayout
from deltafmt.terms.nm.codec import NMArrays, outside
from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.nm.layout import BITS, MAX_M, SHARES, NMLayout
from deltafmt.terms.sparse.layout import GAP_BITS, RAW_VALUES, SPANS, SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays
from index_cases import INDEX_CASES

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


def same_examples(count: int) -> settings:
    """Return the settings of a slow property: the same ``count`` examples each time, and none made smaller."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


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


@st.composite
def layouts(draw: st.DrawFn, index: str | None = None, max_m: int = MAX_M, **fixed: Any) -> NMLayout:
    """Give any valid layout.

    Args:
        draw: hypothesis's.
        index: draw this encoding only.
        max_m: the largest M.
        fixed: other fields of the layout that are given.
    """
    index = index or draw(st.sampled_from(list(ENCODINGS)))
    m = fixed["m"] if "m" in fixed else draw(INDEX_CASES[index].m(max_m))
    bits = fixed.get("bits") or draw(st.sampled_from(BITS))
    drawn = {
        "n": st.sampled_from(INDEX_CASES[index].n(m)),
        "grid": st.sampled_from(("midrise",) if bits == 1 else ("midtread", "midrise")),
        "share": st.sampled_from(SHARES),
        "scale_dtype": st.sampled_from(("BF16", "F32")),
        "scale_group": st.one_of(st.just(0), st.integers(1, 300)),
    }
    chosen = {name: fixed[name] if name in fixed else draw(strategy) for name, strategy in drawn.items()}
    return NMLayout(m=m, bits=bits, index=index, **chosen)


GRIDS_OF_BITS = {1: ("midrise", "asymmetric")}
CODING_FIELDS = ("bits", "grid", "scale_dtype", "scale_group")


@st.composite
def codings(draw: st.DrawFn) -> Coding:
    """Give any way to code a row of numbers."""
    bits = draw(st.integers(1, 8))
    grid = draw(st.sampled_from(GRIDS_OF_BITS.get(bits, CODING_GRIDS)))
    group = draw(st.one_of(st.just(0), st.integers(1, 300), st.sampled_from((32, 64, 128))))
    return Coding(bits, grid, draw(st.sampled_from(("BF16", "F32"))), group)


@st.composite
def lowbit_layouts(draw: st.DrawFn) -> LowbitLayout:
    """Give any valid ``lowbit`` layout."""
    coding = draw(codings())
    if coding.grid != "asymmetric" and draw(st.booleans()):
        return LowbitLayout(coding.bits, coding.grid, coding.scale_dtype, 0, "column")
    return LowbitLayout(*(getattr(coding, name) for name in CODING_FIELDS))


def lowrank_layouts() -> st.SearchStrategy[LowRankLayout]:
    """Give any valid ``lowrank`` layout of a small rank."""
    return st.builds(LowRankLayout, st.integers(1, 70), st.one_of(codings(), st.sampled_from(tuple(RAW_FACTORS))))


@st.composite
def sparse_layouts(draw: st.DrawFn) -> SparseLayout:
    """Give any valid ``sparse`` layout."""
    values: Coding | str = draw(st.sampled_from(RAW_VALUES))
    if draw(st.booleans()):
        bits = draw(st.integers(1, 8))
        grid = draw(st.sampled_from(("midrise",) if bits == 1 else ("midtread", "midrise")))
        values = Coding(bits, grid, draw(st.sampled_from(("BF16", "F32"))))
    return SparseLayout(values, draw(st.sampled_from(GAP_BITS)), draw(st.sampled_from(SPANS)))


@st.composite
def sparse_arrays(draw: st.DrawFn, layout: SparseLayout, rows: int, columns: int) -> SparseArrays:
    """Give canonical content of a ``sparse`` term; rows, or the whole, may be empty."""
    rng = draw(generators())
    density = draw(st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0)))
    kept = rng.random((rows, columns)) < density * rng.random((rows, 1)) * 2
    column = np.nonzero(kept)[1]
    ends = np.cumsum(kept.sum(axis=1))
    coding = layout.values
    if isinstance(coding, str):
        return SparseArrays(ends, column, ordinary_raws(rng, coding, (column.size,)))
    codes = rng.integers(0, coding.top, column.size, np.uint8, endpoint=True)
    return SparseArrays(ends, column, codes, random_scales(rng, (rows, 1), coding.scale_dtype))


def fitting(layout: TermLayout, rows: int, columns: int) -> TermLayout:
    """Return a layout of as many vectors as a matrix of this shape may have."""
    if isinstance(layout, LowRankLayout):
        return LowRankLayout(min(layout.rank, rows, columns), layout.factors)
    return layout


def dense_layouts() -> st.SearchStrategy[TermLayout]:
    """Give layouts of the kinds that have neither an index nor slots; see :func:`fitting`."""
    return st.one_of(lowbit_layouts(), lowrank_layouts())


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float32]:
    """Draw scales of every size that a dtype holds exactly, some of them zero."""
    scales = rng.random(shape, np.float32)
    scales *= np.float32(2) ** rng.integers(-100, 100, shape).astype(np.float32)
    scales[rng.random(shape) < 0.1] = 0
    return widen(narrow(scales, "BF16"), "BF16") if dtype == "BF16" else scales


def coded(rng: np.random.Generator, coding: Coding, rows: int, columns: int, per_column: bool = False) -> LowbitArrays:
    """Draw canonical codes, scales and zero points."""
    codes = rng.integers(0, coding.top, (rows, columns), np.uint8, endpoint=True)
    shape = (1, columns) if per_column else (rows, coding.scales(columns))
    zero_points = rng.integers(0, coding.top, shape, np.uint8, endpoint=True) if coding.has_zero_points else None
    return LowbitArrays(codes, random_scales(rng, shape, coding.scale_dtype), zero_points)


@st.composite
def dense_arrays(draw: st.DrawFn, layout: TermLayout, rows: int, columns: int) -> LowbitArrays | LowRankArrays:
    """Give canonical content of a ``lowbit`` or ``lowrank`` term."""
    rng = draw(generators())
    if isinstance(layout, LowbitLayout):
        return coded(rng, layout, rows, columns, layout.axis == "column")
    assert isinstance(layout, LowRankLayout)
    coding = layout.factors
    if isinstance(coding, str):
        return LowRankArrays(*(ordinary_raws(rng, coding, (layout.rank, length)) for length in (rows, columns)))
    return LowRankArrays(*(coded(rng, coding, layout.rank, length) for length in (rows, columns)))


@st.composite
def nm_arrays(draw: st.DrawFn, layout: NMLayout, rows: int, columns: int, seed: int = 0) -> NMArrays:
    """Give canonical content of a term: what :func:`deltafmt.terms.nm.codec.check` must accept."""
    rng = draw(generators())
    mask_rows, groups = layout.mask_rows(rows), layout.groups(columns)
    kept_at = INDEX_CASES[layout.index].positions(rng, layout, seed, mask_rows, groups)
    codes = rng.integers(0, layout.top, (rows, layout.kept(columns)), np.uint8, endpoint=True)
    scales = random_scales(rng, (rows, layout.scales_per_row(columns)), layout.scale_dtype)
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
