"""How the sparse kernel is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from deltafmt.kernels.nm_matmul.launch import output_arguments, tile_tokens, token_arguments
from deltafmt.kernels.nm_matmul.segments import Segments
from deltafmt.kernels.sparse_matmul import sparse
from deltafmt.kernels.table import MAX_PARTS, OperandTable
from deltafmt.layout.coding import Coding
from deltafmt.layout.sparse import SparseLayout
from deltafmt.layout.tiles import planes

SLOTS = 16
DTYPES = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32}


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
                **_plane_arguments("GAP", layout.gap_bits),
                FILLER=layout.filler,
                **_value_arguments(layout.values),
                SLOTS=SLOTS,
                num_warps=1,
            )


def _plane_arguments(name: str, bits: int) -> dict[str, int]:
    """Return the widths of a word stream's planes; 0: there is none."""
    widths = planes(bits)
    return {f"{name}{i}": widths[i] if i < len(widths) else 0 for i in range(3)}


def _value_arguments(values: Coding | str) -> dict[str, Any]:
    if isinstance(values, str):
        return {**_plane_arguments("PLANE", 0), "TOP": 0, "DTYPE": DTYPES[values]}
    return {**_plane_arguments("PLANE", values.bits), "TOP": values.top, "DTYPE": DTYPES[values.scale_dtype]}
