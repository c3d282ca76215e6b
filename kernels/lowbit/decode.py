"""The dense delta of a packed ``lowbit`` term, vectorised in torch (specification, section 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.packed_words import chosen_rows, coded_values, each_of_group, fields, rows_of_tiles
from deltafmt.terms.lowbit.layout import LowbitLayout


def decode(operand: Operand, start: int, stop: int) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of the delta, float32, shape (stop - start, columns)."""
    return _decode(operand, lambda tiled: rows_of_tiles(tiled, start, stop))


def decode_rows(operand: Operand, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of the delta, float32, shape (len(rows), columns); rows are int64."""
    return _decode(operand, lambda tiled: chosen_rows(tiled, rows))


def _decode(operand: Operand, take: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Decode the rows that ``take`` gives of a tiled buffer."""
    layout, buffers, columns = cast("LowbitLayout", operand.layout), operand.buffers, operand.columns
    codes = fields(take(buffers["codes"]), columns, layout.bits)
    if layout.axis == "column":
        return coded_values(layout.top, codes, buffers["scales"])

    def each(name: str) -> torch.Tensor:
        return each_of_group(take(buffers[name]), layout.scale_group, columns)

    return coded_values(layout.top, codes, each("scales"), each("zero_points") if layout.has_zero_points else None)
