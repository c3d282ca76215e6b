"""Every hot loop: compiled, as the numpy reference, and a memory copy of the bytes that it reads and writes.

    python benchmarks/loops.py [--rows 512] [--columns 1024] [--repeats 9]

One thread, one run of rows as pack and unpack hand it out; nanoseconds for each element of the tensor or, where the
loop sees only those, for each kept entry. Without deltafmt._core the compiled column repeats the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Figure, report, seconds

from deltafmt import core
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.pack_kept import pack_kept
from deltafmt.methods.quantize import quantize
from deltafmt.methods.sampling import draw, gather_difference, uniform
from deltafmt.terms import floats, words
from deltafmt.terms.buffers import blank
from deltafmt.terms.levels import add_outer, dequantize
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.codec import add_run
from deltafmt.terms.nm.index.rank import positions_of, ranks_of
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.nm.scatter import scatter
from deltafmt.terms.tiles import stream_words, tiles

VECTORS = 16


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop: how often its unit occurs, the bytes that it moves, and how to run it."""

    name: str
    unit: str
    count: int
    moved: int
    run: Callable[[], Any]


def loops(rows: int, columns: int, keep: int, group: int, share: int) -> list[Loop]:
    """Return every loop on random input of one shape."""
    rng = np.random.default_rng(0)
    base_values = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    base = floats.narrow(base_values, "BF16")
    finetuned = floats.narrow(
        base_values + rng.standard_normal((rows, columns), np.float32) * np.float32(0.001), "BF16"
    )
    delta = rng.standard_normal((rows, columns), np.float32)
    groups, mask_rows = columns // group, rows // share
    elements, kept = rows * columns, rows * groups * keep
    drawn = mask_rows * groups * keep
    positions = hashing.seeded(1, 0, mask_rows, groups, keep, group)
    factor = np.float32(group / keep)
    entries, _ = gather_difference(finetuned, "BF16", base, "BF16", positions, group, share, factor)
    scales = np.full((rows, 1), 0.01, np.float32)
    found = [
        Loop("seeded", "position", drawn, drawn, lambda: hashing.seeded(1, 0, mask_rows, groups, keep, group)),
        Loop("uniform", "position", drawn, drawn, lambda: uniform(1, 0, mask_rows, groups, keep, group)),
        Loop("draw", "element", elements, elements, lambda: draw(1, rows, columns, 0.8)),
        Loop("subtract", "element", elements, 8 * elements, lambda: floats.subtract(finetuned, "BF16", base, "BF16")),
        Loop("add", "element", elements, 8 * elements, lambda: floats.add(base, "BF16", delta, "BF16")),
        Loop(
            "gather_difference", "element", elements, 4 * elements + drawn + 4 * kept,
            lambda: gather_difference(finetuned, "BF16", base, "BF16", positions, group, share, factor),
        ),
    ]  # fmt: skip
    for bits, grid, rule in ((4, "midtread", "minmax"), (2, "midrise", "mse"), (4, "midtread", "mse")):
        found.append(
            Loop(
                f"quantize k={bits} {rule}", "kept entry", kept, 5 * kept,
                lambda b=bits, g=grid, s=rule: quantize(entries, b, g, s, 0, "BF16"),
            )
        )  # fmt: skip
    for bits in (1, 2, 3, 4, 5, 8):
        codes = rng.integers(0, 2**bits, (rows, groups * keep), np.uint8)
        packed = np.zeros((tiles(rows, share), stream_words(groups * keep, bits), 32), np.uint32)
        words.pack_into(codes, bits, packed, share)
        moved, out = kept + packed.nbytes, np.zeros_like(packed)
        found.append(
            Loop(
                f"pack_into k={bits}", "kept entry", kept, moved,
                lambda c=codes, b=bits, o=out: words.pack_into(c, b, o, share),
            )
        )  # fmt: skip
        found.append(
            Loop(
                f"unpack k={bits}", "kept entry", kept, moved,
                lambda p=packed, b=bits: words.unpack(p, rows, groups * keep, b, share),
            )
        )  # fmt: skip
    ascending = np.sort(positions, axis=2)
    ranks = ranks_of(ascending, group)
    codes = rng.integers(0, 15, (rows, groups * keep), np.uint8)
    every = rng.integers(0, 15, (rows, columns), np.uint8)
    offsets, u, v = np.full((rows, 1), 14, np.int32), delta.T[:VECTORS].copy(), delta[:VECTORS]
    found += [
        Loop("ranks_of", "position", drawn, drawn + ranks.nbytes, lambda: ranks_of(ascending, group)),
        Loop("positions_of", "position", drawn, drawn + ranks.nbytes, lambda: positions_of(ranks, keep, group)),
        Loop(
            "scatter", "element", elements, 4 * elements + kept + drawn,
            lambda: scatter(codes, scales, positions, columns, group, share, 14, 0),
        ),
        Loop(
            "dequantize", "element", elements, 5 * elements,
            lambda: dequantize(every, 2, offsets, scales, columns),
        ),
        Loop(
            f"add_outer of {len(v)}", "element", elements, 8 * elements,
            lambda: add_outer(u, v, np.zeros((rows, columns), np.float32)),
        ),
    ]  # fmt: skip
    return found + in_one_pass(finetuned, base, NMLayout(keep, group, 4, share=share))


