"""The products with packed ``nm`` deltas: Triton kernels on a GPU, otherwise the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt import accel
from deltafmt.errors import UsageError
from deltafmt.kernels.nm import naive
from deltafmt.kernels.nm.operand import NMOperand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.nm.layout import NMLayout


def nm_matmul_(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: OperandTable,
    segments: Segments,
) -> None:
    """Add each token's ``x @ delta.T`` onto the base's outputs, in place; nothing waits for the device.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; sums are taken in float32.
        x: shape (tokens, columns), BF16, F16 or F32, columns contiguous.
        table: the deltas.
        segments: which token uses which of them.
    """
    if any(output.stride(1) != 1 for output in outputs):
        raise UsageError("the rows of an output are not contiguous")
    if _on_gpu(x):
        from deltafmt.kernels.nm.launch import launch_products

        with torch.cuda.device(x.device):
            launch_products(outputs, x if x.stride(1) == 1 else x.contiguous(), table, segments)
    else:
        naive.nm_matmul_(outputs, x, table, segments)


def can_fuse(table: OperandTable, slot: int, tokens: int) -> bool:
    """Return whether :func:`nm_linear` takes a slot: on a GPU, one term a part, one token or a prompt of them."""
    if table.device.type != "cuda" or not accel.has_triton():
        return False
    from deltafmt.kernels.nm import launch
    from deltafmt.kernels.table import MAX_PARTS

    parts = table.operands(slot)
    layouts = {operand.layout for terms in parts for operand in terms if isinstance(operand, NMOperand)}
    whole = all(
        len(terms) == 1 and isinstance(terms[0], NMOperand) and terms[0].rows == rows
        for terms, rows in zip(parts, table.parts, strict=True)
    )
    if not whole or len(layouts) != 1 or len(parts) > MAX_PARTS:
        return False
    layout = layouts.pop()
    return tokens > launch.gather_tokens(layout) or (tokens == 1 and launch.step_entries(layout) > 0)


def nm_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], table: OperandTable, slot: int
) -> tuple[torch.Tensor, ...]:
    """Return ``x @ (weight + delta).T`` for each part, when all tokens are of one slot that :func:`can_fuse`.

    One token: base and delta in one kernel, in float32. More: the sum is written out a part at a time, rounded as
    ``deltafmt unpack`` rounds it, and multiplied by the base's own library.

    Args:
        x: shape (tokens, columns), contiguous.
        weights: of the base, for each part, shape (rows, columns), contiguous, in the dtype of ``x``.
        table: the deltas.
        slot: the delta.
    """
    from deltafmt.kernels.nm import launch

    with torch.cuda.device(x.device):
        if x.shape[0] == 1:
            outputs = tuple(x.new_empty(1, rows) for rows in table.parts)
            layout = next(term.layout for term in table.operands(slot)[0] if isinstance(term, NMOperand))
            parts = slice(0, len(table.parts))
            layout_table = next(entry for entry in table.layout_tables(parts, NMLayout) if entry.layout == layout)
            launch.launch_fused(outputs, x, weights, layout_table, slot)
            return outputs
        products = []
        for weight, (operand,) in zip(weights, table.operands(slot), strict=True):
            assert isinstance(operand, NMOperand)
            summed = torch.empty_like(weight)
            launch.launch_expand(operand, weight, summed, 0, operand.rows)
            products.append(x @ summed.T)
        return tuple(products)


def nm_embedding_(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's row ``delta[id]`` onto the base's embedding, in place.

    Args:
        output: shape (tokens, columns), columns contiguous.
        ids: int32 or int64, shape (tokens,); a row that the delta lacks adds nothing.
        table: the deltas, of one part.
        segments: which token uses which of them.
    """
    if _on_gpu(output):
        from deltafmt.kernels.nm.launch import launch_embedding

        with torch.cuda.device(output.device):
            launch_embedding(output, ids.contiguous(), table, segments)
    else:
        naive.nm_embedding_(output, ids, table, segments)


def operand_delta(operand: NMOperand, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of an operand's dense float32 delta, shape (rows, columns)."""
    stop = operand.rows if stop is None else min(stop, operand.rows)
    if _on_gpu(operand.codes):
        from deltafmt.kernels.nm.launch import launch_expand

        out = torch.empty(stop - start, operand.columns, device=operand.device)
        with torch.cuda.device(operand.device):
            launch_expand(operand, None, out, start, stop)
        return out
    return naive.operand_delta(operand)[start:stop]


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and accel.has_triton()
