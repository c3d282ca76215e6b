"""The cases of ``lowrank``."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from strategies import lowrank_layouts
from term_kinds import KindCases
from term_kinds.lowbit import largest_buffers, random_codes


def arrays(rng: np.random.Generator, layout: LowRankLayout, rows: int, columns: int, seed: int) -> LowRankArrays:
    """Draw the content of a term: no more vectors than the matrix may have."""
    sides = []
    rank = min(layout.rank, rows, columns)
    for length in (rows, columns):
        if isinstance(layout.factors, Coding):
            side = random_codes(rng, layout.factors, rank, length)
            # Sums of products of two codes of 8 bits would leave F16.
            sides.append(dataclasses.replace(side, scales=side.scales / np.float32(16)))
        else:
            sides.append(narrow(rng.standard_normal((rank, length), np.float32), layout.factors))
    return LowRankArrays(*sides)


def naive(operand: Any) -> Any:
    """Return the dense delta of an operand."""
    from deltafmt.kernels.lowrank.naive import lowrank_delta

    return lowrank_delta(operand.layout, operand.buffers, operand.rows, operand.columns)


def magnitude(operand: Any) -> Any:
    """Return the magnitude of what is summed for each element, float64."""
    from deltafmt.kernels.lowrank.naive import vectors

    buffers = largest_buffers(operand)
    sides = (("u", operand.rows), ("v", operand.columns))
    left, right = (vectors(operand.layout, buffers, side, length).abs().double() for side, length in sides)
    return 4 * left.T @ right


BANDS = {
    "r=128 k=1 midrise": LowRankLayout(128, Coding(1, "midrise")),
    "r=128 k=2 asymmetric scale/128": LowRankLayout(128, Coding(2, "asymmetric", "BF16", 128)),
    "r=128 k=3 asymmetric scale/128": LowRankLayout(128, Coding(3, "asymmetric", "BF16", 128)),
    "r=16 BF16": LowRankLayout(16, "BF16"),
}

CASES = KindCases(
    layouts=lowrank_layouts(),
    samples=[
        LowRankLayout(20, "BF16"),
        LowRankLayout(3, "F32"),
        LowRankLayout(45, Coding(1, "midrise", "BF16", 0)),
        LowRankLayout(33, Coding(2, "midrise", "BF16", 128)),
        LowRankLayout(17, Coding(3, "asymmetric", "F32", 32)),
        LowRankLayout(2, Coding(8, "midtread", "BF16", 64)),
        LowRankLayout(9, Coding(7, "asymmetric", "BF16", 0)),
    ],
    arrays=arrays,
    naive=naive,
    magnitude=magnitude,
    compiled={name: (layout, 0) for name, layout in BANDS.items()},
    limits={
        "r=128 k=1 midrise, project": (88, None),
        "r=128 k=1 midrise, spread": (72, None),
        "r=128 k=2 asymmetric scale/128, project": (88, None),
        "r=128 k=2 asymmetric scale/128, spread": (80, None),
        "r=128 k=3 asymmetric scale/128, project": (104, None),
        "r=128 k=3 asymmetric scale/128, spread": (88, None),
        "r=16 BF16, project": (56, None),
        "r=16 BF16, spread": (104, None),
    },
    launches=("project", "spread"),
)
