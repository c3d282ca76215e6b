"""The torch decoders of each kind, those that serve and the naive ones, agree with the numpy decoders."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import stream_words
from strategies import (
    dense_arrays,
    dense_layouts,
    examples,
    fitting,
    generators,
    layouts,
    shapes,
    sparse_arrays,
    sparse_layouts,
)
from term_kinds import ANY_LAYOUT

torch = pytest.importorskip("torch")

from deltafmt.kernels import kind
from deltafmt.kernels.lowrank.decode import vectors
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.kernels.packed_words import chosen_fields, fields
from deltafmt.kernels.products import operand_delta
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.sparse import decode as sparse_decode
from deltafmt.kernels.sparse.decode import runs_of
from operands import damaged_operand, random_operand, reach
from reference import naive_delta

PARTED = [NMLayout(2, 16, 4, "seeded", share=8), NMLayout(3, 7, 3, "fixed", scale_group=5), LowbitLayout(4)]


def operand_of(
    layout: TermLayout, packed: dict[str, NDArray[np.generic]], rows: int, columns: int, slots: int = 0
) -> Operand:
    buffers = {}
    for name, form in layout.buffers(rows, columns, slots).items():
        buffers[name] = torch.empty(form.shape, dtype=BUFFER_DTYPES[form.dtype])
        if form.nbytes:
            raw = torch.from_numpy(packed[name].reshape(-1).view(np.uint8).copy())
            buffers[name] = raw.view(BUFFER_DTYPES[form.dtype]).view(form.shape)
    return Operand(layout, rows, columns, buffers, 0, slots)


def check_decoder(operand: Operand, expected: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Compare the decoder, whole and in parts, with what the numpy decoder gives, and with the naive one."""
    found = operand_delta(operand)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert torch.equal(naive_delta(operand).nan_to_num(), found.nan_to_num())
    start, stop = sorted(rng.integers(0, operand.rows + 2, 2).tolist())
    assert torch.equal(operand_delta(operand, start, stop).nan_to_num(), found[start:stop].nan_to_num())
    kernels = kernels_of(operand.layout)
    rows = torch.from_numpy(rng.integers(0, operand.rows, 5))
    some = kernels.decode_rows(operand, rows)
    assert some.shape == (5, operand.columns)
    x = torch.from_numpy(rng.standard_normal((3, operand.columns), np.float32))
    product = kernels.multiply(x, operand)
    size = reach(operand)
    if not size.max() < 1e15:
        return  # sums of such values are not finite in float32
    assert ((some.double() - found[rows].double()).abs() <= 1e-5 * size[rows] + 1e-30).all()
    exact, bound = x.double() @ found.double().T, x.double().abs() @ size.T
    assert ((product.double() - exact).abs() <= 1e-5 * bound + 1e-30).all()


