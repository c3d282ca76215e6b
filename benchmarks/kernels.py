"""The kernels on a GPU, at the shapes of Llama-2-7B: what deltas add to one step of the base, and to a prompt.

    python benchmarks/kernels.py [--layers 32] [--bitdelta binary_gemm_kernel.py] [--jobs 12]

Every figure is a CUDA graph of 128 products (q,k,v; o; gate,up; down in 32 layers) with weights and deltas of their
own, so that nothing stays in the second-level cache; bases and deltas alternate as in a model. Weights, codes and
activations are random. Ratios are to the base measured in the same run. ``--bitdelta`` names the file with
BitDelta's published Triton kernel (FasterDecoding/BitDelta, bitdelta/binary_gemm_kernel.py), which is measured beside
ours. ``--jobs`` processes compile the kernels beforehand.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Figure, report

from deltafmt.kernels.nm_matmul.operand import NMOperand
from deltafmt.kernels.nm_matmul.product import nm_linear, nm_matmul_
from deltafmt.kernels.nm_matmul.segments import Segments
from deltafmt.kernels.packed import BUFFER_DTYPES, PackedOperand
from deltafmt.kernels.products import matmul_
from deltafmt.kernels.table import Operand, OperandTable
from deltafmt.layout.lowbit import LowbitLayout
from deltafmt.layout.nm import NMLayout

PRODUCTS = (((4096, 4096, 4096), 4096), ((4096,), 4096), ((11008, 11008), 4096), ((4096,), 11008))
DEVICE = "cuda"
REPEATS = 11

RATIO_128 = "1:32 k=4"
LAYOUTS = {
    RATIO_128: (NMLayout(1, 32, 4, "seeded", "midtread", share) for share in (1, 4)),
    "1:8 k=1": (NMLayout(1, 8, 1, "seeded", "midrise", share) for share in (1, 4)),
    "4:16 k=4": (NMLayout(4, 16, 4, "seeded", "midtread", share) for share in (1, 4)),
}
LAYOUTS = {name: tuple(both) for name, both in LAYOUTS.items()}
# For 16 deltas of one token: the most that base and deltas may take, and the least nonzeros a second, v = 1 and v = 4.
TARGETS = {
    RATIO_128: ((1.36, 1.22), (2.5, 4.0)),
    "1:8 k=1": ((2.3, 1.7), (2.5, 4.0)),
    "4:16 k=4": ((3.8, 2.8), (2.5, 4.0)),
}


# Deltas of every element: the least share of the copy's speed, and by how much BitDelta's kernel must be slower.
LOWBIT = {
    "k=1": (LowbitLayout(1, "midrise"), 0.20, 5.0),
    "k=2": (LowbitLayout(2, "midrise"), 0.35, None),
    "k=4": (LowbitLayout(4), 0.60, None),
    "k=4, groups of 128": (LowbitLayout(4, "midtread", "BF16", 128), None, None),
}


def random_operand(layout: NMLayout | LowbitLayout, rows: int, columns: int, seed: int) -> Operand:
    """Return an operand of random codes, seeded if it keeps some of the elements."""
    if isinstance(layout, LowbitLayout):
        buffers = {}
        for name, form in layout.buffers(rows, columns).items():
            dtype = BUFFER_DTYPES[form.dtype]
            if dtype == torch.int32:
                buffers[name] = torch.randint(-(2**31), 2**31 - 1, form.shape, dtype=dtype, device=DEVICE)
            else:
                buffers[name] = torch.rand(form.shape, device=DEVICE).mul(0.01).to(dtype)
        return PackedOperand(layout, rows, columns, buffers)
    tiles = layout.row_tiles(rows)
    shape = (tiles, layout.codes_words(columns), 32)
    codes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=DEVICE)
    scales = torch.rand(tiles, 1, 32, device=DEVICE).mul(0.01).bfloat16()
    return NMOperand(layout, seed, rows, columns, codes, None, scales)


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


@dataclass
class Step:
    """One decoding step, or one prompt, through all products of a model."""

    tokens: int
    layers: int
    weights: list[list[list[torch.Tensor]]]

    def __post_init__(self) -> None:
        self.x = {columns: torch.randn(self.tokens, columns, device=DEVICE).bfloat16() for _, columns in PRODUCTS}
        self.fused = [torch.empty(self.tokens, sum(rows), device=DEVICE, dtype=torch.bfloat16) for rows, _ in PRODUCTS]
        self.outputs = [y.split(list(rows), 1) for y, (rows, _) in zip(self.fused, PRODUCTS, strict=True)]

    def places(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield layer, product and activations in the order of a model."""
        for layer, number in itertools.product(range(self.layers), range(len(PRODUCTS))):
            yield layer, number, self.x[PRODUCTS[number][1]]

    def base(self) -> None:
        """Multiply with the base alone."""
        for layer, number, x in self.places():
            torch.mm(x, whole(self.weights[layer][number]).T, out=self.fused[number])

    def with_deltas(self, tables: list[list[OperandTable]], segments: Segments) -> None:
        """Multiply with the base, then add the deltas."""
        for layer, number, x in self.places():
            torch.mm(x, whole(self.weights[layer][number]).T, out=self.fused[number])
            nm_matmul_(self.outputs[number], x, tables[layer][number], segments)

    def fused_with_delta(self, tables: list[list[OperandTable]]) -> None:
        """Multiply with base and one delta at once."""
        for layer, number, x in self.places():
            nm_linear(x, self.weights[layer][number], tables[layer][number], 0)


