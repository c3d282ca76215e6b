"""The launches of the two low-rank kernels: their grids, blocks and arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels.launch_arguments import (
    output_arguments,
    tile_tokens,
    token_arguments,
    value_arguments,
    word_arguments,
)
from deltafmt.kernels.lowrank import kernel
from deltafmt.kernels.record import LayoutTable
from deltafmt.kernels.recorded_launches import run, scratch
from deltafmt.kernels.segments import Segments
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.tiles import plane_words, planes

WORDS = 32
VECTORS, UNITS = 16, 8  # of a spread program: one element of every sum a thread
MOST_TILE = 2  # tokens of a tile: each has 32 sums a thread


def launch_products(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: LayoutTable[LowRankLayout],
    segments: Segments,
    most: int,
) -> None:
    """Launch the products of one layout for slots of at most ``most`` tokens; see :meth:`.kind.TermKernels.launch`."""
    tiles = segments.tiles(min(tile_tokens(min(segments.usual, most)), MOST_TILE), longest=most)
    count = tiles.table.shape[0]
    layout, width = table.layout, table.records.shape[1]
    tokens = token_arguments(x, table, tiles)
    coding = layout.factors
    widths: tuple[int, ...] = ()
    group = scales = 1
    if isinstance(coding, Coding):
        widths, scales = planes(coding.bits), coding.scales(table.columns)
        group = coding.scale_group or 2**30
    common = {**value_arguments(coding), "ZEROS": isinstance(coding, Coding) and coding.has_zero_points}
    words = [plane_words(table.columns, plane) for plane in widths]
    blocks = -(-layout.rank // 32)
    z = scratch(count, width, tiles.size, layout.rank, device=x.device)
    run(
        kernel.project_kernel,
        (width * blocks, count),
        **tokens,
        z_ptr=z,
        ranks=layout.rank,
        blocks=blocks,
        **word_arguments(words),
        scale_group=group,
        scales=scales,
        **common,
        WORDS=WORDS,
        EVEN=all(table.columns % (WORDS * (32 // plane)) == 0 for plane in widths),
        num_warps=4,
    )
    per_part, programs = output_arguments(outputs, 32 * UNITS)
    run(
        kernel.spread_kernel,
        (programs, count),
        **{name: tokens[name] for name in ("order_ptr", "tiles_ptr", "records_ptr", "PARTS", "TOKENS")},
        z_ptr=z,
        **per_part,
        ranks=layout.rank,
        scale_group=group,
        **common,
        VECTORS=VECTORS,
        UNITS=UNITS,
        num_warps=4,
    )
