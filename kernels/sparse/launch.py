"""The launch of the sparse kernel: its grid, blocks and arguments."""

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
from deltafmt.kernels.record import LayoutTable
from deltafmt.kernels.recorded_launches import run
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.sparse import kernel
from deltafmt.terms.sparse.layout import SparseLayout


def launch_products(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: LayoutTable[SparseLayout],
    segments: Segments,
    most: int,
) -> None:
    """Launch the products of one layout for slots of at most ``most`` tokens; see :meth:`.kind.TermKernels.launch`."""
    tiles = segments.tiles(tile_tokens(min(segments.usual, most)), longest=most)
    layout = table.layout
    per_part, count = output_arguments(outputs, 32)
    run(
        kernel.sparse_kernel,
        (count, tiles.table.shape[0]),
        **token_arguments(x, table, tiles),
        **per_part,
        blocks=layout.blocks(table.columns),
        span=layout.span,
        **plane_arguments("GAP", layout.gap_bits),
        FILLER=layout.filler,
        **value_arguments(layout.values),
        num_warps=1,
    )
