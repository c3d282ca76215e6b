"""The ``sparse`` layout: entries to buffers and back, in runs, by definition; the refusal of what is not canonical."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.terms.buffers import blank, views
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import widen
from deltafmt.terms.registry import parse_layout
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays
from implementations import IMPLEMENTATIONS, running
from strategies import examples, generators, shapes, sparse_arrays, sparse_layouts

Packed = dict[str, NDArray[np.generic]]


def pack(layout: SparseLayout, arrays: SparseArrays, rows: int, columns: int) -> tuple[Packed, int]:
    """Encode entries into buffers of their own; return them and the number of slots."""
    layout, slots = fitted(layout, arrays, columns)
    packed = blank(layout, rows, columns, slots)
    term_codec(layout, rows, columns, 0, slots).encode(arrays, packed, 0)
    return packed, slots


def by_definition(layout: SparseLayout, arrays: SparseArrays, rows: int, columns: int) -> NDArray[np.float32]:
    """Place every entry by itself."""
    out = np.zeros((rows, columns), np.float32)
    start = 0
    for row, end in enumerate(arrays.ends):
        for entry in range(start, end):
            value = arrays.values[entry]
            if isinstance(layout.values, str):
                out[row, arrays.columns[entry]] = widen(arrays.values[entry : entry + 1], layout.values)[0]
            else:
                half = np.float32(arrays.scales[row, 0] * np.float32(0.5))
                out[row, arrays.columns[entry]] = np.float32(2 * int(value) - layout.values.top) * half
        start = end
    return out


def slots_by_definition(layout: SparseLayout, arrays: SparseArrays, rows: int, columns: int) -> list[int]:
    """Count, for every tile and block, what its fullest row takes: an entry each, and fillers before it."""
    counts = []
    for tile in range(0, rows, 32):
        for start in range(0, columns, layout.span):
            most = 0
            for row in range(tile, min(tile + 32, rows)):
                own = arrays.columns[(arrays.ends[row - 1] if row else 0) : arrays.ends[row]]
                taken, after = 0, start
                for column in own[(own >= start) & (own < start + layout.span)]:
                    taken += (column - after) // layout.filler + 1
                    after = column + 1
                most = max(most, taken)
            counts.append(most)
    return counts


@examples(150)
@given(st.data(), sparse_layouts(), shapes(70, 700))
def test_entries_come_back_whatever_the_runs(data: st.DataObject, layout: SparseLayout, shape: tuple[int, int]) -> None:
    rows, columns = shape
    arrays = data.draw(sparse_arrays(layout, rows, columns))
    packed, slots = pack(layout, arrays, rows, columns)
    assert {name: array.nbytes for name, array in packed.items()} == layout.buffer_lengths(rows, columns, slots)
    assert list(packed) == sorted(packed)
    assert np.diff(packed["starts"].astype(np.int64)).tolist() == slots_by_definition(layout, arrays, rows, columns)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            for name, array in pack(layout, arrays, rows, columns)[0].items():
                np.testing.assert_array_equal(array, packed[name], strict=True)
    buffers = {name: memoryview(array.tobytes()) for name, array in packed.items()}
    read = views(layout, rows, columns, buffers, slots)
    expected = by_definition(layout, arrays, rows, columns).view(np.uint32)
    codec = term_codec(layout, rows, columns, 0, slots)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            found = codec.decode(read, 0, rows, check_form=True)
            np.testing.assert_array_equal(found.view(np.uint32), expected)
            for start in range(0, rows, 32):
                stop = min(start + 32, rows)
                found = codec.decode(read, start, stop, check_form=True)
                np.testing.assert_array_equal(found.view(np.uint32), expected[start:stop])


@examples(200)
@given(sparse_layouts(), shapes(70, 700), st.integers(0, 500), st.booleans(), generators())
def test_any_bytes_give_an_array_or_an_error(
    layout: SparseLayout,
    shape: tuple[int, int],
    slots: int,
    ordered: bool,
    rng: np.random.Generator,
) -> None:
    rows, columns = shape
    slots = min(slots, -(-rows // 32) * columns)
    lengths = layout.buffer_lengths(rows, columns, slots)
    buffers = {name: memoryview(bytearray(rng.bytes(size))) for name, size in lengths.items()}
    packed = views(layout, rows, columns, buffers, slots)
    if ordered:
        packed["starts"][...] = np.sort(rng.integers(0, slots, packed["starts"].size, endpoint=True))
        packed["starts"][0], packed["starts"][-1] = 0, slots
        packed["gaps"][rng.random(packed["gaps"].shape) < 0.9] = 0xFFFFFFFF
    codec = term_codec(layout, rows, columns, 0, slots)
    found: list[NDArray[np.uint32] | str] = []
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            for check in (False, True):
                try:
                    found.append(codec.decode(packed, 0, rows, check_form=check).view(np.uint32))
                    assert found[-1].shape == shape
                except InvalidFileError as error:
                    found.append(str(error))
    for number, other in enumerate(found[2:]):
        np.testing.assert_array_equal(found[number % 2], other)


@examples(100)
@given(st.data(), sparse_layouts(), generators())
def test_what_is_not_canonical_is_refused(data: st.DataObject, layout: SparseLayout, rng: np.random.Generator) -> None:
    """Another bit is another matrix, or it is refused."""
    rows, columns = 37, 300
    arrays = data.draw(sparse_arrays(layout, rows, columns))
    packed, slots = pack(layout, arrays, rows, columns)
    codec = term_codec(layout, rows, columns, 0, slots)
    before = codec.decode(packed, 0, rows, check_form=True)
    name = str(rng.choice([name for name, array in packed.items() if array.size]))
    raw = packed[name].reshape(-1).view(np.uint8)
    raw[rng.integers(raw.size)] ^= np.uint8(1 << rng.integers(8))
    try:
        after = codec.decode(packed, 0, rows, check_form=True)
    except InvalidFileError:
        return
    hidden = arrays.scales is not None and (name == "scales" or not arrays.scales.all())
    # A midtread level of zero leaves no trace of where it stands.
    zeros = not isinstance(layout.values, str) and layout.values.grid == "midtread"
    zeros = zeros or (isinstance(layout.values, str) and bool((widen(arrays.values, layout.values) == 0).any()))
    assert hidden or zeros or not np.array_equal(before.view(np.uint32), after.view(np.uint32))


def test_a_block_that_starts_in_the_middle_of_a_word() -> None:
    """Three tiles, each of a number of slots that is no multiple of what a word holds."""
    layout = SparseLayout(Coding(3), 5, 256)
    rng = np.random.default_rng(0)
    kept = rng.random((96, 600)) < 0.013
    columns = np.nonzero(kept)[1]
    codes = rng.integers(0, 6, columns.size, np.uint8, endpoint=True)
    arrays = SparseArrays(np.cumsum(kept.sum(axis=1)), columns, codes, np.ones((96, 1), np.float32))
    packed, slots = pack(layout, arrays, 96, 600)
    assert any(start % 32 for start in packed["starts"][::3])
    found = term_codec(layout, 96, 600, 0, slots).decode(packed, 0, 96, check_form=True)
    np.testing.assert_array_equal(found, by_definition(layout, arrays, 96, 600))


@given(sparse_layouts())
def test_layouts_are_read_as_they_are_written(layout: SparseLayout) -> None:
    assert parse_layout(layout.to_obj(), "layouts[0]") == layout
    assert list(layout.to_obj()) == sorted(layout.to_obj())
    assert layout.describe()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SparseLayout("F64"), "dtype of values 'F64'"),
        (lambda: SparseLayout("F32", 9), "gap bits 9"),
        (lambda: SparseLayout("F32", 0), "gap bits 0"),
        (lambda: SparseLayout("F32", 8, 128), "span 128"),
        (lambda: SparseLayout("F32", 8, 2**17), "span 131072"),
        (lambda: SparseLayout(Coding(4, scale_group=8)), "one scale a row"),
        (lambda: SparseLayout(Coding(4, "asymmetric")), "no zero points"),
        (lambda: SparseLayout("F32").buffers(33, 100, 201), "201 slots are more than 200"),
        (lambda: SparseLayout("F32").buffers(2**30, 2**18, 2**32), "4294967296 slots are more than 4294967295"),
    ],
)
def test_parameters_outside_the_specification_are_refused(make, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()
