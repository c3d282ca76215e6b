"""The nm layout end to end: arrays to buffers and back, whole and in runs."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.terms.buffers import blank, views
from deltafmt.terms.floats import narrow
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm import hashing, scatter
from deltafmt.terms.nm.codec import NMArrays, slice_run
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.registry import parse_layout
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from nm_terms import pack
from strategies import examples, layouts, nm_arrays, shapes, sizes

SEEDS = st.integers(0, 2**32 - 1)


def assert_same(found: NMArrays, expected: NMArrays) -> None:
    """Compare positions, codes and the bits of the scales."""
    np.testing.assert_array_equal(found.positions, expected.positions, strict=True)
    np.testing.assert_array_equal(found.codes, expected.codes, strict=True)
    assert found.scales.shape == expected.scales.shape
    np.testing.assert_array_equal(found.scales.view(np.uint32), expected.scales.view(np.uint32), strict=True)


def dense_by_definition(layout: NMLayout, arrays: NMArrays, columns: int) -> NDArray[np.float32]:
    """Place every entry by itself; values from the design's formulas of the two grids."""
    rows = arrays.codes.shape[0]
    out = np.zeros((rows, columns), np.float32)
    half = 2 ** (layout.bits - 1)
    for row in range(rows):
        for entry in range(arrays.codes.shape[1]):
            g, i = divmod(entry, layout.n)
            column = g * layout.m + int(arrays.positions[row // layout.share, g, i])
            if column >= columns:
                continue
            scale = float(arrays.scales[row, entry // layout.scale_group if layout.scale_group else 0])
            code = int(arrays.codes[row, entry])
            value = (
                (code - (half - 1)) * scale if layout.grid == "midtread" else (2 * code - (2 * half - 1)) * scale / 2
            )
            out[row, column] = np.float32(value)
    return out


@examples(120)
@given(st.data(), layouts(), shapes(70, 200), SEEDS)
def test_buffers_hold_the_arrays(data: st.DataObject, layout: NMLayout, shape: tuple[int, int], seed: int) -> None:
    rows, columns = shape
    arrays = data.draw(nm_arrays(layout, rows, columns, seed))
    with running("numpy"):
        packed = pack(layout, arrays, rows, columns)
    lengths = layout.buffer_lengths(rows, columns)
    assert {name: array.nbytes for name, array in packed.items()} == lengths
    for implementation in COMPILED:
        with running(implementation):
            for name, array in pack(layout, arrays, rows, columns).items():
                np.testing.assert_array_equal(array, packed[name], strict=True)
    # From bytes, as a file gives them: read-only.
    read = views(layout, rows, columns, {name: memoryview(array.tobytes()) for name, array in packed.items()})
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            decoded = nm.decode(layout, read, seed, 0, rows, columns)
            assert_same(decoded, arrays)
            nm.check(layout, read, decoded, columns)
            assert_same(decoded, arrays)


@examples(50)
@given(st.data(), layouts(), sizes(150), SEEDS)
def test_runs_decode_as_the_whole(data: st.DataObject, layout: NMLayout, columns: int, seed: int) -> None:
    step = nm.run_rows(layout)
    rows = data.draw(st.integers(1, 2 * step + 40))
    arrays = data.draw(nm_arrays(layout, rows, columns, seed))
    packed = pack(layout, arrays, rows, columns)
    with running("numpy"):
        dense = nm.dense(layout, arrays, columns)
    pieces = blank(layout, rows, columns)
    starts = list(range(0, rows, step))
    for start, stop in zip(starts, [*starts[1:], rows], strict=True):
        masks = slice(start // layout.share, -(-stop // layout.share))
        part = NMArrays(arrays.positions[masks], arrays.codes[start:stop], arrays.scales[start:stop])
        run = slice_run(packed, layout.share, start, stop)
        for implementation in IMPLEMENTATIONS:
            with running(implementation):
                decoded = nm.decode(layout, run, seed, start, stop - start, columns)
                nm.check(layout, run, decoded, columns)
                assert_same(decoded, part)
                np.testing.assert_array_equal(nm.dense(layout, decoded, columns), dense[start:stop])
        nm.encode(layout, part, slice_run(pieces, layout.share, start, stop))
    for name, array in packed.items():
        np.testing.assert_array_equal(pieces[name], array, strict=True)


@examples(60)
@given(st.data(), layouts(max_m=64), shapes(12, 70), SEEDS)
def test_dense_is_the_definition(data: st.DataObject, layout: NMLayout, shape: tuple[int, int], seed: int) -> None:
    arrays = data.draw(nm_arrays(layout, *shape, seed))
    dense = nm.dense(layout, arrays, shape[1])
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, dense_by_definition(layout, arrays, shape[1]))


@needs_core
@examples(120)
@given(st.data(), layouts(), shapes(40, 300), SEEDS)
def test_compiled_dense_equals_the_reference(
    data: st.DataObject, layout: NMLayout, shape: tuple[int, int], seed: int
) -> None:
    arrays = data.draw(nm_arrays(layout, *shape, seed))
    with running("numpy"):
        expected = nm.dense(layout, arrays, shape[1])
    for implementation in COMPILED:
        with running(implementation):
            found = nm.dense(layout, arrays, shape[1])
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), strict=True)


@examples(60)
@given(st.data(), layouts("rank"), shapes(70, 200))
def test_rank_and_fixed_hold_the_same(data: st.DataObject, ranked: NMLayout, shape: tuple[int, int]) -> None:
    rows, columns = shape
    fixed = ranked.with_index("fixed")
    arrays = data.draw(nm_arrays(ranked, rows, columns))
    by_rank, by_position = pack(ranked, arrays, rows, columns), pack(fixed, arrays, rows, columns)
    mask_rows = ranked.mask_rows(rows)
    for name in ("codes", "scales"):
        np.testing.assert_array_equal(by_rank[name], by_position[name], strict=True)
    for source, target, index, expected in (
        (ranked, fixed, by_rank["index"], by_position["index"]),
        (fixed, ranked, by_position["index"], by_rank["index"]),
    ):
        found = nm.transcode_index(source, index.view(np.uint32), mask_rows, columns, target)
        np.testing.assert_array_equal(found, expected, strict=True)


def test_scale_group_beyond_the_row_takes_no_memory() -> None:
    # A layout in a file may give 2**31 - 1 here; what is allocated must follow the entries.
    codes, positions = np.zeros((1, 4), np.uint8), np.arange(4, dtype=np.uint8)[None, None]
    tracemalloc.start()
    try:
        scatter.scatter(codes, np.ones((1, 1), np.float32), positions, 16, 16, 1, 14, 2**22)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@examples(200)
@given(layouts())
def test_a_layout_comes_back_from_its_index_form(layout: NMLayout) -> None:
    obj = layout.to_obj()
    assert list(obj) == sorted(obj)
    assert parse_layout(obj, "layouts[0]") == layout


def test_a_warp_of_mask_rows_reads_its_rows_side_by_side() -> None:
    # What the arrangement is for: tile t of a super-tile holds row t of each of 32 mask rows, codes and scales alike.
    layout = NMLayout(1, 2, 8, share=4)
    rows = np.arange(256)
    codes = np.stack([rows % 251, rows // 251], axis=1).astype(np.uint8)
    scales = rows[:, None].astype(np.float32)
    arrays = NMArrays(hashing.seeded(0, 0, 64, 2, 1, 2), codes, scales)
    packed = pack(layout, arrays, 256, 4)
    for tile in range(8):
        expected = tile // 4 * 128 + np.arange(32) * 4 + tile % 4
        found = packed["codes"].view(np.uint32)[tile, 0]
        np.testing.assert_array_equal((found & 0xFF) + (found >> 8 & 0xFF) * 251, expected)
        np.testing.assert_array_equal(packed["scales"].view(np.uint16)[tile, 0], narrow(scales, "BF16")[expected, 0])


def test_buffers_of_a_ragged_term_have_whole_super_tiles() -> None:
    # 129 rows by 4: two super-tiles of 4 tiles. 40 entries of 3 bits: planes of 3 and 2 words; positions of 5: 5 and 2.
    lengths = NMLayout(1, 20, 3, "fixed", share=4, scale_dtype="F32").buffer_lengths(129, 800)
    assert lengths == {"codes": 8 * 5 * 128, "index": 2 * 7 * 128, "scales": 8 * 128}


def test_views_copy_nothing() -> None:
    layout = NMLayout(4, 16, 4, "fixed")
    buffers = {name: bytearray(size) for name, size in layout.buffer_lengths(37, 53).items()}
    read = views(layout, 37, 53, {name: memoryview(buffer) for name, buffer in buffers.items()})
    for buffer in buffers.values():
        buffer[0] = 1
    assert all(int(view.view(np.uint16 if view.itemsize == 2 else np.uint32)[0, 0, 0]) == 1 for view in read.values())
