"""The lowbit kernel on a GPU: products against float64, tokens of many slots, and a captured graph."""

from __future__ import annotations

import os

import numpy as np
import pytest

from deltafmt.layout.lowbit import LowbitLayout

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU, and a Triton that compiles", allow_module_level=True)

from deltafmt.kernels.dense_delta import operand_delta  # noqa: E402 - needs torch
from deltafmt.kernels.lowbit_matmul.product import MOST_TOKENS, lowbit_matmul_  # noqa: E402
from deltafmt.kernels.nm_matmul.operand import OperandTable  # noqa: E402
from deltafmt.kernels.nm_matmul.segments import Segments  # noqa: E402
from deltafmt.kernels.products import matmul_  # noqa: E402
from lowbit_operands import LAYOUTS, check_lowbit, random_lowbit  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = (((1021,), 2047), ((1000, 260, 77), 4096), ((33,), 150))


@pytest.mark.parametrize("layout", LAYOUTS, ids=LowbitLayout.describe)
def test_products(layout: LowbitLayout) -> None:
    for seed, (parts, columns) in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        check_lowbit(rng, layout, parts, columns, [0, 1, -1, 0], (BF16, F16, F32)[seed], "cuda")


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, MOST_TOKENS])
def test_tokens(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    slots = [0] * tokens + rng.integers(-1, 2, 5).tolist()
    check_lowbit(
        rng, LowbitLayout(2, "midrise"), [515], 1000, rng.permutation(slots).tolist()[: tokens + 5], BF16, "cuda"
    )


def test_captured_graph_asks_the_host_for_nothing() -> None:
    rng = np.random.default_rng(0)
    layout, rows, columns, slots = LowbitLayout(4), 500, 1000, 4
    table = OperandTable(slots, [rows], columns, "cuda")
    for slot in range(slots):
        table.put(slot, [[random_lowbit(rng, layout, rows, columns, "cuda")]])
    x = torch.zeros(6, columns, device="cuda", dtype=BF16)
    y = torch.zeros(6, rows, device="cuda", dtype=BF16)
    used = torch.zeros(6, dtype=torch.int32, device="cuda")

    def multiply() -> None:
        matmul_([y], x, table, Segments(used, slots))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        multiply()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply()
    for seed in range(4):
        table.put(seed, [[random_lowbit(rng, layout, rows, columns, "cuda")]])
        table.layout_tables(slice(0, 1), LowbitLayout)
        x.normal_()
        y.zero_()
        used.copy_(torch.from_numpy(rng.integers(-1, slots, 6).astype(np.int32)))
        wanted = torch.zeros_like(y)
        for token, slot in enumerate(used.tolist()):
            if slot >= 0:
                ((operand,),) = table.operands(slot)
                wanted[token] = x[token].float() @ operand_delta(operand).T
        graph.replay()
        assert (y - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_columns_in_groups_of_odd_size_are_left_to_torch() -> None:
    rng = np.random.default_rng(0)
    table = OperandTable(1, [40], 96, "cuda")
    table.put(0, [[random_lowbit(rng, LowbitLayout(4, "midrise", "F32", 24), 40, 96, "cuda")]])
    x, y = torch.randn(1, 96, device="cuda"), torch.zeros(1, 40, device="cuda")
    assert not lowbit_matmul_([y], x, table, Segments.of([0], 1, "cuda"))
    assert not y.any()
