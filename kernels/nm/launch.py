"""How the Triton kernels are launched: which kernel a layout takes, with which blocks, on which grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from deltafmt.kernels.launch_arguments import output_arguments, tile_tokens, token_arguments
from deltafmt.kernels.nm import dense, fused, gather
from deltafmt.kernels.nm.operand import NMOperand
from deltafmt.kernels.segments import Segments, TokenTiles
from deltafmt.kernels.table import MAX_PARTS, LayoutTable, OperandTable
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import planes

MAX_UNROLL = 64  # entries of a step that the gather kernel unrolls


def gather_tokens(layout: NMLayout) -> int:
    """Return how many tokens of a delta are gathered at most; more are multiplied by dense tiles.

    Measured (H100): a tile costs what decoding it does, so it pays the later the less a gathered entry costs.
    """
    if layout.n > 1 or layout.share == 1:
        return 112 if layout.n > 1 else 48
    return 224 if layout.m >= 32 else 96


def lane_bits(layout: NMLayout) -> int:
    """Section 11.4: bits of a hash that a group takes; 0 for a ``fixed`` index."""
    return 0 if layout.index == "fixed" else hashing.lane_bits(layout.n, layout.m)


def is_power_of_two(number: int) -> bool:
    """Return whether a number is 1, 2, 4 and so on."""
    return number & (number - 1) == 0


def step_entries(layout: NMLayout) -> int:
    """Return the entries of a gather step, whole words of every plane and whole hashes; 0: not to be unrolled."""
    if layout.scale_group or not (is_power_of_two(layout.n) and is_power_of_two(layout.m)):
        return 0
    entries = [layout.n] + [32 // width for width in planes(layout.bits)]
    if layout.index == "fixed":
        entries += [32 // width for width in planes(layout.position_bits)]
    else:
        entries.append(layout.n * 64 // lane_bits(layout))
    return max(entries) if max(entries) <= MAX_UNROLL else 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """The shape of a gather program.

    Attributes:
        mask_rows: mask rows of a program; 32 a warp.
        steps: steps of a chunk, shared out over the warps that the mask rows leave.
        warps: of a program.
        classes: accumulators of a plane for each row and token.
    """

    mask_rows: int
    steps: int
    warps: int
    classes: int


def gather_blocks(layout: NMLayout, entries: int, columns: int, tokens: int, programs: int) -> Blocks:
    """Return the shape of a gather program.

    Args:
        layout, entries, columns: of the launch.
        tokens: T, tokens of a tile.
        programs: 32-row blocks of the whole launch, all tiles: how much there is to share out.
    """
    row_steps = triton.next_power_of_2(-(-layout.groups(columns) * layout.n // entries))
    classes = 4 if tokens * layout.share <= 8 else 2 if tokens * layout.share <= 16 else 1
    if programs <= 1024 and tokens == 1:
        # Little work: few rows a program and all columns at once, so that every multiprocessor has its share.
        return Blocks(32, min(16, row_steps), 8 if row_steps >= 8 else 4, classes)
    mask_rows = 128 if entries * layout.share <= 32 or tokens > 1 else 32
    per_thread = max(1, min(4, 128 // (entries * layout.share * tokens)))
    if layout.share == 1 and tokens == 1 and layout.n > 1:
        mask_rows, per_thread = 64, min(per_thread, 2)
    steps = min(per_thread * (128 // mask_rows), row_steps)
    while steps > 1 and steps * (entries // layout.n) * layout.m > 4096:
        steps //= 2
    return Blocks(mask_rows, steps, max(1, min(4, mask_rows * steps // 32)), classes)


def launch_products(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Launch the products of every layout that the table holds; see :func:`.product.nm_matmul_`."""
    if segments.longest == 0:
        return  # no token has a delta
    for first in range(0, len(table.parts), MAX_PARTS):
        parts = slice(first, first + MAX_PARTS)
        for layout_table in table.layout_tables(parts, NMLayout):
            limit = gather_tokens(layout_table.layout)
            if segments.shortest <= limit:
                size = tile_tokens(min(segments.longest, limit))
                tiles = segments.tiles(size, longest=limit)
                _launch_gather(outputs[parts], x, layout_table, tiles)
            if segments.longest > limit:
                size = 128 if segments.longest > 64 else 64
                tiles = segments.tiles(size, shortest=limit + 1)
                _launch_dot(outputs[parts], x, layout_table, tiles)


def _layout_constants(layout: NMLayout) -> dict[str, Any]:
    return {
        "KEEP": layout.n,
        "GROUP": layout.m,
        "BITS": layout.bits,
        "SHARE": layout.share,
        "TOP": layout.top,
        "LANE_BITS": lane_bits(layout),
        "POSITION_BITS": layout.position_bits,
    }


def _scale_type(layout: NMLayout) -> tl.dtype:
    return tl.bfloat16 if layout.scale_dtype == "BF16" else tl.float32


def _entry_arguments(layout: NMLayout, columns: int) -> dict[str, Any]:
    kept = layout.kept(columns)
    return {
        "kept": kept,
        "code_words": layout.codes_words(columns),
        "index_words": layout.index_words(columns),
        "scale_group": layout.scale_group or kept,
        "scales": layout.scales_per_row(columns),
    }