def whole(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the matrix that the parts are consecutive rows of."""
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def base_weights(layers: int) -> list[list[list[torch.Tensor]]]:
    """Return random weights, the parts of a product side by side."""
    return [
        [
            list((torch.randn(sum(rows), columns, device=DEVICE) * 0.02).bfloat16().split(list(rows)))
            for rows, columns in PRODUCTS
        ]
        for _ in range(layers)
    ]


def delta_tables(layout: NMLayout, slots: int, layers: int) -> list[list[OperandTable]]:
    """Return a table for every product, each slot with random operands of its own."""
    seeds = itertools.count(1)
    tables = []
    for _ in range(layers):
        tables.append([OperandTable(slots, rows, columns, DEVICE) for rows, columns in PRODUCTS])
        for table in tables[-1]:
            for slot in range(slots):
                table.put(
                    slot,
                    [
                        (random_operand(layout, rows, table.columns, next(seeds) * 2654435761 % 2**32),)
                        for rows in table.parts
                    ],
                )
            table.layout_tables(slice(0, 3), NMLayout)
    return tables


def nonzeros(layout: NMLayout, slots: int, layers: int) -> int:
    """Return the kept entries of all deltas."""
    return layers * slots * sum(sum(rows) * layout.kept(columns) for rows, columns in PRODUCTS)


def compile_job(job: int) -> None:
    """Compile the kernels of one measurement, on one layer: the cache on disk is shared."""
    weights = base_weights(1)
    layouts = [layout for both in LAYOUTS.values() for layout in both]
    if job < len(layouts):
        tables, segments = delta_tables(layouts[job], 16, 1), Segments.of(list(range(16)), 16, DEVICE)
        Step(16, 1, weights).with_deltas(tables, segments)
    elif job < len(layouts) + 4:
        layout = LAYOUTS[RATIO_128][job % 2]
        tables = delta_tables(layout, 1, 1)
        step = Step(1 if job < len(layouts) + 2 else 2048, 1, weights)
        if step.tokens == 1:
            step.with_deltas(tables, Segments.of([0], 1, DEVICE))
        step.fused_with_delta(tables)
    elif job < len(layouts) + 4 + len(LOWBIT):
        made = Tenants()
        made.copies = 1
        made.of_layout(list(LOWBIT.values())[job - len(layouts) - 4][0])
    else:
        tokens = 2 ** (job - len(layouts) - 4 - len(LOWBIT) + 1)
        segments = Segments.of([slot for slot in range(4) for _ in range(tokens)], 4, DEVICE)
        Step(4 * tokens, 1, weights).with_deltas(delta_tables(LAYOUTS[RATIO_128][1], 4, 1), segments)
    torch.cuda.synchronize()


def measure_one_token(weights: list[list[list[torch.Tensor]]], layers: int, base: float) -> Iterator[Figure]:
    """One delta, one token: in one kernel with the base, and after it."""
    step = Step(1, layers, weights)
    for layout in LAYOUTS[RATIO_128]:
        tables = delta_tables(layout, 1, layers)
        name = f"base + one delta {RATIO_128} v={layout.share}, 1 token"
        fused = milliseconds(lambda tables=tables: step.fused_with_delta(tables))
        yield Figure(name, fused / base, "", 1.06, at_most=True, note="base and delta in one kernel")
        segments = Segments.of([0], 1, DEVICE)
        after = milliseconds(lambda tables=tables, segments=segments: step.with_deltas(tables, segments))
        yield Figure(f"{name}, two kernels", after / base, "")


def measure_many_deltas(weights: list[list[list[torch.Tensor]]], layers: int, base: float) -> Iterator[Figure]:
    """Sixteen deltas, one token each."""
    step = Step(16, layers, weights)
    segments = Segments.of(list(range(16)), 16, DEVICE)
    for name, both in LAYOUTS.items():
        for layout, ratio, rate in zip(both, *TARGETS[name], strict=True):
            tables = delta_tables(layout, 16, layers)
            time = milliseconds(lambda tables=tables: step.with_deltas(tables, segments))
            what = f"base + 16 deltas {name} v={layout.share}"
            yield Figure(what, time / base, "", ratio, at_most=True)
            count = nonzeros(layout, 16, layers)
            yield Figure(f"rate of {name} v={layout.share}", count / (time - base) / 1e9, "T nonzeros/s", rate)
            del tables
            torch.cuda.empty_cache()


def measure_prompt(weights: list[list[list[torch.Tensor]]], layers: int) -> Iterator[Figure]:
    """A prompt of 2,048 tokens and one delta."""
    step = Step(2048, layers, weights)
    base = milliseconds(step.base, 5)
    yield Figure("base, 2,048 tokens", base, "ms")
    for layout in LAYOUTS[RATIO_128]:
        tables = delta_tables(layout, 1, layers)
        time = milliseconds(lambda tables=tables: step.fused_with_delta(tables), 5)
        name = f"prompt of 2,048 tokens, one delta v={layout.share}"
        yield Figure(name, time / base, "", 1.25, at_most=True)


def measure_several_tokens(weights: list[list[list[torch.Tensor]]], layers: int) -> Iterator[Figure]:
    """Four deltas with several tokens each, on top of the base."""
    tables = delta_tables(LAYOUTS[RATIO_128][1], 4, layers)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        step = Step(4 * tokens, layers, weights)
        segments = Segments.of([slot for slot in range(4) for _ in range(tokens)], 4, DEVICE)
        base = milliseconds(step.base, 5)
        time = milliseconds(lambda step=step, segments=segments: step.with_deltas(tables, segments), 5)
        yield Figure(f"base + 4 deltas {RATIO_128} v=4, {tokens} tokens each", time / base, "")


class Tenants:
    """Products of one 12288x4096 matrix with 16 tenants, one token each; 8 copies, more than the cache holds."""

    tenants, copies, rows, columns = 16, 8, 12288, 4096

    def __init__(self) -> None:
        self.x = torch.randn(self.tenants, self.columns, device=DEVICE).bfloat16()
        self.y = torch.zeros(self.tenants, self.rows, device=DEVICE, dtype=torch.bfloat16)
        self.segments = Segments.of(list(range(self.tenants)), self.tenants, DEVICE)

    def of_peer(self, path: Path) -> float:
        """Return the milliseconds of BitDelta's kernel, per tenant."""
        spec = importlib.util.spec_from_file_location("binary_gemm_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
        x = self.x[:, None].half()
        shape = (self.copies, self.tenants, self.columns // 32, self.rows)
        packed = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=DEVICE)
        peer.binary_bmm(x, packed[0])
        return self.each(lambda: [peer.binary_bmm(x, one) for one in packed])

    def of_layout(self, layout: NMLayout | LowbitLayout) -> float:
        """Return the milliseconds of our kernel, per tenant."""
        tables = []
        for copy in range(self.copies):
            table = OperandTable(self.tenants, [self.rows], self.columns, DEVICE)
            for slot in range(self.tenants):
                table.put(slot, [(random_operand(layout, self.rows, self.columns, copy * 99 + slot),)])
            table.layout_tables(slice(0, 1), type(layout))
            tables.append(table)
        return self.each(lambda: [matmul_([self.y], self.x, table, self.segments) for table in tables])

    def each(self, function: Callable[[], object]) -> float:
        """Return the milliseconds that a function of all copies and tenants takes for one."""
        return milliseconds(function) / self.copies / self.tenants

    def bytes_of(self, layout: LowbitLayout) -> int:
        """Return what a product reads of one tenant's delta."""
        return sum(layout.buffer_lengths(self.rows, self.columns).values())


def measure_tenants(path: Path | None, copy_speed: float) -> Iterator[Figure]:
    """One wide matrix, 16 tenants of one token: 1:32, ``lowbit`` and, where its file is given, BitDelta's kernel."""
    made = Tenants()
    theirs = made.of_peer(path) if path else None
    if theirs:
        yield Figure("BitDelta's kernel, 12288x4096, 16 tenants", theirs * made.tenants * 1000, "us")
    for layout in LAYOUTS[RATIO_128]:
        time = made.of_layout(layout)
        yield Figure(f"{RATIO_128} v={layout.share}, 12288x4096, 16 tenants", time * made.tenants * 1000, "us")
        if theirs:
            yield Figure(f"BitDelta's time over ours, v={layout.share}", theirs / time, "", 10.0)
    for name, (layout, share, times) in LOWBIT.items():
        time = made.of_layout(layout)
        yield Figure(f"lowbit {name}, 12288x4096, 16 tenants", time * made.tenants * 1000, "us")
        speed = made.bytes_of(layout) / time / 1e9
        yield Figure(f"its share of the copy's speed, {name}", speed / copy_speed, "", share)
        if theirs and times:
            yield Figure(f"BitDelta's time over ours, {name}", theirs / time, "", times)


def copy_time() -> float:
    """Return the milliseconds that a copy of 2 GiB takes."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bitdelta", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels.py needs a CUDA GPU")
    jobs = range(sum(map(len, LAYOUTS.values())) + 4 + len(LOWBIT) + 7)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_job, jobs))
    figures: list[Figure] = []

    def show(found: Iterator[Figure]) -> None:
        for figure in found:
            figures.append(figure)
            print(*figure.row(), flush=True)
        torch.cuda.empty_cache()

    speed = 2 * (1 << 31) / copy_time() / 1e9
    weights = base_weights(options.layers)
    base = {tokens: milliseconds(Step(tokens, options.layers, weights).base) for tokens in (1, 16)}
    show(iter([Figure("device copy, read and write", speed, "TB/s")]))
    show(Figure(f"base, one step, batch {tokens}", time, "ms") for tokens, time in base.items())
    show(measure_one_token(weights, options.layers, base[1]))
    show(measure_many_deltas(weights, options.layers, base[16]))
    show(measure_prompt(weights, options.layers))
    show(measure_several_tokens(weights, options.layers))
    del weights
    show(measure_tenants(options.bitdelta, speed))
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(versions)
    report("kernels", figures, **versions)


if __name__ == "__main__":
    main()
