"""What is not canonical in an nm term is refused, by every implementation and with the place of the fault."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.terms import words
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.registry import parse_layout
from deltafmt.terms.tiles import planes
from implementations import IMPLEMENTATIONS, running
from index_cases import INDEX_CASES
from nm_terms import Packed, pack
from strategies import examples, generators, layouts, nm_arrays

# Of every term that is spoiled below: lanes without a row, and a short last group for any M but 53.
ROWS, COLUMNS = 37, 53


def refuse(layout: NMLayout, arrays: NMArrays, spoil: Callable[[Packed], None], match: str) -> None:
    """Pack, check that the packing is accepted, spoil it, and check that every implementation refuses it."""
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            packed = pack(layout, arrays, ROWS, COLUMNS)
            nm.check(layout, packed, nm.decode(layout, packed, 5, 0, ROWS, COLUMNS), COLUMNS)
            spoil(packed)
            with pytest.raises(InvalidFileError, match=match):
                nm.check(layout, packed, nm.decode(layout, packed, 5, 0, ROWS, COLUMNS), COLUMNS)


def unused_bits(
    packed: Packed, name: str, layout: NMLayout, rng: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """List tile, word, lane and bit of unused bits: those behind a row's planes and those of lanes without a row."""
    array = packed[name]
    rows, share = (layout.mask_rows(ROWS), 1) if name == "index" else (ROWS, layout.share)
    bits = array.itemsize * 8
    total = array.shape[1] * bits
    if name == "scales":
        unused = []
    elif name == "codes":
        unused = unused_of_planes(layout.kept(COLUMNS), layout.bits)
    else:
        unused = unused_of_planes(*INDEX_CASES[layout.index].fields(layout, COLUMNS))
    behind = [(row, bit) for row in range(rows) for bit in unused]
    beyond = [(row, bit) for row in range(rows, array.shape[0] * 32) for bit in range(total)]
    chosen = [pool[i] for pool in (behind, beyond) if pool for i in rng.integers(len(pool), size=4)]
    return [
        (row // (32 * share) * share + row % share, bit // bits, row % (32 * share) // share, bit % bits)
        for row, bit in chosen
    ]


def unused_of_planes(count: int, width: int) -> list[int]:
    """List the bits of a row's words that no plane uses."""
    unused, first = [], 0
    for plane in planes(width):
        last = first + -(-count * plane // 32) * 32
        unused += range(first + count * plane, last)
        first = last
    return unused


@examples(60)
@given(st.data(), layouts(), generators())
def test_unused_bits_are_refused(data: st.DataObject, layout: NMLayout, rng: np.random.Generator) -> None:
    arrays = data.draw(nm_arrays(layout, ROWS, COLUMNS, 5))
    packed = pack(layout, arrays, ROWS, COLUMNS)
    for name, array in packed.items():
        if not array.size:
            continue
        raw = array.view(np.uint16 if array.itemsize == 2 else np.uint32)
        for tile, word, lane, bit in unused_bits(packed, name, layout, rng):
            raw[tile, word, lane] ^= raw.dtype.type(1 << bit)
            for implementation in IMPLEMENTATIONS:
                with running(implementation):
                    decoded = nm.decode(layout, packed, 5, 0, ROWS, COLUMNS)
                    with pytest.raises(InvalidFileError, match=f"unused bits of the {name}"):
                        nm.check(layout, packed, decoded, COLUMNS)
            raw[tile, word, lane] ^= raw.dtype.type(1 << bit)
    nm.check(layout, packed, nm.decode(layout, packed, 5, 0, ROWS, COLUMNS), COLUMNS)


def respoil(layout: NMLayout, change: Callable[[NDArray[np.uint64]], None]) -> Callable[[Packed], None]:
    """Return what rewrites the codes of a packed term after a change to the fields."""

    def spoil(packed: Packed) -> None:
        fields = words.unpack(packed["codes"].view(np.uint32), ROWS, layout.kept(COLUMNS), layout.bits, layout.share)
        change(fields)
        packed["codes"][...] = words.pack(fields, layout.bits, layout.share)

    return spoil


@examples(40)
@given(st.data(), layouts(), generators())
def test_a_field_beyond_the_midtread_grid_is_refused(
    data: st.DataObject, layout: NMLayout, rng: np.random.Generator
) -> None:
    if layout.grid != "midtread":
        layout = NMLayout(layout.n, layout.m, max(layout.bits, 2), layout.index, share=layout.share)
    arrays = data.draw(nm_arrays(layout, ROWS, COLUMNS, 5))
    row, entry = int(rng.integers(ROWS)), int(rng.integers(layout.kept(COLUMNS)))

    def change(fields: NDArray[np.uint64]) -> None:
        fields[row, entry] = 2**layout.bits - 1

    refuse(layout, arrays, respoil(layout, change), f"a code is {2**layout.bits - 1}, the grid ends at {layout.top}")


@examples(40)
@given(st.data(), layouts(), generators())
def test_a_field_beyond_the_last_column_is_refused(
    data: st.DataObject, layout: NMLayout, rng: np.random.Generator
) -> None:
    arrays = data.draw(nm_arrays(layout, ROWS, COLUMNS, 5))
    beyond = np.argwhere(nm.outside(layout, arrays, COLUMNS))
    assume(len(beyond))
    row, entry = (int(i) for i in beyond[rng.integers(len(beyond))])

    def change(fields: NDArray[np.uint64]) -> None:
        fields[row, entry] = 1

    refuse(layout, arrays, respoil(layout, change), "an entry beyond the last column has a code that is not zero")


@pytest.mark.parametrize("index", ENCODINGS)
@pytest.mark.parametrize("scale_group", [0, 5])
@pytest.mark.parametrize(
    ("scale_dtype", "bits"),
    [
        *(("BF16", bits) for bits in (0x8000, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF)),
        *(("F32", bits) for bits in (0x80000000, 0x80000001, 0xBF800000, 0x7F800000, 0x7FC00000, 0x7F800001)),
    ],
)
def test_a_scale_that_is_negative_or_not_finite_is_refused(
    index: str, scale_group: int, scale_dtype: str, bits: int
) -> None:
    layout = NMLayout(4, 16, 4, index, share=2, scale_dtype=scale_dtype, scale_group=scale_group)
    mask_rows, groups = layout.mask_rows(ROWS), layout.groups(COLUMNS)
    positions = INDEX_CASES[index].positions(np.random.default_rng(0), layout, 5, mask_rows, groups)
    scales = np.ones((ROWS, layout.scales_per_row(COLUMNS)), np.float32)
    arrays = NMArrays(positions, np.zeros((ROWS, layout.kept(COLUMNS)), np.uint8), scales)

    def spoil(packed: Packed) -> None:
        packed["scales"].view(np.uint16 if scale_dtype == "BF16" else np.uint32)[1, -1, 4] = bits

    refuse(layout, arrays, spoil, "a scale is negative or not finite")


@examples(40)
@given(st.data(), layouts("fixed"), generators())
def test_a_fixed_index_that_does_not_ascend_is_refused(
    data: st.DataObject, layout: NMLayout, rng: np.random.Generator
) -> None:
    arrays = data.draw(nm_arrays(layout, ROWS, COLUMNS))
    row, g = int(rng.integers(layout.mask_rows(ROWS))), int(rng.integers(layout.groups(COLUMNS)))
    wrong = arrays.positions.copy()
    if layout.n > 1:
        wrong[row, g] = wrong[row, g, ::-1] if rng.random() < 0.5 else wrong[row, g, :1]
    else:
        assume(layout.m < 2**layout.position_bits)
        wrong[row, g, 0] = layout.m

    def spoil(packed: Packed) -> None:
        packed["index"][...] = words.pack(wrong.reshape(wrong.shape[0], -1), layout.position_bits)

    refuse(layout, arrays, spoil, f"mask row {row}, group {g}: entry")


@examples(40)
@given(st.data(), layouts("rank"), generators())
def test_a_rank_beyond_the_last_subset_is_refused(
    data: st.DataObject, layout: NMLayout, rng: np.random.Generator
) -> None:
    total = math.comb(layout.m, layout.n)
    assume(total < 2**layout.rank_bits)
    arrays = data.draw(nm_arrays(layout, ROWS, COLUMNS))
    row, g = int(rng.integers(layout.mask_rows(ROWS))), int(rng.integers(layout.groups(COLUMNS)))

    def spoil(packed: Packed) -> None:
        index = packed["index"].view(np.uint32)
        ranks = words.unpack(index, layout.mask_rows(ROWS), layout.groups(COLUMNS), layout.rank_bits)
        ranks[row, g] = total
        index[...] = words.pack(ranks, layout.rank_bits)

    refuse(layout, arrays, spoil, f"mask row {row}, group {g}: rank {total} is not below {total}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 7}, "bits k = 7"),
        ({"bits": 0}, "bits k = 0"),
        ({"bits": True}, "True is not an integer"),
        ({"bits": 1}, "midtread grid of 1 bit"),
        ({"keep": 0}, "N = 0"),
        ({"keep": 17}, "N = 17"),
        ({"group": 1, "keep": 1}, "M = 1"),
        ({"group": 256}, "M = 256"),
        ({"group": 24}, "power of two"),
        ({"group": 128.0}, "128.0 is not an integer"),
        ({"share": 3}, "share v = 3"),
        ({"share": 16}, "share v = 16"),
        ({"grid": "other"}, "grid 'other'"),
        ({"index": "other"}, "index encoding 'other'"),
        ({"index": "rank", "group": 68, "keep": 34}, "below 2\\*\\*64"),
        ({"scale_dtype": "F16"}, "scale dtype 'F16'"),
        ({"scale_group": -1}, "scale group -1"),
        ({"scale_group": 2**31}, "scale group 2147483648"),
        ({"kind": "ternary"}, "unknown layout 'ternary'"),
        ({"extra": 1}, "expected the keys"),
    ],
)
def test_a_layout_outside_the_specification_is_refused(change: dict[str, object], match: str) -> None:
    obj = NMLayout(4, 16, 4).to_obj() | change
    with pytest.raises(InvalidFileError, match=match):
        parse_layout(obj, "layouts[3]")
    fields = {"keep": "n", "group": "m"}
    known = {fields.get(key, key): value for key, value in obj.items() if key not in ("kind", "extra")}
    if all(type(value) in (int, str) for value in known.values()) and "kind" not in change and "extra" not in change:
        with pytest.raises(UsageError):
            NMLayout(**known)
