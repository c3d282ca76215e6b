"""The cases of ``nm``; its kernels have tests of their own beside."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.layout import NMLayout
from index_cases import INDEX_CASES
from strategies import layouts
from term_kinds import KindCases


def arrays(rng: np.random.Generator, layout: NMLayout, rows: int, columns: int, seed: int) -> nm.NMArrays:
    """Draw codes and scales at the positions that a layout allows."""
    mask_rows, groups = layout.mask_rows(rows), layout.groups(columns)
    kept_at = INDEX_CASES[layout.index].positions(rng, layout, seed, mask_rows, groups)
    codes = rng.integers(0, layout.top, (rows, layout.kept(columns)), np.uint8, endpoint=True)
    scales = (rng.random((rows, layout.scales_per_row(columns)), np.float32) + np.float32(0.1)) / np.float32(8)
    if layout.scale_dtype == "BF16":
        scales = widen(narrow(scales, "BF16"), "BF16")
    found = nm.NMArrays(kept_at, codes, scales)
    codes[nm.outside(layout, found, columns)] = 0
    return found


def naive(operand: Any) -> Any:
    """Return the dense delta of an operand."""
    from deltafmt.kernels.nm.naive import nm_delta

    return nm_delta(operand.layout, operand.buffers, operand.seed, operand.rows, operand.columns)


def magnitude(operand: Any) -> Any:
    """Return the largest magnitude that each kept element could have, and zero elsewhere, float64."""
    codes = operand.buffers["codes"]
    ones = {**operand.buffers, "codes": codes.new_full(codes.shape, -1)}
    return naive(dataclasses.replace(operand, buffers=ones)).abs().double()


CASES = KindCases(
    layouts=layouts(),
    samples=[
        NMLayout(1, 32, 4, "seeded", share=4),
        NMLayout(4, 16, 4, "fixed"),
        NMLayout(3, 7, 3, "fixed", "midtread", 2, "F32", 5),
        NMLayout(2, 16, 2, "seeded", "midrise"),
        *(layout for known in INDEX_CASES.values() for layout in known.samples),
    ],
    arrays=arrays,
    naive=naive,
    magnitude=magnitude,
    compiled={name: (layout, 0) for known in INDEX_CASES.values() for name, layout in known.compiled.items()},
    limits={name: limits for known in INDEX_CASES.values() for name, limits in known.limits.items()},
)
