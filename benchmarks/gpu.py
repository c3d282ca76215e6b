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
    """Return an operand of random codes; a seeded one has this seed, a sparse one gaps of 6.5."""
    buffers = {}
    slots = sparse_slots(layout, rows, columns)
    for name, form in layout.buffers(rows, columns, slots).items():
        dtype = BUFFER_DTYPES[form.dtype]
        if name == "gaps":
            buffers[name] = random_gaps(layout, form.shape)
        elif name == "starts":
            buffers[name] = torch.arange(form.shape[0], dtype=dtype, device=DEVICE) * (slots // (form.shape[0] - 1))
        elif dtype == torch.int32:
            buffers[name] = torch.randint(-(2**31), 2**31 - 1, form.shape, dtype=dtype, device=DEVICE)
        else:
            buffers[name] = torch.rand(form.shape, device=DEVICE).mul(0.01).to(dtype)
    return Operand(layout, rows, columns, buffers, seed if layout.seeded else 0, slots)


def sparse_slots(layout: TermLayout, rows: int, columns: int) -> int:
    """Return the slots of a sparse term that has an eighth as many entries as columns."""
    return -(-rows // 32) * columns // 8 if isinstance(layout, SparseLayout) else 0


def random_gaps(layout: TermLayout, shape: tuple[int, ...]) -> torch.Tensor:
    """Return words of gaps from 0 to 13, so that neighbouring rows have their entries in different columns.

    A term of an eighth as many slots as columns then stays within its row, all but surely.
    """
    assert isinstance(layout, SparseLayout)
    if layout.gap_bits not in (4, 8):
        raise ValueError(f"no random gaps of {layout.gap_bits} bits")
    per_word = 32 // layout.gap_bits
    places = torch.arange(0, 32, layout.gap_bits, device=DEVICE)
    words = (torch.randint(0, 14, (*shape, per_word), device=DEVICE) << places).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


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
