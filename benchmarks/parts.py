"""What DeltaDQ's separate quantization takes with every number of parts, with offsets or without.

    python benchmarks/parts.py [--groups 8 32]

The matrices have the shapes of SmolLM2-135M. Entries are drawn from a normal distribution; their values decide how many
entries a part has, and nothing else. A part is a ``sparse`` term: gaps, codes of k - log2 m bits, starts of blocks, and
scales. An offset for each part would take a number in the layout table, which is not counted. With no bits left (m =
2^k), codes take none. The paper counts codes alone: 16 M / N / (k - log2 m) times smaller.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import Figure, report

from deltafmt.methods import DeltaDQ
from deltafmt.methods.sampling import uniform
from deltafmt.methods.unstructured import sparse_layout
from deltafmt.terms.sparse.slots import SparseArrays, block_starts

LAYERS, WIDE, INNER, TOKENS, KEYS = 30, 576, 1536, 49152, 192
BITS = 4
SOME = 1536  # rows of the embedding that stand for all
# Each shape, and how many matrices have it; rows of the embedding in units of SOME.
SHAPES = {
    (WIDE, WIDE): 2 * LAYERS,
    (KEYS, WIDE): 2 * LAYERS,
    (INNER, WIDE): 2 * LAYERS + TOKENS // SOME,
    (WIDE, INNER): LAYERS,
}


def entries(rows: int, columns: int, group: int) -> tuple[Any, Any]:
    """Return the columns that 1 of every so many keeps, and codes of 4 bits, shape (rows, kept) each."""
    positions = uniform(0, 0, rows, -(-columns // group), 1, group)
    column = positions[:, :, 0].astype(np.int64) + np.arange(positions.shape[1]) * group
    values = np.random.default_rng(0).standard_normal(column.shape)
    top = np.abs(values).max(axis=1, keepdims=True)
    codes = np.clip(np.floor((values / top + 1) * (1 << BITS - 1)), 0, (1 << BITS) - 1).astype(np.int64)
    return column, codes


def term_bytes(columns: int, column: Any, mine: Any, bits: int) -> int:
    """Return the bytes of the ``sparse`` term of some of the entries, with codes of so many bits or none."""
    rows = len(column)
    layout = sparse_layout(max(float(mine.sum()), 1.0) / (rows * columns), max(bits, 1), "BF16", "BF16")
    chosen = column[mine]
    arrays = SparseArrays(np.cumsum(mine.sum(axis=1)), chosen, np.zeros(chosen.size, np.uint8))
    slots = int(block_starts(layout, arrays, columns)[-1])
    lengths = layout.buffer_lengths(rows, columns, slots)
    return sum(lengths.values()) - (0 if bits else lengths["codes"])


def parts_bytes(group: int, parts: int) -> int:
    """Return the bytes of all matrices with 1 of every so many kept and codes in so many parts."""
    shift = BITS - (parts.bit_length() - 1)
    total = 0
    for (rows, columns), count in SHAPES.items():
        column, codes = entries(rows, columns, group)
        inside = column < columns
        each = (term_bytes(columns, column, inside & (codes >> shift == part), shift) for part in range(parts))
        total += count * sum(each)
    return total


def seeded_bytes(group: int) -> int:
    """Return the bytes of the same dropout with the same codes, whose positions follow from a seed."""
    layout = DeltaDQ(1, group, BITS, share=1).layout
    return sum(count * sum(layout.buffer_lengths(*shape).values()) for shape, count in SHAPES.items())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 32], metavar="M", help="1:M is kept (8 32)")
    options = parser.parse_args()
    weights = 2 * sum(count * rows * columns for (rows, columns), count in SHAPES.items())
    figures = [Figure("weights", weights, "bytes")]
    for group in options.groups:
        for parts in (1, 2, 4, 8, 16):
            size, left = parts_bytes(group, parts), BITS - (parts.bit_length() - 1)
            counted = f"the paper counts {16 * group / left:g}" if left else "no bits are left"
            figures.append(
                Figure(
                    f"1:{group}, k={BITS}, m={parts}",
                    size,
                    "bytes",
                    note=f"{weights / size:.1f} times smaller; {counted}",
                )
            )
        size = seeded_bytes(group)
        figures.append(
            Figure(f"1:{group}, k={BITS}, seeded", size, "bytes", note=f"{weights / size:.1f} times smaller")
        )
    report("parts", figures)


if __name__ == "__main__":
    main()
