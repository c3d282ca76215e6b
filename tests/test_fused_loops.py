"""The loops that do several steps in one pass: packing what is kept, and adding a packed run to its base."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import InvalidFileError, NonFiniteError, UsageError
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.pack_kept import pack_kept
from deltafmt.methods.quantize import SCALE_RULES, quantize
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import term_codec
from deltafmt.terms.floats import RAW_DTYPES, Raw, narrow, widen
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from index_cases import INDEX_CASES
from nm_terms import Packed, pack
from strategies import FLOAT_DTYPES, SPECIAL_BITS, examples, generators, layouts, nm_arrays, ordinary_raws, raws, shapes

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from(FLOAT_DTYPES)


@st.composite
def sides(draw: st.DrawFn, shape: tuple[int, int]) -> DeltaRows:
    """Give a run of rows of any dtypes: mostly weights, of which a few, or all, may have any bits."""
    rng = draw(generators())
    kinds = draw(st.tuples(DTYPES, DTYPES))
    found = []
    for dtype in kinds:
        scale = draw(st.sampled_from((0.05, 2.0**-20, 2.0**15)))
        raw = ordinary_raws(rng, dtype, shape, scale)
        if draw(st.integers(0, 4)) == 0:
            raw = draw(raws(dtype, shape))
        elif draw(st.integers(0, 4)) == 0:
            row, column = (int(rng.integers(size)) for size in shape)
            raw[row, column] = draw(st.sampled_from(SPECIAL_BITS[dtype]))
        if draw(st.booleans()):
            raw[rng.random(shape[0]) < 0.2] = 0
        raw.flags.writeable = False
        found.append(raw)
    (finetuned, base), (finetuned_dtype, base_dtype) = found, kinds
    return DeltaRows(finetuned, finetuned_dtype, base, base_dtype, 32 * draw(st.integers(0, 4)), "w")


def packed_or_refused(rows: DeltaRows, positions: np.ndarray, layout: NMLayout, rule: str, factor: float) -> object:
    """Return the bytes of every buffer, or what is refused."""
    packed = blank(layout, *rows.shape)
    try:
        pack_kept(rows, positions, layout, rule, np.float32(factor), packed)
    except (NonFiniteError, UsageError) as error:
        return type(error), str(error)
    return {name: array.tobytes() for name, array in packed.items()}


@needs_core
@examples(250)
@given(st.data(), layouts(), shapes(70, 300), st.sampled_from(SCALE_RULES), SEEDS, generators())
def test_packing_in_one_pass_is_packing_in_steps(
    data: st.DataObject, layout: NMLayout, shape: tuple[int, int], rule: str, seed: int, rng: np.random.Generator
) -> None:
    rows = data.draw(sides(shape))
    masks = layout.mask_rows(shape[0]), layout.groups(shape[1])
    positions = INDEX_CASES[layout.index].positions(rng, layout, seed, *masks)
    factor = data.draw(st.sampled_from((1.0, layout.m / layout.n)))
    found = {}
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            found[implementation] = packed_or_refused(rows, positions, layout, rule, factor)
    for implementation in COMPILED:
        assert found[implementation] == found["numpy"], implementation


@examples(40)
@given(st.data(), layouts(), shapes(70, 200), st.sampled_from(SCALE_RULES), generators())
def test_what_is_packed_decodes_to_the_codes(
    data: st.DataObject, layout: NMLayout, shape: tuple[int, int], rule: str, rng: np.random.Generator
) -> None:
    finetuned, base = (ordinary_raws(rng, "BF16", shape) for _ in range(2))
    rows = DeltaRows(finetuned, "BF16", base, "BF16", 0)
    masks = layout.mask_rows(shape[0]), layout.groups(shape[1])
    positions = INDEX_CASES[layout.index].positions(rng, layout, 5, *masks)
    with running("numpy"):
        kept = rows.gather(positions, layout.m, layout.share, np.float32(2))
        codes, scales = quantize(kept, layout.bits, layout.grid, rule, layout.scale_group, layout.scale_dtype)
    for implementation in IMPLEMENTATIONS:
        packed = blank(layout, *shape)
        with running(implementation):
            pack_kept(rows, positions, layout, rule, np.float32(2), packed)
            arrays = nm.decode(layout, packed, 5, 0, *shape)
            nm.check(layout, packed, arrays, shape[1])
        np.testing.assert_array_equal(arrays.codes, codes, strict=True)
        np.testing.assert_array_equal(arrays.scales.view(np.uint32), scales.view(np.uint32), strict=True)
        np.testing.assert_array_equal(arrays.positions, positions, strict=True)


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7FC0])
@pytest.mark.parametrize("where", [(0, 0), (36, 52), (20, 17)])
def test_what_is_not_finite_is_named_kept_or_not(value: int, share: int, where: tuple[int, int]) -> None:
    finetuned, base = np.zeros((2, 37, 53), np.uint16)
    finetuned[where] = value
    finetuned[36, 52] = value
    layout = NMLayout(1, 16, 4, share=share)
    positions = np.full((layout.mask_rows(37), 4, 1), 3, np.uint8)
    rows = DeltaRows(finetuned, "BF16", base, "BF16", 64)
    for implementation in IMPLEMENTATIONS:
        with running(implementation), pytest.raises(NonFiniteError, match=f"row {64 + where[0]}, column {where[1]} is"):
            pack_kept(rows, positions, layout, "minmax", np.float32(1), blank(layout, 37, 53))


def test_a_scale_that_overflows_is_refused() -> None:
    finetuned = np.full((3, 16), 0x7F7F, np.uint16)
    rows = DeltaRows(finetuned, "BF16", np.zeros_like(finetuned), "BF16", 0)
    layout = NMLayout(4, 16, 2, grid="midtread", share=1)
    positions = np.tile(np.arange(4, dtype=np.uint8), (3, 1, 1))
    for implementation in IMPLEMENTATIONS:
        with running(implementation), pytest.raises(UsageError, match="too large for its scale's dtype"):
            pack_kept(rows, positions, layout, "minmax", np.float32(4), blank(layout, 3, 16))


def spoil(packed: Packed, rng: np.random.Generator, what: str) -> None:
    """Give the codes any bits, or change a few of the index or of the scales, which may then stay right."""
    if what == "codes":
        packed["codes"].view(np.uint8)[...] = rng.integers(0, 256, packed["codes"].view(np.uint8).shape, np.uint8)
    elif what in packed and packed[what].size:
        raw = packed[what].reshape(-1).view(np.uint8)
        raw[rng.integers(raw.size, size=2)] ^= rng.integers(1, 256, 2, np.uint8)


def added_or_refused(
    layout: NMLayout, packed: Packed, seed: int, first: int, base: Raw, dtypes: tuple[str, str]
) -> object:
    try:
        return nm.add_run(layout, packed, seed, first, base, *dtypes)
    except InvalidFileError as error:
        return str(error)


@needs_core
@examples(250)
@given(st.data(), layouts(), shapes(70, 300), SEEDS, st.tuples(DTYPES, DTYPES), generators())
def test_adding_a_run_in_one_pass_is_adding_in_steps(
    data: st.DataObject,
    layout: NMLayout,
    shape: tuple[int, int],
    seed: int,
    dtypes: tuple[str, str],
    rng: np.random.Generator,
) -> None:
    arrays = data.draw(nm_arrays(layout, *shape, seed))
    if data.draw(st.booleans()):  # values and sums that overflow
        arrays.scales[rng.random(arrays.scales.shape) < 0.1] = np.float32(2.0**127)
    packed = pack(layout, arrays, *shape)
    spoil(packed, rng, data.draw(st.sampled_from(("nothing", "codes", "index", "scales"))))
    base = data.draw(raws(dtypes[0], shape))
    base.flags.writeable = not data.draw(st.booleans())
    first = nm.run_rows(layout) * data.draw(st.integers(0, 3))
    found = {}
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            found[implementation] = added_or_refused(layout, packed, seed, first, base, dtypes)
    expected = found["numpy"]
    for implementation in COMPILED:
        if isinstance(expected, str):
            assert found[implementation] == expected
            continue
        np.testing.assert_array_equal(found[implementation], expected, strict=True)


@examples(40)
@given(st.data(), layouts(), st.integers(1, 150), SEEDS, st.tuples(DTYPES, DTYPES), generators())
def test_runs_are_added_as_the_whole(
    data: st.DataObject, layout: NMLayout, columns: int, seed: int, dtypes: tuple[str, str], rng: np.random.Generator
) -> None:
    step = nm.run_rows(layout)
    rows = step + data.draw(st.integers(1, step + 40))
    packed = pack(layout, data.draw(nm_arrays(layout, rows, columns, seed)), rows, columns)
    base = ordinary_raws(rng, dtypes[0], (rows, columns))
    codec = term_codec(layout, rows, columns, seed if layout.seeded else 0)
    with running("numpy"):
        whole = codec.add(packed, 0, rows, base, *dtypes)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            parts = [
                codec.add(packed, start, min(start + step, rows), base[start : start + step], *dtypes)
                for start in range(0, rows, step)
            ]
        np.testing.assert_array_equal(np.concatenate(parts), whole, strict=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("base_dtype", FLOAT_DTYPES)
def test_where_nothing_is_kept_the_base_stays(base_dtype: str, dtype: str) -> None:
    layout = NMLayout(1, 16, 4, "fixed", share=1)
    columns = 37
    bits = np.array(SPECIAL_BITS[base_dtype], RAW_DTYPES[base_dtype])
    base = np.resize(bits, (33, columns))
    positions = np.zeros((33, 3, 1), np.uint8)
    # A code of zero on the midtread grid has the level -7 of a scale of zero: -0.0 is no change either.
    arrays = NMArrays(positions, np.zeros((33, 3), np.uint8), np.zeros((33, 1), np.float32))
    packed = pack(layout, arrays, 33, columns)
    values = widen(base, base_dtype)
    number = ~np.isnan(values)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            found = nm.add_run(layout, packed, 0, 0, base, base_dtype, dtype)
        if base_dtype == dtype:
            np.testing.assert_array_equal(found, base, strict=True)
        np.testing.assert_array_equal(found[number], narrow(values, dtype)[number], strict=True)
        assert np.isnan(widen(found, dtype)[~number]).all()
