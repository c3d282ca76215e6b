"""The dense delta of a packed ``lowbit`` term, in torch: unpack words, place values (spec, section 12).

Written apart from the numpy decoder, from the specification alone, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deltafmt.kernels.nm.naive import tiled_rows, unpack_fields
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowbit.layout import LowbitLayout


def lowbit_delta(layout: LowbitLayout, buffers: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """Return the dense float32 delta, shape (rows, columns).

    Args:
        layout: of the term.
        buffers: ``codes`` as int32, ``scales`` as BF16 or F32, ``zero_points`` as uint8, shaped as the layout says.
        rows, columns: of the delta.
    """
    codes = unpack_fields(buffers["codes"], rows, columns, layout.bits, 1)
    if layout.axis == "column":
        return coded_values(layout, codes, buffers["scales"].expand(rows, columns), None)
    scales = grouped(layout, tiled_rows(buffers["scales"], rows, 1), columns)
    zero_points = None
    if layout.has_zero_points:
        zero_points = grouped(layout, tiled_rows(buffers["zero_points"], rows, 1), columns)
    return coded_values(layout, codes, scales, zero_points)


def grouped(coding: Coding, of_groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return for each of ``count`` elements of every row what belongs to its group."""
    at = torch.arange(count, device=of_groups.device) // (coding.scale_group or count)
    return of_groups[:, at]


def coded_values(
    coding: Coding, codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> torch.Tensor:
    """Section 12.3: return the float32 values of fields; all arguments have one shape."""
    if zero_points is None:
        return (2 * codes - coding.top).float() * (scales.float() * 0.5)
    return (codes - zero_points.long()).float() * scales.float()
