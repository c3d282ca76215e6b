"""Raw floats: exact widening, rounding to the nearest, difference and sum, and the compiled loops against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.terms import floats
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from strategies import FLOAT_DTYPES, SPECIAL_BITS, examples, generators, ordinary_raws, raws, shapes, special_raws

SMALL_DTYPES = ("BF16", "F16")
# Bits of exponent and of mantissa.
FIELDS = {"BF16": (8, 7), "F16": (5, 10), "F32": (8, 23)}
PAIRS = [(a, b) for a in FLOAT_DTYPES for b in FLOAT_DTYPES]


def value_by_definition(bits: int, dtype: str) -> float:
    """Return the value of a finite bit pattern from its sign, exponent and mantissa."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    sign = -1.0 if bits >> exponent_bits + mantissa_bits else 1.0
    exponent = bits >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = bits & (1 << mantissa_bits) - 1
    least = 2 - (1 << exponent_bits - 1) - mantissa_bits
    if exponent == 0:
        return sign * mantissa * 2.0**least
    return sign * (mantissa + (1 << mantissa_bits)) * 2.0 ** (exponent - 1 + least)


def infinity(dtype: str) -> int:
    """Return the bits of positive infinity."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    return (1 << exponent_bits) - 1 << mantissa_bits


def nearest(values: NDArray[np.float32], dtype: str) -> NDArray[np.int64]:
    """Search the nearest number of ``dtype`` for values that are no NaN; on a tie the one with an even mantissa.

    The step beyond the largest number stands for infinity, as IEEE 754 has it.
    """
    top = infinity(dtype)
    ladder = np.array([value_by_definition(bits, dtype) for bits in range(top + 1)])
    magnitude = np.minimum(np.abs(values.astype(np.float64)), ladder[-1])
    above = np.searchsorted(ladder, magnitude)
    below = np.maximum(above - 1, 0)
    up, down = ladder[above] - magnitude, magnitude - ladder[below]
    found = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return found + np.signbit(values) * (1 << sum(FIELDS[dtype]))


@pytest.mark.parametrize("dtype", SMALL_DTYPES)
def test_widen_is_exact_for_every_bit_pattern(dtype: str) -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    wide = floats.widen(raw, dtype)
    assert wide.dtype == np.float32
    magnitude = raw.astype(int) & 0x7FFF
    finite = magnitude < infinity(dtype)
    expected = np.array([value_by_definition(int(bits), dtype) for bits in raw[finite]], np.float32)
    # As bits, because the sign of zero counts.
    np.testing.assert_array_equal(wide[finite].view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(np.isnan(wide), magnitude > infinity(dtype))
    assert np.array_equal(np.isinf(wide), magnitude == infinity(dtype))
    assert np.array_equal(np.signbit(wide), raw > 0x7FFF)


@pytest.mark.parametrize("dtype", SMALL_DTYPES)
def test_narrow_undoes_widen(dtype: str) -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    again = floats.narrow(floats.widen(raw, dtype), dtype)
    number = (raw & 0x7FFF) <= infinity(dtype)
    np.testing.assert_array_equal(again[number], raw[number], strict=True)
    assert ((again[~number] & 0x7FFF) > infinity(dtype)).all()


@examples(40)
@given(generators())
@pytest.mark.parametrize("dtype", SMALL_DTYPES)
def test_narrow_finds_the_nearest(dtype: str, rng: np.random.Generator) -> None:
    values = special_raws(rng, "F32", (2000,)).view(np.float32)
    values = values[~np.isnan(values)]
    near_one = rng.standard_normal(500, np.float32)
    # Halfway points of neighbours, and the float32 just beside them.
    low = rng.integers(0, infinity(dtype), 500).astype(np.uint16)
    low = low[low < infinity(dtype) - 1]
    halves = (floats.widen(low, dtype).astype(float) + floats.widen(low + np.uint16(1), dtype)) / 2
    ties = halves.astype(np.float32)
    assert np.array_equal(ties.astype(float), halves)
    beside = [np.nextafter(ties, np.float32(side)) for side in (0, 1e38)]
    values = np.concatenate([values, near_one, ties, -ties, *beside])
    np.testing.assert_array_equal(floats.narrow(values, dtype), nearest(values, dtype))


@pytest.mark.parametrize(
    ("dtype", "value", "bits"),
    [
        ("BF16", 1.0 + 2.0**-8, 0x3F80),  # ties to even, down
        ("BF16", 1.0 + 3 * 2.0**-8, 0x3F82),  # ties to even, up
        ("BF16", 3.4e38, 0x7F80),  # beyond the largest by more than half a step
        ("BF16", -3.3895e38, 0xFF7F),
        ("BF16", 2.0**-134, 0x0000),  # half of the smallest subnormal
        ("BF16", 1.5 * 2.0**-134, 0x0001),
        ("BF16", -0.0, 0x8000),
        ("F16", 65519.0, 0x7BFF),
        ("F16", 65520.0, 0x7C00),
        ("F16", -1e30, 0xFC00),
        ("F16", 2.0**-25, 0x0000),
        ("F16", 1.5 * 2.0**-25, 0x0001),
        ("F16", -0.0, 0x8000),
    ],
)
def test_narrow_of_known_values(dtype: str, value: float, bits: int) -> None:
    assert floats.narrow(np.array([value], np.float32), dtype).tolist() == [bits]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_narrow_keeps_nan_a_nan_of_its_sign(dtype: str) -> None:
    bits = np.array([0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(0x80000000)])
    raw = floats.narrow(bits.view(np.float32), dtype).astype(np.int64)
    sign = 1 << sum(FIELDS[dtype])
    assert ((raw & sign - 1) > infinity(dtype)).all()
    assert ((raw & sign) > 0).tolist() == [False] * 4 + [True] * 4


@examples(60)
@given(generators())
def test_bf16_up_is_the_smallest_that_reaches(rng: np.random.Generator) -> None:
    values = np.abs(special_raws(rng, "F32", (500,)).view(np.float32))
    values = values[np.isfinite(values)]
    raw = floats.bf16_up(values)
    assert (floats.widen(raw, "BF16") >= values).all()
    positive = raw > 0
    assert (floats.widen(raw[positive] - np.uint16(1), "BF16") < values[positive]).all()
    assert not values[~positive].any()


@examples(80)
@given(st.data(), st.sampled_from(PAIRS), shapes(9, 60))
def test_subtract_is_the_float32_difference(
    data: st.DataObject, dtypes: tuple[str, str], shape: tuple[int, int]
) -> None:
    finetuned, base = (data.draw(raws(dtype, shape)) for dtype in dtypes)
    delta, finite = floats.subtract(finetuned, dtypes[0], base, dtypes[1])
    assert delta.dtype == np.float32
    assert delta.shape == shape
    assert finite == bool(np.isfinite(delta).all())
    wide = [floats.widen(raw, dtype) for raw, dtype in ((finetuned, dtypes[0]), (base, dtypes[1]))]
    usable = np.isfinite(wide[0]) & np.isfinite(wide[1])
    with np.errstate(over="ignore"):
        exact = (wide[0][usable].astype(np.float64) - wide[1][usable]).astype(np.float32)
    np.testing.assert_array_equal(delta[usable], exact)
    assert not np.isfinite(delta[~usable]).any()


@examples(80)
@given(st.data(), st.sampled_from(PAIRS), shapes(9, 60))
def test_add_rounds_once_and_keeps_what_has_no_delta(
    data: st.DataObject, dtypes: tuple[str, str], shape: tuple[int, int]
) -> None:
    base_dtype, dtype = dtypes
    base = data.draw(raws(base_dtype, shape))
    rng = data.draw(generators())
    delta = rng.standard_normal(shape, np.float32) * np.float32(0.01)
    zero = rng.random(shape) < 0.5
    delta[zero] = np.where(rng.random(int(zero.sum())) < 0.5, np.float32(0), np.float32(-0.0))
    total = floats.add(base, base_dtype, delta, dtype)
    assert total.dtype == floats.RAW_DTYPES[dtype]
    assert total.shape == shape
    if base_dtype == dtype:
        np.testing.assert_array_equal(total[zero], base[zero], strict=True)
    wide = floats.widen(base, base_dtype)
    number = ~np.isnan(wide)
    # Adding -0.0 leaves every number as it is, +0.0 would turn -0.0 into it.
    step = np.where(zero, np.float32(-0.0), delta)
    rounded = floats.narrow(wide[number] + step[number], dtype)
    np.testing.assert_array_equal(total[number], rounded, strict=True)
    nan = floats.widen(total[~number], dtype)
    assert np.isnan(nan).all()


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_add_of_zero_changes_no_bit(dtype: str, zero: float) -> None:
    small = np.arange(2**16, dtype=np.uint16)
    raw = small if dtype != "F32" else np.concatenate([np.array(SPECIAL_BITS["F32"], np.uint32), small])
    delta = np.full(raw.shape, zero, np.float32)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            np.testing.assert_array_equal(floats.add(raw, dtype, delta, dtype), raw)


def nan_by_definition(bits: int, base_dtype: str, dtype: str) -> int:
    """Return a NaN in another dtype: its sign, ones, and the highest bits of its fraction, the first of them 1."""
    (_, old), (exponent_bits, new) = FIELDS[base_dtype], FIELDS[dtype]
    sign, fraction = bits >> sum(FIELDS[base_dtype]), bits & (1 << old) - 1
    highest = fraction >> old - new if old > new else fraction << new - old
    return sign << exponent_bits + new | infinity(dtype) | highest | 1 << new - 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
def test_the_bits_of_every_nan_are_defined(dtypes: tuple[str, str], implementation: str) -> None:
    base_dtype, dtype = dtypes
    top, sign = infinity(base_dtype), 1 << sum(FIELDS[base_dtype])
    least = 1 << FIELDS[base_dtype][1] - 1
    nans = [top + 1, top + least - 1, top + least, top + 2 * least - 1, top + least + least // 3]
    nans += [nan | sign for nan in nans]
    others = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    raw = np.array(nans, floats.RAW_DTYPES[base_dtype])
    with running(implementation):
        for delta in others:
            found = floats.add(raw, base_dtype, np.full(raw.shape, delta), dtype)
            # Nothing is added to what is copied.
            copied = delta == 0 and base_dtype == dtype
            assert found.tolist() == (nans if copied else [nan_by_definition(n, base_dtype, dtype) for n in nans])
        # Of bases that are numbers: infinity less infinity, and a delta that is no number.
        made = np.array([top, top | sign, 0, 1, top - 1, sign], floats.RAW_DTYPES[base_dtype])
        delta = np.array([-np.inf, np.inf, np.nan, -np.nan, np.nan, np.nan], np.float32)
        found = floats.add(made, base_dtype, delta, dtype)
    assert found.tolist() == [infinity(dtype) | 1 << FIELDS[dtype][1] - 1] * len(made)


@examples(60)
@given(generators(), st.sampled_from(PAIRS), shapes(9, 60))
def test_finetune_comes_back_from_an_exact_difference(
    rng: np.random.Generator, dtypes: tuple[str, str], shape: tuple[int, int]
) -> None:
    finetuned = ordinary_raws(rng, dtypes[0], shape)
    base = floats.narrow(floats.widen(finetuned, dtypes[0]) * np.float32(1.5), dtypes[1])
    delta, finite = floats.subtract(finetuned, dtypes[0], base, dtypes[1])
    assert finite
    # By Sterbenz's lemma the difference is exact, so the sum is the fine-tune but for the sign of zero.
    again = floats.widen(floats.add(base, dtypes[1], delta, dtypes[0]), dtypes[0])
    np.testing.assert_array_equal(again, floats.widen(finetuned, dtypes[0]), strict=True)


@needs_core
@examples(120)
@given(st.data(), st.sampled_from([("BF16", "BF16"), *PAIRS]), shapes(9, 60), st.booleans())
def test_compiled_subtract_equals_the_reference(
    data: st.DataObject, dtypes: tuple[str, str], shape: tuple[int, int], readonly: bool
) -> None:
    finetuned, base = (data.draw(raws(dtype, shape)) for dtype in dtypes)
    for raw in (finetuned, base):
        raw.flags.writeable = not readonly
    expected, finite = floats.subtract.reference(finetuned, dtypes[0], base, dtypes[1])
    nan = np.isnan(expected)
    for implementation in COMPILED:
        with running(implementation):
            found, found_finite = floats.subtract(finetuned, dtypes[0], base, dtypes[1])
        assert found_finite is finite
        assert np.array_equal(np.isnan(found), nan)
        np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32), strict=True)


@needs_core
@examples(120)
@given(st.data(), st.sampled_from([("BF16", "BF16"), *PAIRS]), shapes(9, 60), st.booleans())
def test_compiled_add_equals_the_reference(
    data: st.DataObject, dtypes: tuple[str, str], shape: tuple[int, int], readonly: bool
) -> None:
    base = data.draw(raws(dtypes[0], shape))
    base.flags.writeable = not readonly
    rng = data.draw(generators())
    delta = special_raws(rng, "F32", shape).view(np.float32)
    delta[rng.random(shape) < 0.2] = 0
    expected = floats.add.reference(base, dtypes[0], delta, dtypes[1])
    for implementation in COMPILED:
        with running(implementation):
            found = floats.add(base, dtypes[0], delta, dtypes[1])
        np.testing.assert_array_equal(found, expected, strict=True)
