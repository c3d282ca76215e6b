"""The dense delta of a packed ``lowrank`` term, in torch: unpack vectors, add their products (spec, section 13).

Written apart from the numpy decoder, from the specification alone, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from deltafmt.kernels.lowbit.naive import coded_values, grouped
from deltafmt.kernels.nm.naive import unpack_fields
from deltafmt.terms.lowrank.layout import LowRankLayout


def lowrank_delta(layout: LowRankLayout, buffers: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """Return the dense float32 delta, shape (rows, columns).

    Args:
        layout: of the term.
        buffers: ``u`` and ``v``, or their codes as int32, scales and zero points, shaped as the layout says.
        rows, columns: of the delta.
    """
    u, v = vectors(layout, buffers, "u", rows), vectors(layout, buffers, "v", columns)
    delta = torch.zeros(rows, columns, device=u.device)
    for left, right in zip(u, v, strict=True):
        delta += left[:, None] * right
    return delta


def vectors(layout: LowRankLayout, buffers: Mapping[str, torch.Tensor], side: str, length: int) -> torch.Tensor:
    """Return the float32 vectors of one side, shape (R, length)."""
    coding = layout.factors
    if isinstance(coding, str):
        return buffers[side].float()
    words = buffers[f"{side}_codes"]
    # As one tile a word stream of 32 rows would have them: (tiles, words, 32).
    lanes = functional.pad(words, (0, 0, 0, -layout.rank % 32)).view(-1, 32, words.shape[1]).transpose(1, 2)
    codes = unpack_fields(lanes, layout.rank, length, coding.bits, 1)
    zero_points = None
    if coding.has_zero_points:
        zero_points = grouped(coding, buffers[f"{side}_zero_points"], length)
    return coded_values(coding, codes, grouped(coding, buffers[f"{side}_scales"], length), zero_points)
