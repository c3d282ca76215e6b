"""The Triton kernels, interpreted: base and delta in one product, dense rows, embeddings, and damaged words.

Every load and store is checked against the tensors that a kernel may touch, as in ``test_kernels.py``, which holds the
products.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.terms.nm.layout import NMLayout
from strategies import generators, same_examples, sizes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted where there is no GPU, or with TRITON_INTERPRET=1", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt.kernels.launching import launch_embeddings, launch_products
from deltafmt.kernels.nm import fused, launch
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from interpreter import guarded, patch_once, pick_directly
from nm_products import GATHERED, NOT_UNROLLED, any_layout, blocks, gathered, operands, small_tiles
from operands import ROUNDING, Inside, damaged_operand, fused_exactly, product, random_operand
from reference import naive_delta, naive_embedding_

patch_once()
F32, F16 = torch.float32, torch.float16
Rng = np.random.Generator


@pytest.fixture(scope="module", autouse=True)
def small_batches_fill_tiles() -> Iterator[None]:
    """Cut few tokens into tiles of several, as launches cut many."""
    with small_tiles():
        yield


def check_fused(rng: Rng, layout: NMLayout, parts: Sequence[int], columns: int, dtype: torch.dtype) -> None:
    """Compare base and delta in one kernel with float64; the delta is that of the second of three slots."""
    table = OperandTable(3, parts, columns, "cpu")
    for slot in range(3):
        table.put(slot, operands(rng, layout, parts, columns))
    weights = [torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(dtype) for rows in parts]
    x = torch.from_numpy(rng.standard_normal((1, columns), np.float32)).to(dtype)
    outputs = [Inside(1, rows, dtype, "cpu") for rows in parts]
    exact = [fused_exactly(x, weight, terms[0]) for weight, terms in zip(weights, table.operands(1), strict=True)]
    held = [tensor for terms in table.operands(1) for term in terms for tensor in term.buffers.values()]
    with guarded(held, [output.inner for output in outputs]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "pick", pick_directly)
        launch.launch_fused([output.inner for output in outputs], x, weights, table.layout_tables(slice(0, 3))[0], 1)
    for output, (wanted, magnitude) in zip(outputs, exact, strict=True):
        error = (output.inner.double() - wanted).abs()
        rounding = ROUNDING[dtype] * wanted.abs() if dtype != F32 else 0.0
        assert (error <= 32 * ROUNDING[F32] * magnitude + rounding * 1.01).all()
        outside = output.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


@pytest.mark.parametrize("layout", GATHERED, ids=NMLayout.describe)
def test_fused(layout: NMLayout) -> None:
    check_fused(np.random.default_rng(11), layout, [70], 141, F32)


@same_examples(15)
@given(st.data(), gathered(), generators(), st.sampled_from((F32, F16)))
def test_fused_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    parts = data.draw(st.lists(sizes(70), min_size=1, max_size=3), "parts")
    check_fused(rng, layout, parts, data.draw(st.sampled_from((32, 128, 33, 200, 600)), "columns"), dtype)


@pytest.mark.parametrize("group", [12, 16, 128, 200])
@pytest.mark.parametrize("keep", [1, 4])
def test_damaged_words_stay_inside(group: int, keep: int) -> None:
    rng = np.random.default_rng(group + keep)
    layout = NMLayout(keep, group, 4, "fixed", share=2)
    operand = damaged_operand(rng, layout, 45, 230)
    made = product(rng, [50], 230, [[[operand]]], [0, -1, 0], F32)
    ids = torch.tensor([44, 3, 0])
    for limit in (100, 0):
        made.outputs[0].remember()
        with blocks(32, 2, 4), guarded(made.readable(), [made.outputs[0].inner]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "gather_tokens", lambda _, limit=limit: limit)
            launch_products([made.outputs[0].inner], made.x, made.table, made.segments)
        changed = made.outputs[0].changed()
        assert not changed[2].any()
        assert not changed[:, 48:].any()
        assert not changed[:, :3].any()
        assert torch.isfinite(made.outputs[0].inner[::2, :45]).all()
    out = Inside(45, 230, F32, "cpu")
    embedded = Inside(3, 230, F32, "cpu")
    # Damaged positions may be equal.
    with guarded(made.readable(), [out.inner, embedded.inner], twice=True):
        launch.launch_expand(operand, None, out.inner, 0, 45)
        launch_embeddings(embedded.inner, ids, made.table, made.segments)
    for result in (out, embedded):
        assert torch.isfinite(result.inner).all()
        outside = result.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


def check_expand(
    rng: Rng, layout: NMLayout, rows: int, columns: int, start: int, stop: int, dtype: torch.dtype
) -> None:
    """Compare rows of a delta, and of a base with it added, bit for bit."""
    operand = random_operand(rng, layout, rows, columns)
    delta = naive_delta(operand)[start:stop]
    out, base = Inside(stop - start, columns, dtype, "cpu"), Inside(stop - start, columns, dtype, "cpu")
    base.inner[:] = torch.from_numpy(rng.standard_normal((stop - start, columns), np.float32))
    for given_base, wanted in ((None, delta), (base.inner, base.inner.float() + delta)):
        with guarded([*operand.buffers.values(), base.inner], [out.inner]):
            launch.launch_expand(operand, given_base, out.inner, start, stop)
        assert torch.equal(out.inner, wanted.to(dtype))
        outside = out.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


@pytest.mark.parametrize("layout", [*GATHERED, *NOT_UNROLLED], ids=NMLayout.describe)
def test_expand(layout: NMLayout) -> None:
    rows = min(32 * layout.share + 9, 80)
    check_expand(np.random.default_rng(8), layout, rows, 141, 0, rows, F32)


@same_examples(20)
@given(st.data(), any_layout(40), generators(), st.sampled_from((F32, F16)))
def test_expand_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    rows, columns = data.draw(sizes(100)), data.draw(sizes(200))
    start, stop = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    check_expand(rng, layout, rows, columns, start, stop, dtype)


def check_embedding(table: OperandTable, slots: Sequence[int], ids: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare an embedding's output with the reference; what no delta reaches keeps its bits."""
    segments = Segments(torch.tensor(slots, dtype=torch.int32), table.slots)
    output = Inside(len(slots), table.columns, dtype, "cpu")
    wanted = output.wide.clone()
    naive_embedding_(wanted[1:-1, 3:-4], ids, table, segments)
    held = [
        tensor for slot in range(table.slots) for term in table.operands(slot)[0] for tensor in term.buffers.values()
    ]
    with guarded(held, [output.inner]) as memory:
        launch_embeddings(output.inner, ids, table, segments)
    rows = [max((term.rows for term in table.operands(slot)[0]), default=0) for slot in range(table.slots)]
    has_row = [0 <= slot < table.slots and 0 <= ids[token] < rows[slot] for token, slot in enumerate(slots)]
    # A row may have nothing to store: where its only entries lie beyond the last column.
    assert not (memory.stored_to(output.inner).any(1) & ~torch.tensor(has_row)).any()
    assert torch.equal(output.wide, wanted)


