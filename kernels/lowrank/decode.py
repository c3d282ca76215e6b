"""The vectors and the dense delta of a packed ``lowrank`` term, vectorised in torch (specification, section 13)."""

from __future__ import annotations

from typing import cast

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.packed_words import chosen_fields, coded_values, each_of_group, fields
from deltafmt.terms.lowrank.layout import LowRankLayout

# Elements of a delta that are summed at a time on the CPU: few enough to stay in the processor's cache.
BLOCK_ELEMENTS = 1 << 18


def decode(operand: Operand, start: int, stop: int) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of the delta, float32, shape (stop - start, columns).

    The products are added one vector after the other, each rounded to float32, as section 13 defines: a merged model
    then has the bits of an unpacked one. A matrix product would be quicker and differ in the last bits.
    """
    left, right = vectors(operand, "u")[:, start:stop], vectors(operand, "v")
    delta = torch.zeros(stop - start, operand.columns, dtype=torch.float32, device=operand.device)
    step = len(delta) if delta.is_cuda else max(BLOCK_ELEMENTS // max(operand.columns, 1), 1)
    for first in range(0, len(delta), max(step, 1)):
        block = delta[first : first + step]
        for u, v in zip(left[:, first : first + step], right, strict=True):
            block += u[:, None] * v
    return delta


def decode_rows(operand: Operand, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of the delta, float32, shape (len(rows), columns); rows are int64.

    They are a matrix product, whose last bits may differ from those of :func:`decode`.
    """
    return vectors(operand, "u", rows).T @ vectors(operand, "v")


def vectors(operand: Operand, side: str, at: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 vectors.

    Args:
        operand: the term.
        side: ``u`` or ``v``.
        at: int64, the elements of every vector that are wanted; all by default.

    Returns:
        Shape (R, rows) for ``u``, (R, columns) for ``v``, (R, len(at)) for some elements.
    """
    coding = cast("LowRankLayout", operand.layout).factors
    buffers, length = operand.buffers, operand.rows if side == "u" else operand.columns
    if isinstance(coding, str):
        return (buffers[side] if at is None else buffers[side][:, at]).float()
    words = buffers[f"{side}_codes"]
    codes = fields(words, length, coding.bits) if at is None else chosen_fields(words, length, coding.bits, at)

    def each(name: str) -> torch.Tensor:
        return each_of_group(buffers[f"{side}_{name}"], coding.scale_group, length, at)

    return coded_values(coding.top, codes, each("scales"), each("zero_points") if coding.has_zero_points else None)