@examples(60)
@given(st.data(), dense_layouts(), shapes(70, 120), generators())
def test_lowbit_and_lowrank(
    data: st.DataObject, layout: TermLayout, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    rows, columns = shape
    layout = fitting(layout, rows, columns)
    codec = term_codec(layout, rows, columns)
    packed = blank(layout, rows, columns)
    codec.encode(data.draw(dense_arrays(layout, rows, columns)), packed, 0)
    operand = operand_of(layout, packed, rows, columns)
    assert operand.nbytes == sum(layout.buffer_lengths(rows, columns).values())
    check_decoder(operand, codec.decode(packed, 0, rows), rng)


@examples(40)
@given(st.data(), sparse_layouts(), shapes(70, 400), generators())
def test_sparse(data: st.DataObject, layout: SparseLayout, shape: tuple[int, int], rng: np.random.Generator) -> None:
    rows, columns = shape
    arrays = data.draw(sparse_arrays(layout, rows, columns))
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, 0, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    check_decoder(operand_of(layout, packed, rows, columns, slots), codec.decode(packed, 0, rows), rng)


@examples(100)
@given(ANY_LAYOUT, shapes(80, 300), generators())
def test_any_kind(layout: TermLayout, shape: tuple[int, int], rng: np.random.Generator) -> None:
    check_random(fitting(layout.plain(), *shape), shape, rng)


@examples(60)
@given(st.one_of(layouts("seeded"), layouts("fixed", max_m=40)), shapes(80, 300), generators())
def test_nm(layout: NMLayout, shape: tuple[int, int], rng: np.random.Generator) -> None:
    check_random(layout, shape, rng)


def check_random(layout: TermLayout, shape: tuple[int, int], rng: np.random.Generator) -> None:
    """Check the decoder of a layout with random content."""
    operand = random_operand(rng, layout, *shape)
    packed = {name: np.ascontiguousarray(raw_numpy(tensor)) for name, tensor in operand.buffers.items()}
    expected = term_codec(layout, *shape, operand.seed, operand.slots).decode(packed, 0, shape[0])
    check_decoder(operand, expected, rng)


def raw_numpy(tensor: torch.Tensor) -> NDArray[np.generic]:
    """Return a buffer as the codecs view it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy().view(np.uint32) if tensor.dtype == torch.int32 else tensor.numpy()


@examples(40)
@given(st.integers(1, 9), st.integers(1, 200), generators())
def test_chosen_fields(width: int, count: int, rng: np.random.Generator) -> None:
    width = 16 if width == 9 else width
    shape = (3, stream_words(count, width))
    words = torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(np.int32))
    at = torch.from_numpy(rng.integers(0, count, 7))
    every = fields(words, count, width)
    assert torch.equal(chosen_fields(words, count, width, at), every[:, at])
    assert int(every.min()) >= 0
    assert int(every.max()) < 1 << width


@pytest.mark.parametrize("side", ["u", "v"])
@pytest.mark.parametrize("factors", ["BF16", Coding(3), Coding(5, "asymmetric", "F32", 32), Coding(8, scale_group=33)])
def test_chosen_elements_of_vectors(factors: Coding | str, side: str) -> None:
    rng = np.random.default_rng(2)
    operand = random_operand(rng, LowRankLayout(5, factors), 90, 110)
    at = torch.from_numpy(rng.integers(0, 90, 20))
    assert torch.equal(vectors(operand, side, at), vectors(operand, side)[:, at])


@pytest.mark.parametrize(
    ("tiles", "most", "runs"),
    [
        ([], 4, []),
        ([3], 4, [(3, 4)]),
        ([0, 1, 3, 6, 10], 100, [(0, 7), (10, 11)]),
        ([0, 1, 2, 3, 4], 2, [(0, 2), (2, 4), (4, 5)]),
        ([0, 2, 4], 4, [(0, 3), (4, 5)]),
    ],
)
def test_runs_of_tiles(tiles: list[int], most: int, runs: list[tuple[int, int]]) -> None:
    assert list(runs_of(tiles, most)) == runs


@pytest.mark.parametrize("layout", [*PARTED, SparseLayout("BF16", 4, 256)], ids=lambda layout: layout.kind)
def test_deltas_that_are_decoded_in_parts(layout: TermLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "DECODED_ELEMENTS", 1)
    monkeypatch.setattr(sparse_decode, "RUN_ELEMENTS", 5 * 32 * 300)
    rng = np.random.default_rng(5)
    operand = random_operand(rng, layout, 600, 300)
    whole = naive_delta(operand)
    kernels = kernels_of(layout)
    rows = torch.from_numpy(rng.integers(0, operand.rows, 40))
    assert torch.equal(kernels.decode_rows(operand, rows), whole[rows])
    x = torch.from_numpy(rng.standard_normal((3, operand.columns), np.float32))
    torch.testing.assert_close(kernels.multiply(x, operand), x @ whole.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("of", ["sparse", "nm"])
def test_damaged_words_stay_inside(of: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        if of == "nm":
            operand = damaged_operand(rng, NMLayout(3, 7, 4, "fixed"), 45, 100)
        else:
            operand = random_operand(rng, SparseLayout("F32", 8, 256), 45, 300)
            words = {
                name: torch.from_numpy(rng.integers(-(2**31), 2**31, tuple(tensor.shape)).astype(np.int32))
                for name, tensor in operand.buffers.items()
                if tensor.dtype == torch.int32
            }
            starts = rng.integers(0, operand.slots + 2, len(words["starts"])).astype(np.int32)
            starts[[0, -1]] = 0, operand.slots
            words["starts"] = torch.from_numpy(starts)
            operand = dataclasses.replace(operand, buffers={**operand.buffers, **words})
        assert operand_delta(operand).shape == (operand.rows, operand.columns)


def test_buffers_of_another_form_are_refused() -> None:
    layout = LowbitLayout(4)
    operand = operand_of(layout, blank(layout, 33, 50), 33, 50)
    for name, changed in (("codes", operand.buffers["codes"][:1]), ("scales", operand.buffers["scales"].float())):
        with pytest.raises(UsageError, match=f"{name}: expected contiguous"):
            Operand(layout, 33, 50, {**operand.buffers, name: changed})
    with pytest.raises(UsageError, match="a lowbit term has the buffers codes, scales"):
        Operand(layout, 33, 50, {"codes": operand.buffers["codes"]})
