"""How the sparse kernel is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels.launch_arguments import (
    output_arguments,
    plane_arguments,
    tile_tokens,
    token_arguments,
    value_arguments,
)
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.sparse import kernel as sparse
from deltafmt.kernels.table import MAX_PARTS, OperandTable
from deltafmt.terms.sparse.layout import SparseLayout

SLOTS = 16


def launch_products(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Launch the products of every ``sparse`` layout that the table holds."""
    if segments.longest == 0:
        return  # no token has a delta
    tiles = segments.tiles(tile_tokens(segments.longest))
    for first in range(0, len(table.parts), MAX_PARTS):
        parts = slice(first, first + MAX_PARTS)
        for held in table.layout_tables(parts, SparseLayout):
            layout = held.layout
            per_part, count = output_arguments(outputs[parts], 32)
            sparse.sparse_kernel[(count, tiles.table.shape[0])](
                **token_arguments(x, held, tiles),
                **per_part,
                blocks=layout.blocks(table.columns),
                span=layout.span,
                **plane_arguments("GAP", layout.gap_bits),
                FILLER=layout.filler,
                **value_arguments(layout.values),
                SLOTS=SLOTS,
                num_warps=1,
            )
