"""The arguments that launches of all kinds share: tokens, outputs, and how words and values are read.

By their names in kernels:

- ``x_ptr``, ``x_stride``: activations, shape (tokens, columns); the rows' stride in elements. ``columns``: in_features.
- ``order_ptr``, ``tiles_ptr``: the tokens sorted by slot, and the token tiles (:mod:`deltafmt.kernels.segments`).
- ``records_ptr``: int64, shape (slots, PARTS, fields) (:mod:`deltafmt.kernels.table`).
- ``y0_ptr`` to ``y2_ptr`` and their strides: the output of each part; a part that is missing repeats part 0.
- ``block1``, ``block2``: the first block of rows of part 1 and of part 2, among the blocks of all parts.
- ``PARTS``: parts of the launch, 1 to 3. ``TOKENS``: T, the most tokens of a token tile.
- ``PLANE0`` to ``PLANE2``: bits of a field in each plane, 0 for none. ``words0`` to ``words2``: words of a row in each.
- ``TOP``: the largest code of the grid, so that a code u means ``(u - TOP / 2) * scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from deltafmt.kernels.record import MAX_PARTS, LayoutTable
from deltafmt.kernels.segments import TokenTiles
from deltafmt.terms.coding import Coding
from deltafmt.terms.tiles import planes

DTYPES = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32}
MOST_PLANES = 3


def tile_tokens(longest: int) -> int:
    """Return T, the tokens of a token tile, for a batch whose longest segment has this many tokens.

    Measured: up to about eight tokens a delta, token tiles of one token are the quickest.
    """
    return 1 if longest <= 8 else 2 if longest <= 16 else 4


def output_arguments(outputs: Sequence[torch.Tensor], rows: int) -> tuple[dict[str, Any], int]:
    """Return the kernels' arguments for outputs whose programs take ``rows`` rows, and the number of programs."""
    blocks = [-(-output.shape[1] // rows) for output in outputs]
    padded = [*outputs, outputs[0], outputs[0]]
    arguments: dict[str, Any] = {f"y{i}_ptr": padded[i] for i in range(MAX_PARTS)}
    arguments |= {f"y{i}_stride": padded[i].stride(0) for i in range(MAX_PARTS)}
    arguments |= {"block1": blocks[0], "block2": sum(blocks[:2])}
    return arguments, sum(blocks)


def token_arguments(x: torch.Tensor, table: LayoutTable[Any], tiles: TokenTiles) -> dict[str, Any]:
    """Return the kernels' arguments for the tokens and the operands."""
    return {
        "x_ptr": x,
        "x_stride": x.stride(0),
        "order_ptr": tiles.order,
        "tiles_ptr": tiles.table,
        "records_ptr": table.records,
        "columns": table.columns,
        "PARTS": table.records.shape[1],
        "TOKENS": tiles.size,
    }


def plane_arguments(name: str, bits: int) -> dict[str, int]:
    """Return the widths of a word stream's planes by the names that kernels have for them; 0: there is none."""
    widths = planes(bits)
    return {f"{name}{i}": widths[i] if i < len(widths) else 0 for i in range(MOST_PLANES)}


def word_arguments(words: Sequence[int]) -> dict[str, int]:
    """Return the kernels' arguments for the words of a row: those of each plane, and their sum."""
    counts = {f"words{i}": words[i] if i < len(words) else 0 for i in range(MOST_PLANES)}
    return {**counts, "code_words": sum(words)}


def value_arguments(values: Coding | str) -> dict[str, Any]:
    """Return how values are read: as codes on a grid, or as they are in a dtype, for which PLANE0 is 0."""
    if isinstance(values, str):
        return {**plane_arguments("PLANE", 0), "TOP": 0, "DTYPE": DTYPES[values]}
    return {**plane_arguments("PLANE", values.bits), "TOP": values.top, "DTYPE": DTYPES[values.scale_dtype]}