def gather_arguments(layout: NMLayout, entries: int, columns: int, blocks: Blocks) -> dict[str, Any]:
    """Return the gather kernel's arguments that follow from the layout and the shape of a program."""
    kept = layout.kept(columns)
    code_planes = planes(layout.bits)
    words = [-(-kept * width // 32) for width in code_planes]
    places = [-(-kept * width // 32) for width in planes(layout.position_bits)] + [0, 0]
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
        "KEEP": layout.n,
        "LOG_GROUP": layout.position_bits,
        "SHARE": layout.share,
        "TOP": layout.top,
        "SCALE": _scale_type(layout),
        "LANE_BITS": lane_bits(layout),
        "PLANE0": code_planes[0],
        "CLASSES0": classes[0],
        "PLANE1": code_planes[1] if len(words) > 1 else 0,
        "CLASSES1": classes[1] if len(words) > 1 else 0,
        "ENTRIES": entries,
        "STEPS": blocks.steps,
        "MASK_ROWS": blocks.mask_rows,
        "EVEN": kept % (entries * blocks.steps) == 0 and columns % layout.m == 0,
    }


def _launch_gather(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[NMLayout], tiles: TokenTiles
) -> None:
    layout = table.layout
    entries = step_entries(layout)
    tile_count = tiles.table.shape[0]
    arguments = token_arguments(x, table, tiles)
    if entries:
        programs = sum(-(-output.shape[1] // (32 * layout.share)) for output in outputs) * tile_count
        blocks = gather_blocks(layout, entries, table.columns, tiles.size, programs)
        per_part, count = output_arguments(outputs, blocks.mask_rows * layout.share)
        arguments |= per_part | gather_arguments(layout, entries, table.columns, blocks)
        gather.gather_kernel[(count, tile_count)](**arguments, num_warps=blocks.warps)
        return
    per_part, count = output_arguments(outputs, 32)
    arguments |= per_part | _entry_arguments(layout, table.columns) | _layout_constants(layout)
    arguments |= {"SCALE": _scale_type(layout), "SCALED": layout.scale_group > 0, "ENTRIES": 32, "ROWS": 32}
    gather.entry_kernel[(count, tile_count)](**arguments, num_warps=4)


def _launch_dot(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[NMLayout], tiles: TokenTiles
) -> None:
    layout = table.layout
    padded = triton.next_power_of_2(layout.m)
    rows = 64
    per_part, count = output_arguments(outputs, rows)
    arguments = token_arguments(x, table, tiles) | per_part
    arguments |= _entry_arguments(layout, table.columns) | _layout_constants(layout)
    arguments |= {
        "groups": layout.groups(table.columns),
        "PADDED": padded,
        "SCALE": _scale_type(layout),
        "SCALED": layout.scale_group > 0,
        "ROWS": rows,
        "GROUPS": max(1, 64 // padded),
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }
    dense.dot_kernel[(count, tiles.table.shape[0])](**arguments, num_warps=4, num_stages=2)


def launch_expand(operand: NMOperand, base: torch.Tensor | None, out: torch.Tensor, start: int, stop: int) -> None:
    """Launch the decoding of rows ``start`` to ``stop`` into ``out``, added to ``base`` if that is given."""
    layout = operand.layout
    padded = triton.next_power_of_2(layout.m)
    rows, groups = 32, max(1, 128 // padded)
    constants = _layout_constants(layout)
    grid = (-(-(stop - start) // rows), -(-layout.groups(operand.columns) // groups))
    dense.expand_kernel[grid](
        codes_ptr=operand.codes,
        index_ptr=operand.codes if operand.index is None else operand.index,
        scales_ptr=operand.scales,
        seed=operand.seed - (1 << 32 if operand.seed >= 1 << 31 else 0),
        base_ptr=out if base is None else base,
        base_stride=0 if base is None else base.stride(0),
        out_ptr=out,
        out_stride=out.stride(0),
        first_row=start,
        rows=stop,
        columns=operand.columns,
        **_entry_arguments(layout, operand.columns),
        **constants,
        PADDED=padded,
        BASE=base is not None,
        ROWS=rows,
        GROUPS=groups,
        num_warps=4,
    )


def launch_embedding(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Launch the addition of embedding rows for every layout that the table holds."""
    entries = 256
    for layout_table in table.layout_tables(slice(0, 1), NMLayout):
        layout = layout_table.layout
        arguments = _entry_arguments(layout, table.columns)
        grid = (output.shape[0], -(-arguments["kept"] // entries))
        dense.embedding_kernel[grid](
            ids_ptr=ids,
            slots_ptr=segments.slots,
            slot_count=segments.count,
            table_ptr=layout_table.entries,
            y_ptr=output,
            y_stride=output.stride(0),
            columns=table.columns,
            SCALE=_scale_type(layout),
            ENTRIES=entries,
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
        table: of a layout that :func:`step_entries` can unroll.
        slot: of the delta.
    """
    layout, columns = table.layout, table.columns
    entries = step_entries(layout)
    row_steps = triton.next_power_of_2(-(-layout.groups(columns) * layout.n // entries))
    mask_rows = 16 if layout.share <= 2 else 32 // layout.share
    blocks = Blocks(mask_rows, min(16, row_steps), 4, 4)
    counts = [-(-output.shape[1] // (mask_rows * layout.share)) for output in outputs]
    weight, output = [*weights, weights[0], weights[0]], [*outputs, outputs[0], outputs[0]]
    arguments = gather_arguments(layout, entries, columns, blocks)
    fused.fused_kernel[(sum(counts),)](
        x_ptr=x,
        **{f"weight{i}_ptr": weight[i] for i in range(MAX_PARTS)},
        **{f"y{i}_ptr": output[i] for i in range(MAX_PARTS)},
        **{f"rows{i}": output[i].shape[1] for i in range(MAX_PARTS)},
        block1=counts[0],
        block2=sum(counts[:2]),
        table_ptr=table.entries,
        slot=slot,
        columns=columns,
        PARTS=len(outputs),
        BLOCK=512,
        STAGES=3,
        **arguments,
        num_warps=blocks.warps,
    )
