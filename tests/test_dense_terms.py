"""Terms that hold every element (``lowbit``, ``lowrank``): arrays to buffers and back, in runs, by definition."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.terms import levels
from deltafmt.terms.buffers import blank, views
from deltafmt.terms.codec import TermCodec
from deltafmt.terms.codecs import term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import widen
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import MAX_VECTORS, LowRankLayout
from deltafmt.terms.registry import parse_layout
from implementations import IMPLEMENTATIONS, running
from strategies import dense_arrays, dense_layouts, examples, fitting, generators, lowrank_layouts, shapes, sizes

Packed = dict[str, NDArray[np.generic]]


def zeros(codec: TermCodec) -> Packed:
    """Return packed arrays of zeros."""
    return blank(codec.layout, *codec.shape)


def pack(codec: TermCodec, arrays: LowbitArrays | LowRankArrays) -> Packed:
    """Encode arrays into buffers of their own."""
    packed = zeros(codec)
    codec.encode(arrays, packed, 0)
    return packed


def frozen(codec: TermCodec, packed: Mapping[str, NDArray[np.generic]]) -> Packed:
    """Return views of the same bytes as a file gives them: read-only."""
    return views(codec.layout, *codec.shape, {name: memoryview(array.tobytes()) for name, array in packed.items()})


def coded_by_definition(coding: Coding, arrays: LowbitArrays, per_column: bool = False) -> NDArray[np.float32]:
    """Decode every number by itself, with the formulas of section 12.3."""
    out = np.zeros(arrays.codes.shape, np.float32)
    for (row, column), code in np.ndenumerate(arrays.codes):
        at = (0, column) if per_column else (row, column // coding.scale_group if coding.scale_group else 0)
        scale = arrays.scales[at]
        if arrays.zero_points is not None:
            out[row, column] = np.float32(int(code) - int(arrays.zero_points[at])) * scale
        else:
            out[row, column] = np.float32(2 * int(code) - coding.top) * np.float32(scale * np.float32(0.5))
    return out


def by_definition(layout: TermLayout, arrays: LowbitArrays | LowRankArrays) -> NDArray[np.float32]:
    """Return the matrix, one product and one rounded sum after the other."""
    if isinstance(layout, LowbitLayout):
        assert isinstance(arrays, LowbitArrays)
        return coded_by_definition(layout, arrays, layout.axis == "column")
    assert isinstance(layout, LowRankLayout)
    assert isinstance(arrays, LowRankArrays)
    factors = []
    for factor in (arrays.u, arrays.v):
        if isinstance(factor, LowbitArrays):
            assert isinstance(layout.factors, Coding)
            factors.append(coded_by_definition(layout.factors, factor))
        else:
            assert isinstance(layout.factors, str)
            factors.append(widen(factor, layout.factors))
    u, v = factors
    out = np.zeros((u.shape[1], v.shape[1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for r in range(layout.rank):
            product = (u[r].astype(np.float64)[:, None] * v[r].astype(np.float64)).astype(np.float32)
            out = (out.astype(np.float64) + product.astype(np.float64)).astype(np.float32)
    return out


def assert_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Compare floats bit by bit, but for the payloads of NaN."""
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    same = ~np.isnan(expected)
    np.testing.assert_array_equal(found[same].view(np.uint32), expected[same].view(np.uint32))


