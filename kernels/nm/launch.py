"""The launches of the ``nm`` kernels: the kernel that a layout takes, its grid, blocks and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton

from deltafmt.kernels.launch_arguments import DTYPES, output_arguments, tile_tokens, token_arguments
from deltafmt.kernels.nm import dense, elements, fused, gather
from deltafmt.kernels.nm.index import index_constants, index_planes, whole_words
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import MAX_PARTS, LayoutTable
from deltafmt.kernels.recorded_launches import run
from deltafmt.kernels.segments import Segments, TokenTiles
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import planes

MAX_UNROLL = 64  # elements of a step that the gather kernel unrolls


def gather_tokens(layout: NMLayout) -> int:
    """Return how many tokens of a delta are gathered at most; more are multiplied by dense tiles.

    Measured on an H100. A dense tile costs as much as its decoding, whatever the number of tokens: the less a gathered
    element costs, the more tokens it takes for dense tiles to be quicker.
    """
    if layout.n > 1 or layout.share == 1:
        return 112 if layout.n > 1 else 48
    return 224 if layout.m >= 32 else 96


def is_power_of_two(number: int) -> bool:
    """Return whether a number is 1, 2, 4 and so on."""
    return number & (number - 1) == 0


def step_elements(layout: NMLayout) -> int:
    """Return the elements of a gather step, whole words of every plane and whole hashes; 0: not to be unrolled."""
    if layout.scale_group or not (is_power_of_two(layout.n) and is_power_of_two(layout.m)):
        return 0
    step = max(layout.n, *(32 // width for width in planes(layout.bits)), *whole_words(layout))
    return step if step <= MAX_UNROLL else 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """The shape of a gather program: the constants of ``gather.py`` that decide about speed alone.

    Attributes:
        mask_rows: MASK_ROWS; each 32 of them are a warp's lanes.
        steps: STEPS of a chunk. If there are more warps than the mask rows need, they share the steps.
        warps: of a program.
        classes: the most CLASSES of a plane: sums for each row and token. More of them save shifts and take registers.
    """

    mask_rows: int
    steps: int
    warps: int
    classes: int


def gather_blocks(layout: NMLayout, step: int, columns: int, tokens: int, programs: int) -> Blocks:
    """Return the shape of a gather program.

    Args:
        layout: of the launch.
        step: elements of a gather step.
        columns: in_features.
        tokens: T, tokens of a tile.
        programs: blocks of 32 mask rows in the whole launch, over all token tiles: how much work there is.
    """
    row_steps = triton.next_power_of_2(-(-layout.groups(columns) * layout.n // step))
    classes = 4 if tokens * layout.share <= 8 else 2 if tokens * layout.share <= 16 else 1
    if programs <= 1024 and tokens == 1:
        # Little work: few rows and many steps a program, so that every multiprocessor gets programs.
        return Blocks(32, min(16, row_steps), 8 if row_steps >= 8 else 4, classes)
    mask_rows = 128 if step * layout.share <= 32 or tokens > 1 else 32
    per_thread = max(1, min(4, 128 // (step * layout.share * tokens)))
    if layout.share == 1 and tokens == 1 and layout.n > 1:
        mask_rows, per_thread = 64, min(per_thread, 2)
    steps = min(per_thread * (128 // mask_rows), row_steps)
    while steps > 1 and steps * (step // layout.n) * layout.m > 4096:
        steps //= 2
    return Blocks(mask_rows, steps, max(1, min(4, mask_rows * steps // 32)), classes)


def launch_products(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[NMLayout], segments: Segments
) -> None:
    """Launch the products of one layout, in up to two launches.

    Slots of at most :func:`gather_tokens` tokens are gathered; the token tiles of the others go to ``dot_kernel``.
    """
    limit = gather_tokens(table.layout)
    if segments.shortest <= limit:
        tiles = segments.tiles(tile_tokens(min(segments.usual, limit)), longest=limit)
        _launch_gather(outputs, x, table, tiles)
    if segments.longest > limit:
        tiles = segments.tiles(128 if segments.longest > 64 else 64, shortest=limit + 1)
        _launch_dot(outputs, x, table, tiles)


def _layout_constants(layout: NMLayout) -> dict[str, Any]:
    return {
        "N": layout.n,
        "M": layout.m,
        "BITS": layout.bits,
        "SHARE": layout.share,
        "TOP": layout.top,
        **index_constants(layout),
        "POSITION_BITS": layout.position_bits,
    }


def _element_arguments(layout: NMLayout, columns: int) -> dict[str, Any]:
    kept = layout.kept(columns)
    return {
        "kept": kept,
        "code_words": layout.codes_words(columns),
        "index_words": layout.index_words(columns),
        "scale_group": layout.scale_group or kept,
        "scales": layout.scales_per_row(columns),
    }


def gather_arguments(layout: NMLayout, step: int, columns: int, blocks: Blocks) -> dict[str, Any]:
    """Return the gather kernel's arguments that follow from the layout and the shape of a program."""
    kept = layout.kept(columns)
    code_planes = planes(layout.bits)
    words = [-(-kept * width // 32) for width in code_planes]
    places = [*index_planes(layout, columns), 0, 0, 0]
    classes = [min(blocks.classes, 16 // width) for width in code_planes]
    return {
        "groups": layout.groups(columns),
        "code_words": sum(words),
        "words0": words[0],
        "words1": words[1] if len(words) > 1 else 0,
        "index_words": layout.index_words(columns),
        "places0": places[0],
        "places1": places[1],
        "places2": places[2],
        "N": layout.n,
        "LOG_M": layout.position_bits,
        "SHARE": layout.share,
        "TOP": layout.top,
        "SCALE": DTYPES[layout.scale_dtype],
        **index_constants(layout),
        "PLANE0": code_planes[0],
        "CLASSES0": classes[0],
        "PLANE1": code_planes[1] if len(words) > 1 else 0,
        "CLASSES1": classes[1] if len(words) > 1 else 0,
        "ELEMENTS": step,
        "STEPS": blocks.steps,
        "MASK_ROWS": blocks.mask_rows,
        "EVEN": kept % (step * blocks.steps) == 0 and columns % layout.m == 0,
    }


def _launch_gather(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[NMLayout], tiles: TokenTiles
) -> None:
    layout = table.layout
    step = step_elements(layout)
    tile_count = tiles.table.shape[0]
    arguments = token_arguments(x, table, tiles)
    if step:
        programs = sum(-(-output.shape[1] // (32 * layout.share)) for output in outputs) * tile_count
        blocks = gather_blocks(layout, step, table.columns, tiles.size, programs)
        per_part, count = output_arguments(outputs, blocks.mask_rows * layout.share)
        arguments |= per_part | gather_arguments(layout, step, table.columns, blocks)
        run(gather.gather_kernel, (count, tile_count), **arguments, num_warps=blocks.warps)
        return
    per_part, count = output_arguments(outputs, 32)
    arguments |= per_part | _element_arguments(layout, table.columns) | _layout_constants(layout)
    arguments |= {
        "SCALE": DTYPES[layout.scale_dtype],
        "SCALED": layout.scale_group > 0,
        "ELEMENTS": 32,
        "BLOCK_ROWS": 32,
    }
    run(elements.element_kernel, (count, tile_count), **arguments, num_warps=4)


def _launch_dot(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[NMLayout], tiles: TokenTiles
) -> None:
    layout = table.layout
    padded = triton.next_power_of_2(layout.m)
    rows = 64
    per_part, count = output_arguments(outputs, rows)
    arguments = token_arguments(x, table, tiles) | per_part
    arguments |= _element_arguments(layout, table.columns) | _layout_constants(layout)
    arguments |= {
        "groups": layout.groups(table.columns),
        "PADDED": padded,
        "SCALE": DTYPES[layout.scale_dtype],
        "SCALED": layout.scale_group > 0,
        "BLOCK_ROWS": rows,
        "GROUPS": max(1, 64 // padded),
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }
    run(dense.dot_kernel, (count, tiles.table.shape[0]), **arguments, num_warps=4, num_stages=2)


def launch_expand(operand: Operand, base: torch.Tensor | None, out: torch.Tensor, start: int, stop: int) -> None:
    """Launch the decoding of rows ``start`` to ``stop`` into ``out``, added to ``base`` if that is given."""
    layout, buffers = cast("NMLayout", operand.layout), operand.buffers
    padded = triton.next_power_of_2(layout.m)
    rows, groups = 32, max(1, 128 // padded)
    constants = _layout_constants(layout)
    grid = (-(-(stop - start) // rows), -(-layout.groups(operand.columns) // groups))
    run(
        dense.expand_kernel,
        grid,
        codes_ptr=buffers["codes"],
        index_ptr=buffers.get("index", buffers["codes"]),
        scales_ptr=buffers["scales"],
        seed=operand.seed - (1 << 32 if operand.seed >= 1 << 31 else 0),
        base_ptr=out if base is None else base,
        base_stride=0 if base is None else base.stride(0),
        out_ptr=out,
        out_stride=out.stride(0),
        first_row=start,
        rows=stop,
        columns=operand.columns,
        **_element_arguments(layout, operand.columns),
        **constants,
        PADDED=padded,
        BASE=base is not None,
        BLOCK_ROWS=rows,
        GROUPS=groups,
        num_warps=4,
    )


def launch_embedding(output: torch.Tensor, ids: torch.Tensor, table: LayoutTable[NMLayout], segments: Segments) -> None:
    """Launch the addition of each token's row onto its embedding."""
    layout, block = table.layout, 256
    arguments = _element_arguments(layout, table.columns)
    run(
        dense.embedding_kernel,
        (output.shape[0], -(-arguments["kept"] // block)),
        ids_ptr=ids,
        slots_ptr=segments.slots,
        slot_count=segments.count,
        records_ptr=table.records,
        y_ptr=output,
        y_stride=output.stride(0),
        columns=table.columns,
        SCALE=DTYPES[layout.scale_dtype],
        ELEMENTS=block,
        **arguments,
        **_layout_constants(layout),
        num_warps=4,
    )


def launch_fused(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    table: LayoutTable[NMLayout],
    slot: int,
) -> None:
    """Launch base and one delta in one kernel: one token, up to three parts, contiguous weights.

    Args:
        outputs: for each part, shape (1, rows); written, not added to.
        x: shape (1, columns).
        weights: of the base, for each part, shape (rows, columns).
        table: of a layout that :func:`step_elements` can unroll.
        slot: of the delta.
    """
    layout, columns = table.layout, table.columns
    step = step_elements(layout)
    row_steps = triton.next_power_of_2(-(-layout.groups(columns) * layout.n // step))
    mask_rows = 16 if layout.share <= 2 else 32 // layout.share
    blocks = Blocks(mask_rows, min(16, row_steps), 4, 4)
    counts = [-(-output.shape[1] // (mask_rows * layout.share)) for output in outputs]
    weight, output = [*weights, weights[0], weights[0]], [*outputs, outputs[0], outputs[0]]
    arguments = gather_arguments(layout, step, columns, blocks)
    run(
        fused.fused_kernel,
        (sum(counts),),
        x_ptr=x,
        **{f"weight{i}_ptr": weight[i] for i in range(MAX_PARTS)},
        **{f"y{i}_ptr": output[i] for i in range(MAX_PARTS)},
        **{f"rows{i}": output[i].shape[1] for i in range(MAX_PARTS)},
        block1=counts[0],
        block2=sum(counts[:2]),
        records_ptr=table.records,
        slot=slot,
        columns=columns,
        PARTS=len(outputs),
        BLOCK=512,
        STAGES=3,
        **arguments,
        num_warps=blocks.warps,
    )
