"""The cases of ``lowbit``, and random codes, which other kinds use too."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout
from strategies import lowbit_layouts
from term_kinds import KindCases


def random_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw scales of about one that BF16 holds."""
    return widen(narrow(rng.uniform(0.5, 2, shape).astype(np.float32), "BF16"), "BF16")


def random_codes(rng: np.random.Generator, coding: Coding, rows: int, columns: int) -> LowbitArrays:
    """Draw the codes of rows of numbers."""
    codes = rng.integers(0, coding.top + 1, (rows, columns)).astype(np.uint8)
    shape = rows, coding.scales(columns)
    zeros = rng.integers(0, coding.top + 1, shape).astype(np.uint8) if coding.has_zero_points else None
    return LowbitArrays(codes, random_scales(rng, shape), zeros)


def arrays(rng: np.random.Generator, layout: LowbitLayout, rows: int, columns: int, seed: int) -> LowbitArrays:
    """Draw the content of a term."""
    drawn = random_codes(rng, layout, rows, columns)
    return dataclasses.replace(drawn, scales=random_scales(rng, (1, columns))) if layout.axis == "column" else drawn


def naive(operand: Any) -> Any:
    """Return the dense delta of an operand."""
    from deltafmt.kernels.lowbit.naive import lowbit_delta

    return lowbit_delta(operand.layout, operand.buffers, operand.rows, operand.columns)


def largest_buffers(operand: Any) -> dict[str, Any]:
    """Return buffers of which every code is the largest and every zero point zero: their sums are added apart."""
    buffers = dict(operand.buffers)
    for name, buffer in buffers.items():
        if name.endswith("codes"):
            buffers[name] = buffer.new_full(buffer.shape, -1)
        elif name.endswith("zero_points"):
            buffers[name] = buffer.new_zeros(buffer.shape)
    return buffers


def magnitude(operand: Any) -> Any:
    """Return the magnitude of what is summed for each element, float64."""
    return 2 * naive(dataclasses.replace(operand, buffers=largest_buffers(operand))).abs().double()


CASES = KindCases(
    layouts=lowbit_layouts(),
    samples=[
        *(LowbitLayout(bits, "midrise") for bits in range(1, 9)),
        LowbitLayout(4),
        LowbitLayout(3, "midtread", "F32", 32),
        LowbitLayout(7, "asymmetric"),
        LowbitLayout(1, "midrise", "BF16", 0, "column"),
        LowbitLayout(2, "midrise", "F32", 0, "column"),
        LowbitLayout(4, "asymmetric", "BF16", 64),
    ],
    arrays=arrays,
    naive=naive,
    magnitude=magnitude,
    compiled={
        "k=1 midrise": (LowbitLayout(1, "midrise"), 0),
        "k=2 midrise": (LowbitLayout(2, "midrise"), 0),
        "k=4 midtread scale/128": (LowbitLayout(4, scale_group=128), 0),
    },
    limits={
        "k=1 midrise": (80, 3.2),
        "k=2 midrise": (64, 4.8),
        "k=4 midtread scale/128": (72, 6.2),
    },
)