@examples(150)
@given(st.data(), dense_layouts(), shapes(70, 200))
def test_dense_is_the_definition_whatever_the_runs(
    data: st.DataObject, layout: TermLayout, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    layout = fitting(layout, rows, columns)
    arrays = data.draw(dense_arrays(layout, rows, columns))
    codec = term_codec(layout, rows, columns)
    packed = pack(codec, arrays)
    assert {name: array.nbytes for name, array in packed.items()} == layout.buffer_lengths(rows, columns)
    assert list(packed) == sorted(packed)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            for name, array in pack(codec, arrays).items():
                np.testing.assert_array_equal(array, packed[name], strict=True)
    read = frozen(codec, packed)
    expected = by_definition(layout, arrays)
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            assert_bits(codec.decode(read, 0, rows, check_form=True), expected)
            for start in range(0, rows, codec.run_rows):
                stop = min(start + codec.run_rows, rows)
                assert_bits(codec.decode(read, start, stop, check_form=True), expected[start:stop])


@examples(60)
@given(st.data(), dense_layouts(), sizes(120))
def test_runs_encode_as_the_whole(data: st.DataObject, layout: TermLayout, columns: int) -> None:
    assume(isinstance(layout, LowbitLayout))
    rows = data.draw(st.integers(1, 100))
    arrays = data.draw(dense_arrays(layout, rows, columns))
    assert isinstance(arrays, LowbitArrays)
    assert isinstance(layout, LowbitLayout)
    codec = term_codec(layout, rows, columns)
    pieces = zeros(codec)
    for start in range(0, rows, 32):
        run = slice(start, start + 32)
        scales = arrays.scales if layout.axis == "column" else arrays.scales[run]
        zero_points = None if arrays.zero_points is None else arrays.zero_points[run]
        codec.encode(LowbitArrays(arrays.codes[run], scales, zero_points), pieces, start)
    for name, array in pack(codec, arrays).items():
        np.testing.assert_array_equal(pieces[name], array, strict=True)


@examples(150)
@given(dense_layouts(), shapes(70, 200), generators())
def test_any_bytes_give_an_array_or_an_error(
    layout: TermLayout, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    rows, columns = shape
    layout = fitting(layout, rows, columns)
    codec = term_codec(layout, rows, columns)
    lengths = layout.buffer_lengths(rows, columns)
    packed = views(layout, *shape, {name: memoryview(rng.bytes(size)) for name, size in lengths.items()})
    found = []
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            try:
                found.append(codec.decode(packed, 0, rows))
                assert found[-1].shape == shape
            except InvalidFileError as error:
                found.append(str(error))
    for other in found[1:]:
        if isinstance(found[0], str):
            assert other == found[0]
        else:
            assert_bits(other, found[0])


@examples(80)
@given(st.data(), dense_layouts(), generators())
def test_what_is_not_canonical_is_refused(data: st.DataObject, layout: TermLayout, rng: np.random.Generator) -> None:
    """Another bit is another matrix, or it is refused."""
    rows, columns = 37, 53
    layout = fitting(layout, rows, columns)
    codec = term_codec(layout, rows, columns)
    packed = pack(codec, data.draw(dense_arrays(layout, rows, columns)))
    before = codec.decode(packed, 0, rows)
    name = str(rng.choice(list(packed)))
    raw = packed[name].view(np.uint8).reshape(-1)
    raw[rng.integers(raw.size)] ^= np.uint8(1 << rng.integers(8))
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            try:
                after = codec.decode(packed, 0, rows, check_form=True)
            except InvalidFileError:
                continue
            # A scale of zero, or a vector that meets one, hides what its codes say.
            hidden = [array for key, array in packed.items() if key.endswith("scales") and not array.all()]
            raw_factor = name in ("u", "v")
            rounded_away = isinstance(layout, LowRankLayout)
            assert hidden or raw_factor or rounded_away or not np.array_equal(before, after)


@examples(40)
@given(st.data(), lowrank_layouts(), shapes(40, 60))
def test_vectors_in_blocks_are_the_whole(data: st.DataObject, layout: LowRankLayout, shape: tuple[int, int]) -> None:
    from deltafmt.terms.lowrank import codec as lowrank

    rows, columns = shape
    layout = fitting(layout, rows, columns)
    codec = term_codec(layout, rows, columns)
    packed = pack(codec, data.draw(dense_arrays(layout, rows, columns)))
    whole = codec.decode(packed, 0, rows, check_form=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lowrank, "BLOCK_ELEMENTS", 100)
        assert_bits(codec.decode(packed, 0, rows, check_form=True), whole)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("bits", [0x8000, 0xBF80, 0x7F80, 0x7FC0])
@pytest.mark.parametrize("kind", ["lowbit", "column", "lowrank"])
def test_a_scale_that_is_negative_or_not_finite_is_refused(kind: str, scale_dtype: str, bits: int) -> None:
    coding = Coding(4, "midtread", scale_dtype, 0 if kind == "column" else 16)
    layout: TermLayout = LowRankLayout(3, coding)
    if kind != "lowrank":
        axis = "column" if kind == "column" else "row"
        layout = LowbitLayout(4, "midtread", scale_dtype, coding.scale_group, axis)
    codec = term_codec(layout, 40, 50)
    packed = zeros(codec)
    scales = packed["v_scales" if kind == "lowrank" else "scales"].reshape(-1)
    scales[3:4].view(np.uint16 if scale_dtype == "BF16" else np.uint32)[...] = bits << (16 * (scale_dtype == "F32"))
    with pytest.raises(InvalidFileError, match="a scale is negative or not finite"):
        codec.decode(packed, 0, 40)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("side", ["u", "v"])
def test_a_factor_that_is_not_finite_is_refused(dtype: str, side: str) -> None:
    codec = term_codec(LowRankLayout(2, dtype), 40, 50)
    packed = zeros(codec)
    raw = packed[side].view(np.uint32 if dtype == "F32" else np.uint16)
    raw[1, 7] = {"BF16": 0x7F80, "F16": 0x7E00, "F32": 0xFFC00000}[dtype]
    with pytest.raises(InvalidFileError, match=f"a value of factor {side} is not finite"):
        codec.decode(packed, 0, 40)


def test_codes_and_zero_points_beyond_the_grid_are_refused() -> None:
    coding = Coding(3, "asymmetric")
    for layout, name in ((LowbitLayout(3, "asymmetric"), "zero_points"), (LowRankLayout(2, coding), "u_zero_points")):
        codec = term_codec(layout, 40, 50)
        packed = zeros(codec)
        packed[name].reshape(-1)[1] = 8
        with pytest.raises(InvalidFileError, match="a zero point is 8, the grid ends at 7"):
            codec.decode(packed, 0, 40, check_form=True)
    codec = term_codec(LowbitLayout(4, "midtread"), 40, 50)
    packed = zeros(codec)
    packed["codes"][0, 0, 0] = 15
    with pytest.raises(InvalidFileError, match="a code is 15, the grid ends at 14"):
        codec.decode(packed, 0, 40, check_form=True)


def test_sums_that_overflow_follow_the_order() -> None:
    u = np.array([[3e38], [3e38], [3e38]], np.float32)
    v = np.array([[1, -1], [1, 1], [-1, 1]], np.float32)
    out = np.zeros((1, 2), np.float32)
    levels.add_outer(u, v, out)
    assert out.tolist() == [[np.inf, np.float32(3e38)]]


@given(dense_layouts())
def test_layouts_are_read_as_they_are_written(layout: TermLayout) -> None:
    assert parse_layout(layout.to_obj(), "layouts[0]") == layout
    assert list(layout.to_obj()) == sorted(layout.to_obj())
    assert layout.plain() == layout
    assert layout.describe()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LowbitLayout(0), "bits k = 0 is outside 1 to 8"),
        (lambda: LowbitLayout(9), "bits k = 9 is outside 1 to 8"),
        (lambda: LowbitLayout(1), "midtread grid of 1 bit"),
        (lambda: LowbitLayout(4, "log"), "grid 'log'"),
        (lambda: LowbitLayout(4, scale_dtype="F16"), "scale dtype 'F16'"),
        (lambda: LowbitLayout(4, scale_group=2**31), "scale group 2147483648"),
        (lambda: LowbitLayout(4, axis="both"), "axis 'both'"),
        (lambda: LowbitLayout(4, scale_group=8, axis="column"), "scale group 0, not 8"),
        (lambda: LowbitLayout(4, "asymmetric", axis="column"), "along rows"),
        (lambda: LowRankLayout(0, "BF16"), "rank R = 0"),
        (lambda: LowRankLayout(MAX_VECTORS + 1, "BF16"), "rank R = 65536"),
        (lambda: LowRankLayout(4, "F16").buffers(3, 50), "rank R = 4 is more than a matrix of 3 x 50 has"),
        (lambda: LowRankLayout(4, "F64"), "dtype of factors 'F64'"),
    ],
)
def test_parameters_outside_the_specification_are_refused(make, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


@pytest.mark.parametrize(
    ("obj", "match"),
    [
        ({"kind": "lowbit"}, "expected the keys"),
        ({"kind": ["lowbit"]}, "unknown layout"),
        ({"factors": "BF16", "kind": "lowrank", "rank": True}, "rank: True is not an integer"),
        ({"factors": 7, "kind": "lowrank", "rank": 2}, "factors: expected the keys"),
        ({"factors": {"bits": 4}, "kind": "lowrank", "rank": 2}, "factors: expected the keys"),
    ],
)
def test_layouts_of_other_keys_are_refused(obj: object, match: str) -> None:
    with pytest.raises(InvalidFileError, match=match):
        parse_layout(obj, "layouts[0]")
