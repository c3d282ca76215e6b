"""The dense delta of a packed ``nm`` term, vectorised in torch: on devices without the kernels, and for single rows.

See section 11 of the specification.
"""

from __future__ import annotations

from typing import cast

import torch

from deltafmt.kernels.nm.index import positions
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.packed_words import chosen_rows, coded_values, each_of_group, fields, rows_of_tiles
from deltafmt.terms.nm.layout import NMLayout


def decode(operand: Operand, start: int, stop: int) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of the delta, float32, shape (stop - start, columns)."""
    share = cast("NMLayout", operand.layout).share
    codes, scales = (rows_of_tiles(operand.buffers[name], start, stop, share) for name in ("codes", "scales"))
    first, last = start // share, -(-stop // share)
    masks = torch.arange(first, last, device=operand.device)
    kept_at = positions(operand, masks)
    if share > 1:
        row = torch.arange(start, stop, device=operand.device)
        kept_at = kept_at[row // share - first]
    return _scattered(operand, codes, scales, kept_at)


def decode_rows(operand: Operand, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of the delta, float32, shape (len(rows), columns); rows are int64."""
    share = cast("NMLayout", operand.layout).share
    codes, scales = (chosen_rows(operand.buffers[name], rows, share) for name in ("codes", "scales"))
    return _scattered(operand, codes, scales, positions(operand, rows // share))


def _scattered(operand: Operand, codes: torch.Tensor, scales: torch.Tensor, kept_at: torch.Tensor) -> torch.Tensor:
    """Return dense rows of packed codes (rows, words), scales (rows, scales) and positions (rows, groups, N).

    Positions of a damaged index that lie beyond M are left out, as the kernels leave them out.
    """
    layout, columns = cast("NMLayout", operand.layout), operand.columns
    rows, kept = len(codes), layout.kept(columns)
    unpacked = fields(codes, kept, layout.bits)
    values = coded_values(layout.top, unpacked, each_of_group(scales, layout.scale_group, kept))
    groups = layout.groups(columns)
    width = groups * layout.m
    column = kept_at + torch.arange(groups, device=kept_at.device)[:, None] * layout.m
    if layout.m & (layout.m - 1):
        column = torch.where(kept_at < layout.m, column, width)
    # One column more, which takes what is left out.
    wide = torch.zeros(rows, width + 1, dtype=torch.float32, device=codes.device)
    wide.scatter_(1, column.flatten(1), values)
    return wide[:, :columns]
