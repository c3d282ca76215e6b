"""The launch of the lowbit kernel: its grid, blocks and arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels.launch_arguments import (
    DTYPES,
    output_arguments,
    plane_arguments,
    tile_tokens,
    token_arguments,
    word_arguments,
)
from deltafmt.kernels.lowbit import kernel
from deltafmt.kernels.record import LayoutTable
from deltafmt.kernels.recorded_launches import run
from deltafmt.kernels.segments import Segments
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.tiles import plane_words, planes

WORDS = 32


def launch_products(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: LayoutTable[LowbitLayout],
    segments: Segments,
    most: int,
) -> None:
    """Launch the products of one layout for slots of at most ``most`` tokens; see :meth:`.kind.TermKernels.launch`."""
    tiles = segments.tiles(tile_tokens(min(segments.usual, most)), longest=most)
    layout = table.layout
    widths = planes(layout.bits)
    words = [plane_words(table.columns, width) for width in widths]
    per_part, count = output_arguments(outputs, 32)
    run(
        kernel.lowbit_kernel,
        (count, tiles.table.shape[0]),
        **token_arguments(x, table, tiles),
        **per_part,
        **word_arguments(words),
        **plane_arguments("PLANE", layout.bits),
        scale_group=layout.scale_group or table.columns + 32,
        scales=0 if layout.axis == "column" else layout.scales(table.columns),
        TOP=layout.top,
        SCALE=DTYPES[layout.scale_dtype],
        BY_COLUMN=layout.axis == "column",
        ZEROS=layout.has_zero_points,
        WORDS=WORDS,
        EVEN=all(table.columns % (WORDS * (32 // width)) == 0 for width in widths),
        num_warps=4,
    )
