"""Every hot loop: compiled, as the numpy reference, and a memory copy of the bytes that it reads and writes.

    python benchmarks/loops.py [--rows 512] [--columns 1024] [--repeats 9]

One thread, one run of rows as pack and unpack hand it out; nanoseconds for each element of the tensor or, where the
loop sees only those, for each kept entry. Without numba the compiled column repeats the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Figure, report, seconds

from deltafmt.methods.method_routines import Routines, select_routines
from deltafmt.terms.floats import narrow
from deltafmt.terms.tiles import stream_words, tiles


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop: how often its unit occurs, the bytes that it moves, and how to run it."""

    name: str
    unit: str
    count: int
    moved: int
    run: Callable[[Routines], Any]


def loops(rows: int, columns: int, keep: int, group: int, share: int) -> list[Loop]:
    """Return every loop on random input of one shape."""
    rng = np.random.default_rng(0)
    base_values = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    base = narrow(base_values, "BF16")
    finetuned = narrow(base_values + rng.standard_normal((rows, columns), np.float32) * np.float32(0.001), "BF16")
    delta = rng.standard_normal((rows, columns), np.float32)
    groups, mask_rows = columns // group, rows // share
    elements, kept = rows * columns, rows * groups * keep
    drawn = mask_rows * groups * keep
    reference = select_routines(False)
    positions = reference.codec.seeded(1, 0, mask_rows, groups, keep, group)
    entries, _ = reference.gather_difference(finetuned, "BF16", base, "BF16", positions, group, share, np.float32(4))
    scales = np.full((rows, 1), 0.01, np.float32)
    found = [
        Loop("seeded", "position", drawn, drawn, lambda r: r.codec.seeded(1, 0, mask_rows, groups, keep, group)),
        Loop("uniform", "position", drawn, drawn, lambda r: r.uniform(1, 0, mask_rows, groups, keep, group)),
        Loop(
            "subtract", "element", elements, 8 * elements,
            lambda r: r.codec.subtract(finetuned, "BF16", base, "BF16"),
        ),
        Loop("add", "element", elements, 8 * elements, lambda r: r.codec.add(base, "BF16", delta, "BF16")),
        Loop(
            "gather_difference", "element", elements, 4 * elements + drawn + 4 * kept,
            lambda r: r.gather_difference(finetuned, "BF16", base, "BF16", positions, group, share, np.float32(4)),
        ),
    ]  # fmt: skip
    for bits, grid, rule in ((4, "midtread", "minmax"), (2, "midrise", "mse"), (4, "midtread", "mse")):
        found.append(
            Loop(
                f"quantize k={bits} {rule}", "kept entry", kept, 5 * kept,
                lambda r, b=bits, g=grid, s=rule: r.quantize(entries, b, g, s, 0, "BF16"),
            )
        )  # fmt: skip
    for bits in (1, 2, 3, 4, 5, 8):
        codes = rng.integers(0, 2**bits, (rows, groups * keep), np.uint8)
        packed = np.zeros((tiles(rows, share), stream_words(groups * keep, bits), 32), np.uint32)
        reference.codec.pack_into(codes, bits, packed, share)
        moved, out = kept + packed.nbytes, np.zeros_like(packed)
        found.append(
            Loop(
                f"pack_into k={bits}", "kept entry", kept, moved,
                lambda r, c=codes, b=bits, o=out: r.codec.pack_into(c, b, o, share),
            )
        )  # fmt: skip
        found.append(
            Loop(
                f"unpack k={bits}", "kept entry", kept, moved,
                lambda r, p=packed, b=bits: r.codec.unpack(p, rows, groups * keep, b, share),
            )
        )  # fmt: skip
    codes = rng.integers(0, 15, (rows, groups * keep), np.uint8)
    found.append(
        Loop(
            "scatter", "element", elements, 4 * elements + kept + drawn,
            lambda r: r.codec.scatter(codes, scales, positions, columns, group, share, 14, 0),
        )
    )  # fmt: skip
    return found


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
    reference, compiled = select_routines(False), select_routines(True)
    figures, rows = [], [["loop", "compiled", "numpy", "copy", "ns a", "times the copy"]]
    for loop in loops(options.rows, options.columns, keep, group, options.share):
        loop.run(compiled)
        source = np.ones(max(loop.moved // 2, 1), np.uint8)
        target = np.empty_like(source)
        scale = 1e9 / loop.count
        fast = seconds(lambda run=loop.run: run(compiled), options.repeats) * scale
        slow = seconds(lambda run=loop.run: run(reference), 3) * scale
        copy = seconds(lambda s=source, t=target: np.copyto(t, s), options.repeats) * scale
        rows.append([loop.name, f"{fast:.3f}", f"{slow:.3f}", f"{copy:.4f}", loop.unit, f"{fast / copy:.1f}"])
        for label, value in (("compiled", fast), ("numpy", slow), ("copy", copy)):
            figures.append(Figure(f"{loop.name}, {label}", value, f"ns a {loop.unit}"))
    report("loops", figures, rows, shape=[options.rows, options.columns], nm=options.nm, share=options.share)


if __name__ == "__main__":
    main()
