"""The kernels of few tokens on a GPU: products against float64, tokens of many slots, and captured graphs."""

from __future__ import annotations

import os

import numpy as np
import pytest

from deltafmt.terms.layout import TermLayout

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU, and a Triton that compiles", allow_module_level=True)

from deltafmt.kernels.lowbit.kind import MOST_TOKENS
from deltafmt.kernels.products import matmul_, operand_delta
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from operands import random_operand
from packed_operands import LAYOUTS, SOME_LAYOUTS, check_packed

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
some_layouts = pytest.mark.parametrize("layout", SOME_LAYOUTS, ids=lambda layout: f"{layout.kind} {layout.describe()}")
SHAPES = (((1021,), 2047), ((1000, 260, 77), 4096), ((33,), 150))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind} {layout.describe()}")
def test_products(layout: TermLayout) -> None:
    for seed, (parts, columns) in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        check_packed(rng, layout, parts, columns, [0, 1, -1, 0], (BF16, F16, F32)[seed], "cuda")


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, MOST_TOKENS])
@some_layouts
def test_tokens(layout: TermLayout, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    slots = rng.permutation([0] * tokens + rng.integers(-1, 2, 5).tolist()).tolist()
    check_packed(rng, layout, [515], 1000, slots, BF16, "cuda")


@some_layouts
def test_captured_graph_asks_the_host_for_nothing(layout: TermLayout) -> None:
    rng = np.random.default_rng(0)
    rows, columns, slots = 500, 1000, 4
    table = OperandTable(slots, [rows], columns, "cuda")
    for slot in range(slots):
        table.put(slot, [[random_operand(rng, layout, rows, columns, "cuda")]])
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
    for changed in range(slots):
        table.put(changed, [[random_operand(rng, layout, rows, columns, "cuda")]])
        table.layout_tables(slice(0, 1))
        x.normal_()
        y.zero_()
        used.copy_(torch.from_numpy(rng.integers(-1, slots, 6).astype(np.int32)))
        wanted = torch.zeros_like(y)
        for token, slot in enumerate(used.tolist()):
            if slot >= 0:
                ((operand,),) = table.operands(slot)
                wanted[token] = x[token].float() @ operand_delta(operand).T
        graph.replay()
        assert (y - wanted).abs().max() <= 0.02 * wanted.abs().max() + 1e-6