@same_examples(25)
@given(st.data(), any_layout(255), generators(), st.sampled_from((F32, F16)))
def test_embedding_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    rows, columns = data.draw(sizes(150)), data.draw(sizes(600))
    table = OperandTable(2, [rows], columns, "cpu")
    for slot in range(2):
        table.put(slot, [[random_operand(rng, layout, int(rng.integers(1, rows, endpoint=True)), columns)]])
    slots = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=6))
    ids = torch.from_numpy(rng.integers(0, rows + 3, len(slots))).to(
        data.draw(st.sampled_from((torch.int32, torch.int64)))
    )
    check_embedding(table, slots, ids, dtype)


def test_embedding_sums_and_ids_outside() -> None:
    rng = np.random.default_rng(9)
    table = OperandTable(3, [70], 90, "cpu")
    first, second = (random_operand(rng, layout, 60, 90) for layout in (GATHERED[0], NOT_UNROLLED[0]))
    table.put(0, [[first, second, random_operand(rng, GATHERED[0], 70, 90)]])
    table.put(1, [[random_operand(rng, GATHERED[0], 70, 90)]])
    ids = torch.tensor([0, 59, 60, 69, 70, 2**31 - 1, 5, 6, 7, 69])
    check_embedding(table, [0, 0, 0, 0, 0, 0, -1, 3, 2, 1], ids, F32)


@pytest.mark.parametrize("number", [-1, -60, -(2**31)])
def test_embedding_negative_ids(number: int) -> None:
    rng = np.random.default_rng(10)
    table = OperandTable(1, [70], 90, "cpu")
    table.put(0, [[random_operand(rng, GATHERED[0], 60, 90)]])
    check_embedding(table, [0, 0], torch.tensor([number, 0]), F32)
