"""What compiled code reads of a call: written before the call, in the same memory, and used by kernels as it is."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltafmt.errors import UsageError
from deltafmt.kernels import devices, products
from deltafmt.kernels.segments import FixedSegments
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.compiled_state import CompiledState
from deltafmt.runtime.packed import PackedSelection
from deltafmt.runtime.selection import Selection
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from operands import random_operand
from reference import naive_delta

CPU = torch.device("cpu")


def slots_of(segments: FixedSegments) -> list[int]:
    return segments.slots.tolist()


def test_a_choice_is_written_where_the_last_one_was() -> None:
    compiled_state = CompiledState(CPU, lambda: None)
    with torch.inference_mode():
        compiled_state.begin(Selection([2, -1], 4, CPU, each=True), 4, 4)
    first = compiled_state.segments(tokens(4), None, "module")
    assert first is not None
    assert slots_of(first) == [2, 2, -1, -1]
    longer = compiled_state.segments(tokens(8), None, "module")
    assert longer is not None
    assert slots_of(longer) == [2, 2, 2, 2, -1, -1, -1, -1]
    compiled_state.end()
    with torch.no_grad():
        compiled_state.begin(Selection([1], 4, CPU), 4, 4)
    assert compiled_state.segments(tokens(4), None, "module") is first
    assert slots_of(first) == [1] * 4
    kept = compiled_state.segments(tokens(8), None, "module")
    assert kept is compiled_state.segments(tokens(8), None, "module")
    assert kept is not None
    assert slots_of(kept) == [1] * 8
    compiled_state.begin(None, 4, 4)
    assert slots_of(first) == [-1] * 4
    assert slots_of(kept) == [-1] * 8
    with pytest.raises(UsageError, match="module has 6 tokens, which is not a multiple of the batch's 4 rows"):
        compiled_state.segments(tokens(6), None, "module")
    compiled_state.begin(Selection([0], 16, CPU), 4, 16)  # more slots: other tables
    other = compiled_state.segments(tokens(4), None, "module")
    assert other is not None
    assert other is not first
    assert other.count == 16


def tokens(count: int) -> torch.Tensor:
    """Return a module's input."""
    return torch.zeros(count, 8)


def test_the_tokens_of_packed_requests_keep_their_slots() -> None:
    packed = PackedSelection([2, -1, 0], [3, 1, 2], 4, CPU)
    compiled_state = CompiledState(CPU, lambda: packed)
    segments = compiled_state.segments(torch.zeros(1, 6, 8), None, "module")
    assert segments is not None
    assert slots_of(segments) == [2, 2, 2, -1, 0, 0]


def test_outside_of_a_call_the_block_is_asked() -> None:
    selection = Selection([3], 4, CPU)
    compiled_state = CompiledState(CPU, lambda: selection)
    found = compiled_state.segments(tokens(6), None, "module")
    assert found is not None
    assert slots_of(found) == [3] * 6
    mixed = Selection([3, 0], 4, CPU, each=True)
    with pytest.raises(UsageError, match="module is called outside of its model, which knows the rows"):
        CompiledState(CPU, lambda: mixed).segments(tokens(6), None, "module")
    assert compiled_state.segments(tokens(6), None, "module") is not found
    assert compiled_state.used
    assert CompiledState(CPU, lambda: None).segments(tokens(6), None, "module") is None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are interpreted where there is no GPU")
def test_kernels_follow_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same segments serve every choice, whether their tiles are kept yet or not; nothing is decoded."""
    pytest.importorskip("triton")
    from interpreter import patch_once

    patch_once()
    monkeypatch.setattr(devices, "usable", lambda _: True)
    rng = np.random.default_rng(0)
    layouts = [NMLayout(1, 32, 4), LowbitLayout(4), NMLayout(4, 16, 3, "fixed", share=1), LowRankLayout(8, "BF16")]
    table = OperandTable(4, [40], 64, "cpu")
    operands = [random_operand(rng, layout, 40, 64) for layout in layouts]
    for slot, operand in enumerate(operands):
        table.put(slot, [[operand]])
    dense = [torch.as_tensor(naive_delta(operand)) for operand in operands]
    segments = FixedSegments(5, 4, CPU)
    x = torch.randn(5, 64)
    for slots in ([0, 1, 2, 3, -1], [1] * 5, [-1] * 5, [3, 3, 0, 3, 0], [2, -1, 2, 1, 0]):
        segments.fill(slots)
        y = torch.zeros(5, 40)
        products.matmul_([y], x, table, segments)
        for token, slot in enumerate(slots):
            expected = x[token] @ dense[slot].float().T if slot >= 0 else torch.zeros(40)
            assert (y[token] - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-12
        segments.prepare()
