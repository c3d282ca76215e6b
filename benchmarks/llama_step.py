"""The kernels on a GPU, at the shapes of Llama-2-7B: what deltas add to one step of the base, and to a prompt.

    python benchmarks/llama_step.py [--layers 32] [--jobs 12]

Every figure is a CUDA graph of 128 products (q,k,v; o; gate,up; down in 32 layers) with weights and deltas of their
own, so that nothing stays in the second-level cache; bases and deltas alternate as in a model. Weights, codes and
activations are random. Ratios are to the base measured in the same run. ``--jobs`` processes compile the kernels
beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from common import Figure, report
from gpu import DEVICE, milliseconds, random_operand

from deltafmt.kernels.products import fused_linear, matmul_
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.nm.layout import NMLayout

PRODUCTS = (((4096, 4096, 4096), 4096), ((4096,), 4096), ((11008, 11008), 4096), ((4096,), 11008))

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
            matmul_(self.outputs[number], x, tables[layer][number], segments)

    def fused_with_delta(self, tables: list[list[OperandTable]]) -> None:
        """Multiply with base and one delta at once."""
        for layer, number, x in self.places():
            fused_linear(x, self.weights[layer][number], tables[layer][number], 0)


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
            table.layout_tables(slice(0, 3))
    return tables


def nonzeros(layout: NMLayout, slots: int, layers: int) -> int:
    """Return the kept elements of all deltas."""
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
    else:
        tokens = 2 ** (job - len(layouts) - 4 + 1)
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


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("llama_step.py needs a CUDA GPU")
    jobs = range(sum(map(len, LAYOUTS.values())) + 4 + 7)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_job, jobs))
    figures: list[Figure] = []

    def show(found: Iterator[Figure]) -> None:
        for figure in found:
            figures.append(figure)
            print(*figure.row(), flush=True)
        torch.cuda.empty_cache()

    weights = base_weights(options.layers)
    base = {tokens: milliseconds(Step(tokens, options.layers, weights).base) for tokens in (1, 16)}
    show(Figure(f"base, one step, batch {tokens}", time, "ms") for tokens, time in base.items())
    show(measure_one_token(weights, options.layers, base[1]))
    show(measure_many_deltas(weights, options.layers, base[16]))
    show(measure_prompt(weights, options.layers))
    show(measure_several_tokens(weights, options.layers))
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(versions)
    report("llama_step", figures, **versions)


if __name__ == "__main__":
    main()
