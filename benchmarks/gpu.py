"""What the benchmarks of kernels share: the time of a captured graph, and operands of random codes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.sparse.layout import SparseLayout

DEVICE = "cuda"
REPEATS = 11


def random_operand(layout: TermLayout, rows: int, columns: int, seed: int) -> Operand:
    """Return an operand of random codes; a seeded one has this seed, a sparse one an entry in every eighth column."""
    buffers = {}
    slots = sparse_slots(layout, rows, columns)
    for name, form in layout.buffers(rows, columns, slots).items():
        dtype = BUFFER_DTYPES[form.dtype]
        if name == "gaps":
            buffers[name] = torch.full(form.shape, 0x77777777, dtype=dtype, device=DEVICE)
        elif name == "starts":
            buffers[name] = torch.arange(form.shape[0], dtype=dtype, device=DEVICE) * (slots // (form.shape[0] - 1))
        elif dtype == torch.int32:
            buffers[name] = torch.randint(-(2**31), 2**31 - 1, form.shape, dtype=dtype, device=DEVICE)
        else:
            buffers[name] = torch.rand(form.shape, device=DEVICE).mul(0.01).to(dtype)
    return Operand(layout, rows, columns, buffers, seed if layout.seeded else 0, slots)


def sparse_slots(layout: TermLayout, rows: int, columns: int) -> int:
    """Return the slots of a sparse term that has an entry in one of eight columns, all at the same distance."""
    return -(-rows // 32) * columns // 8 if isinstance(layout, SparseLayout) else 0


def milliseconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median time of a CUDA graph of a function."""
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])