def in_one_pass(finetuned: floats.Raw, base: floats.Raw, layout: NMLayout) -> list[Loop]:
    """Return the loops that do all their steps for a row while it is in the cache; add_run draws the positions too."""
    rows, columns = base.shape
    positions = hashing.seeded(1, 0, layout.mask_rows(rows), layout.groups(columns), layout.n, layout.m)
    packed = blank(layout, rows, columns)
    run = DeltaRows(finetuned, "BF16", base, "BF16", 0)
    factor = np.float32(layout.m / layout.n)
    pack_kept(run, positions, layout, "minmax", factor, packed)
    stored = sum(array.nbytes for array in packed.values())
    return [
        Loop(
            "pack_kept k=4 minmax", "element", base.size, 4 * base.size + positions.size + stored,
            lambda: pack_kept(run, positions, layout, "minmax", factor, packed),
        ),
        Loop(
            "add_run k=4", "element", base.size, 4 * base.size + stored,
            lambda: add_run(layout, packed, 1, 0, base, "BF16", "BF16"),
        ),
    ]  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="rows, a multiple of 32 (512)")
    parser.add_argument("--columns", type=int, default=1024, help="columns, a multiple of M (1024)")
    parser.add_argument("--nm", default="4:16", help="N:M (4:16)")
    parser.add_argument("--share", type=int, default=4, help="rows that share positions (4)")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each; the median counts (9)")
    options = parser.parse_args()
    keep, group = map(int, options.nm.split(":"))
    if options.rows % 32 or options.columns % group:
        parser.error("rows must be a multiple of 32, columns of M")
    figures, rows = [], [["loop", "compiled", "numpy", "copy", "ns a", "times the copy"]]
    for loop in loops(options.rows, options.columns, keep, group, options.share):
        source = np.ones(max(loop.moved // 2, 1), np.uint8)
        target = np.empty_like(source)
        scale = 1e9 / loop.count
        loop.run()
        fast = seconds(loop.run, options.repeats) * scale
        with core.reference_only():
            slow = seconds(loop.run, 3) * scale
        copy = seconds(lambda s=source, t=target: np.copyto(t, s), options.repeats) * scale
        rows.append([loop.name, f"{fast:.3f}", f"{slow:.3f}", f"{copy:.4f}", loop.unit, f"{fast / copy:.1f}"])
        for label, value in (("compiled", fast), ("numpy", slow), ("copy", copy)):
            figures.append(Figure(f"{loop.name}, {label}", value, f"ns a {loop.unit}"))
    report("loops", figures, rows, shape=[options.rows, options.columns], nm=options.nm, share=options.share)


if __name__ == "__main__":
    main()
