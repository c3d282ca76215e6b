"""The kernels of few tokens, interpreted: products against float64; they touch what they may."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout
from strategies import generators, same_examples, sizes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted where there is no GPU, or with TRITON_INTERPRET=1", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt.kernels import devices, products
from deltafmt.kernels.launching import launch_products
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.registry import KERNELS, kernels_of
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from interpreter import guarded, patch_once
from operands import product, random_operand
from packed_operands import LAYOUTS, SOME_LAYOUTS, check_packed
from reference import naive_delta

patch_once()
F32, F16 = torch.float32, torch.float16
check = functools.partial(check_packed, guard=guarded)
some_layouts = pytest.mark.parametrize("layout", SOME_LAYOUTS, ids=lambda layout: f"{layout.kind} {layout.describe()}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind} {layout.describe()}")
def test_products(layout: TermLayout) -> None:
    check(np.random.default_rng(LAYOUTS.index(layout)), layout, [45], 150, [0, 1, -1], F32)


@same_examples(12)
@given(
    layout=st.sampled_from(LAYOUTS),
    parts=st.lists(sizes(50), min_size=1, max_size=4),
    columns=sizes(300),
    tokens=st.lists(st.integers(-1, 2), min_size=1, max_size=4),
    dtype=st.sampled_from((F32, F16)),
    rng=generators(),
)
def test_any_product(layout, parts, columns, tokens, dtype, rng) -> None:
    check(rng, layout, parts, columns, tokens, dtype)


@pytest.mark.parametrize("coding", [Coding(4, "midtread"), "BF16"], ids=str)
def test_damaged_gaps_stay_inside(coding: Coding | str) -> None:
    rng = np.random.default_rng(1)
    operand = random_operand(rng, SparseLayout(coding, 8, 256), 40, 300)
    assert operand.slots > 8

    def damaged(numbers: np.ndarray, name: str) -> Operand:
        return dataclasses.replace(operand, buffers={**operand.buffers, name: torch.from_numpy(numbers)})

    gaps, starts = (operand.buffers[name].numpy() for name in ("gaps", "starts"))
    any_bits = rng.integers(-(2**31), 2**31, gaps.shape).astype(np.int32)
    orders = np.flip(starts).copy(), starts * 1_000_000
    for broken in (damaged(any_bits, "gaps"), *(damaged(order, "starts") for order in orders)):
        made = product(rng, [50], 300, [[[broken]]], [0, -1], F32)
        made.outputs[0].remember()
        with guarded(made.readable(), [made.outputs[0].inner]):
            launch_products([made.outputs[0].inner], made.x, made.table, made.segments)
        changed = made.outputs[0].changed()
        assert not changed[2].any()
        assert not changed[:, 43:].any()
        assert not changed[:, :3].any()


@some_layouts
def test_many_tokens_make_tiles(layout: TermLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module(f"deltafmt.kernels.{layout.kind}.launch"), "tile_tokens", lambda _: 4)
    rng = np.random.default_rng(0)
    check(rng, layout, [33], 70, rng.integers(-1, 2, 11).tolist(), F32)


def test_ranks_of_one_size_share_a_table() -> None:
    rng = np.random.default_rng(0)
    table = OperandTable(2, [40], 64, "cpu")
    operands = [random_operand(rng, LowRankLayout(rank, "BF16"), 40, 64) for rank in (17, 30)]
    for slot, operand in enumerate(operands):
        table.put(slot, [[operand]])
    (held,) = table.layout_tables(slice(0, 1))
    assert held.layout.rank == 32
    x, y = torch.randn(2, 64), torch.zeros(2, 40)
    launch_products([y], x, table, Segments(torch.tensor([1, 0], dtype=torch.int32), 2))
    for token, operand in enumerate(reversed(operands)):
        expected = naive_delta(operand) @ x[token]
        assert (y[token] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_sum_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("the host waits for the device"))
    rng = np.random.default_rng(0)
    table = OperandTable(1, [40], 64, "cpu")
    # One layout twice: its operands stand in two tables.
    packed = [random_operand(rng, layout, 40, 64) for layout in (*SOME_LAYOUTS, SOME_LAYOUTS[-1])]
    terms = [random_operand(rng, NMLayout(1, 32, 4), 40, 64), *packed]
    table.put(0, [terms])
    segments = Segments(torch.tensor([0], dtype=torch.int32), 1)
    x, y = torch.randn(1, 64), torch.zeros(1, 40)
    products.matmul_([y], x, table, segments)
    expected = x @ sum(naive_delta(term) for term in terms).T
    assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()
    bounded = [term for term in packed if kernels_of(term.layout).most_tokens(term.layout) is not None]
    assert [table.operands(slot)[one.part][one.term] for slot, one in table.bounded()] == bounded


def test_one_layout_without_a_kernel_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable", lambda _: True)
    rng = np.random.default_rng(0)
    table = OperandTable(2, [40], 96, "cpu")
    odd, even = LowbitLayout(4, "midrise", "F32", 24), LowbitLayout(4, "midrise", "F32", 32)
    for slot, layout in enumerate((odd, even)):
        table.put(slot, [[random_operand(rng, layout, 40, 96)]])
    segments = Segments.of([0, 1], 2, "cpu")
    x, y = torch.randn(2, 96), torch.zeros(2, 40)
    decoded = decoded_layouts(monkeypatch)
    products.matmul_([y], x, table, segments)
    assert decoded == [odd]
    for slot in range(2):
        expected = naive_delta(table.operands(slot)[0][0]) @ x[slot]
        assert (y[slot] - expected).abs().max() <= 1e-4 * expected.abs().max()


@some_layouts
def test_one_slot_of_many_tokens_leaves_the_others_their_kernel(
    layout: TermLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "usable", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("the host waits for the device"))
    rng = np.random.default_rng(0)
    table = OperandTable(2, [40], 96, "cpu")
    for slot in range(2):
        table.put(slot, [[random_operand(rng, layout, 40, 96)]])
    slots = [0] * 40 + [1, -1, 1]
    x, y = torch.randn(len(slots), 96), torch.zeros(len(slots), 40)
    decoded = decoded_layouts(monkeypatch)
    products.matmul_([y], x, table, Segments.of(slots, 2, "cpu"))
    assert len(decoded) == (kernels_of(layout).most_tokens(layout) is not None)
    for token, slot in enumerate(slots):
        expected = naive_delta(table.operands(slot)[0][0]) @ x[token] if slot >= 0 else torch.zeros(40)
        assert (y[token] - expected).abs().max() <= 1e-4 * max(expected.abs().max(), 1)


def decoded_layouts(monkeypatch: pytest.MonkeyPatch) -> list[TermLayout]:
    """Return a list that takes the layout of every operand that is multiplied by decoding it."""
    found: list[TermLayout] = []
    for kernels in KERNELS.values():
        multiply = kernels.multiply

        def noted(x, operand, multiply=multiply):
            found.append(operand.layout)
            return multiply(x, operand)

        monkeypatch.setattr(kernels, "multiply", noted)
    return found
