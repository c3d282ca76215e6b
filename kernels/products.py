"""The products with packed deltas of every kind: of few tokens, and always of ``nm``, by kernels; others by torch.

Through torch means right, and slow: a low-rank term decodes its vectors, the others their dense matrix for every
product. Which tokens such a term has must be known on the host: it waits for the device, and is not for CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from deltafmt.kernels.dense_delta import operand_delta
from deltafmt.kernels.few_tokens import few_token_products_
from deltafmt.kernels.lowrank.naive import vectors
from deltafmt.kernels.nm.product import nm_embedding_, nm_matmul_
from deltafmt.kernels.packed import PackedOperand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.lowrank.layout import LowRankLayout


def matmul_(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's ``x @ delta.T`` onto the base's outputs, in place.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; sums are taken in float32.
        x: shape (tokens, columns), BF16, F16 or F32, columns contiguous.
        table: the deltas.
        segments: which token uses which of them.
    """
    nm_matmul_(outputs, x, table, segments)
    done = few_token_products_(outputs, x, table, segments)
    others = [one for one in table.packed() if type(one[2].layout) not in done]
    for tokens, part, operand in _with_tokens(others, segments):
        y = outputs[part]
        product = packed_product(x[tokens], operand)
        y[tokens, : operand.rows] = (y[tokens, : operand.rows].float() + product).to(y.dtype)


def embedding_(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's row ``delta[id]`` onto the base's embedding, in place.

    Args:
        output: shape (tokens, columns), columns contiguous.
        ids: int32 or int64, shape (tokens,); a row that the delta lacks adds nothing.
        table: the deltas, of one part.
        segments: which token uses which of them.
    """
    nm_embedding_(output, ids, table, segments)
    for tokens, _, operand in _with_tokens(table.packed(), segments):
        held = tokens[(ids[tokens] >= 0) & (ids[tokens] < operand.rows)]
        output[held] = (output[held].float() + packed_rows(operand, ids[held].long())).to(output.dtype)


def packed_product(x: torch.Tensor, operand: PackedOperand) -> torch.Tensor:
    """Return ``x @ delta.T`` in float32, shape (tokens, rows); x has shape (tokens, columns)."""
    layout = operand.layout
    if isinstance(layout, LowRankLayout):
        # Two thin products: the matrix is never made.
        right = vectors(layout, operand.buffers, "v", operand.columns)
        return (x.float() @ right.T) @ vectors(layout, operand.buffers, "u", operand.rows)
    return x.float() @ operand_delta(operand).T


def packed_rows(operand: PackedOperand, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of an operand's delta in float32, shape (len(rows), columns)."""
    layout = operand.layout
    if isinstance(layout, LowRankLayout):
        left = vectors(layout, operand.buffers, "u", operand.rows)
        return left[:, rows].T @ vectors(layout, operand.buffers, "v", operand.columns)
    return operand_delta(operand)[rows]


def _with_tokens(
    operands: Iterable[tuple[int, int, PackedOperand]], segments: Segments
) -> Iterator[tuple[torch.Tensor, int, PackedOperand]]:
    """Yield the tokens, the part and the operand of every term that a token uses; asks the device for each slot."""
    known: dict[int, torch.Tensor] = {}
    for slot, part, operand in operands:
        if slot not in known:
            known[slot] = (segments.slots == slot).nonzero()[:, 0]
        if len(known[slot]):
            yield known[slot], part, operand
