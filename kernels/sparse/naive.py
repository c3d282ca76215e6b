"""The dense delta of a packed ``sparse`` term, in torch: walk the slots, place values (spec, section 14).

Written apart from the numpy decoder, from the specification alone, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deltafmt.kernels.lowbit.naive import coded_values
from deltafmt.kernels.nm.naive import unpack_fields
from deltafmt.terms.sparse.layout import SparseLayout


def sparse_delta(
    layout: SparseLayout, buffers: Mapping[str, torch.Tensor], rows: int, columns: int, slots: int
) -> torch.Tensor:
    """Return the dense float32 delta, shape (rows, columns).

    Args:
        layout: of the term.
        buffers: ``gaps``, ``codes`` and ``starts`` as int32, ``values`` and ``scales`` in their dtypes, shaped as the
            layout says.
        rows, columns, slots: of the term.
    """
    gaps = unpack_fields(buffers["gaps"][None], 32, slots, layout.gap_bits, 1).T
    starts = (buffers["starts"].long() & 0xFFFFFFFF).tolist()
    blocks = layout.blocks(columns)
    lanes = torch.arange(32, device=gaps.device)
    # A column more, which fillers are written to, and the rows of lanes that have none.
    delta = torch.zeros(-(-rows // 32) * 32, columns + 1, device=gaps.device)
    codes = gaps
    if not isinstance(layout.values, str):
        codes = unpack_fields(buffers["codes"][None], 32, slots, layout.values.bits, 1).T
    for part in range(len(starts) - 1):
        tile, block = divmod(part, blocks)
        after = torch.full_like(lanes, block * layout.span)
        for slot in range(starts[part], starts[part + 1]):
            gap = gaps[slot]
            is_entry = gap != layout.filler
            column = torch.where(is_entry, after + gap, columns)
            if isinstance(layout.values, str):
                found = buffers["values"][slot].float()
            else:
                found = coded_values(layout.values, codes[slot], buffers["scales"][tile, 0], None)
            delta[tile * 32 + lanes, column] = found
            after = after + torch.where(is_entry, gap + 1, layout.filler)
    return delta[:rows, :columns]
