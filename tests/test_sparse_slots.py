"""The loops of the ``sparse`` kind: entries to slots and back, compiled and as numpy, whatever a file says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms.coding import Coding
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays, block_starts, place, write_tile
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from strategies import SPECIAL_BITS, examples, generators, shapes, sparse_arrays, sparse_layouts


@needs_core
@examples(150)
@given(st.data(), sparse_layouts(), shapes(70, 700), st.booleans())
def test_compiled_placing_equals_the_reference(
    data: st.DataObject, layout: SparseLayout, shape: tuple[int, int], strided: bool
) -> None:
    arrays = data.draw(sparse_arrays(layout, *shape))
    starts = block_starts.reference(layout, arrays, shape[1])
    gaps, placed = place.reference(layout, arrays, shape[1], starts)
    given_arrays = arrays
    if strided:
        doubled = {name: np.repeat(getattr(arrays, name), 2)[::2] for name in ("ends", "columns", "values")}
        given_arrays = replace(arrays, **doubled)
    for implementation in COMPILED:
        with running(implementation):
            found_starts = block_starts(layout, given_arrays, shape[1])
            found_gaps, found_placed = place(layout, given_arrays, shape[1], starts)
        np.testing.assert_array_equal(found_starts, starts, strict=True)
        np.testing.assert_array_equal(found_gaps, gaps, strict=True)
        np.testing.assert_array_equal(found_placed, placed, strict=True)


def tiles_of(
    layout: SparseLayout, arrays: SparseArrays, shape: tuple[int, int]
) -> list[tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.generic], NDArray[np.float32] | None, int]]:
    """Return the gaps, starts, values and scales of every tile, and how many rows of it exist."""
    rows, columns = shape
    starts = block_starts.reference(layout, arrays, columns)
    gaps, placed = place.reference(layout, arrays, columns, starts)
    blocks = layout.blocks(columns)
    found = []
    for tile in range(-(-rows // 32)):
        own = starts[tile * blocks : (tile + 1) * blocks + 1]
        run = slice(int(own[0]), int(own[-1]))
        coded = isinstance(layout.values, Coding)
        values = np.ascontiguousarray(placed[:, run]) if coded else placed[run].copy()
        lanes = min(rows - tile * 32, 32)
        scales = None
        if coded:
            assert arrays.scales is not None
            scales = np.zeros(32, np.float32)
            scales[:lanes] = arrays.scales[tile * 32 :][:lanes, 0]
        found.append((np.ascontiguousarray(gaps[:, run]), own - own[0], values, scales, lanes))
    return found


def spoil(
    layout: SparseLayout, gaps: NDArray[np.generic], values: NDArray[np.generic], rng: np.random.Generator, what: str
) -> None:
    """Change some gaps, or some values, to anything that their fields can hold."""
    if not gaps.size:
        return
    count = int(rng.integers(1, 4))
    if what == "gaps":
        at = rng.integers(gaps.size, size=count)
        gaps.reshape(-1)[at] = rng.integers(0, layout.filler, count, endpoint=True)
    elif what == "values":
        at = rng.integers(values.size, size=count)
        if isinstance(layout.values, Coding):
            values.reshape(-1)[at] = rng.integers(0, 256, count)
        else:
            values.reshape(-1)[at] = rng.choice(np.array(SPECIAL_BITS[layout.values], values.dtype), count)
    elif what == "all gaps":
        gaps[...] = rng.integers(0, layout.filler, gaps.shape, endpoint=True)
        gaps[rng.random(gaps.shape) < 0.5] = layout.filler


@needs_core
@examples(200)
@given(
    st.data(),
    sparse_layouts(),
    shapes(70, 700),
    st.sampled_from(("nothing", "gaps", "values", "all gaps")),
    generators(),
)
def test_compiled_writing_of_a_tile_equals_the_reference(
    data: st.DataObject, layout: SparseLayout, shape: tuple[int, int], what: str, rng: np.random.Generator
) -> None:
    arrays = data.draw(sparse_arrays(layout, *shape))
    for gaps, starts, values, scales, lanes in tiles_of(layout, arrays, shape):
        spoil(layout, gaps, values, rng, what)
        found: list[NDArray[np.uint32] | str] = []
        for implementation in IMPLEMENTATIONS:
            out = np.zeros((lanes, shape[1]), np.float32)
            with running(implementation):
                try:
                    write_tile(layout, gaps, starts, values, scales, out)
                    found.append(out.view(np.uint32))
                except InvalidFileError as error:
                    found.append(str(error))
        assert what != "nothing" or not isinstance(found[0], str)
        for other in found[1:]:
            assert type(other) is type(found[0])
            np.testing.assert_array_equal(other, found[0])


@examples(30)
@given(st.data(), sparse_layouts(), shapes(70, 500))
def test_a_tile_without_entries_stays_zero(data: st.DataObject, layout: SparseLayout, shape: tuple[int, int]) -> None:
    arrays = data.draw(sparse_arrays(layout, *shape))
    none = replace(arrays, ends=np.zeros_like(arrays.ends), columns=arrays.columns[:0], values=arrays.values[:0])
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            starts = block_starts(layout, none, shape[1])
            assert not starts.any()
            gaps, placed = place(layout, none, shape[1], starts)
            assert gaps.size == placed.size == 0
            out = np.zeros((min(shape[0], 32), shape[1]), np.float32)
            scales = np.ones(32, np.float32) if isinstance(layout.values, Coding) else None
            write_tile(layout, gaps, np.zeros(layout.blocks(shape[1]) + 1, np.int64), placed, scales, out)
            assert not out.any()
