"""What models call: ``y[t] += x[t] @ delta.T`` for the tokens of many deltas, by kernels or by decoded deltas.

A kernel multiplies with the packed words as they lie. A delta is decoded in three cases: on the CPU; if its layout has
no kernel; and for a slot that has more tokens than its kernel takes. Other slots of the same batch are not affected. To
decode, the host must know which tokens such a slot has: if ``segments`` does not say, it asks the device and waits for
the answer.

- :func:`matmul_` adds products onto the outputs of a linear module, or of several with the same input.
- :func:`fused_linear` computes base and delta as one product, if all tokens are of one slot.
- :func:`embedding_` adds rows of deltas to embeddings.
- :func:`multiply_recorded_` repeats the launches of an earlier product; :func:`bind_product` and :func:`bind_fused`
  return them, for more products of the same tokens or the same delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels import devices, launching
from deltafmt.kernels.background_compile import may_launch
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.recorded_launches import BoundLaunches
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable


def matmul_(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's ``x @ delta.T`` onto the base's outputs, in place.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; sums are taken in float32.
        x: shape (tokens, columns), BF16, F16 or F32.
        table: the deltas.
        segments: which token uses which of them.

    Raises:
        UsageError: the rows of an output are not contiguous.
    """
    for output in outputs:
        if output.stride(1) != 1:
            raise UsageError("the rows of an output are not contiguous")
    by_kernel = devices.usable(x)
    if by_kernel:
        with devices.on_device_of(x):
            given = x if x.stride(1) == 1 else x.contiguous()
            by_kernel = launching.launch_products(outputs, given, table, segments)
    for slot, part, operand in _decoded(table, segments, by_kernel=by_kernel):
        tokens = segments.members(slot)
        y = outputs[part]
        product = kernels_of(operand.layout).multiply(x[tokens], operand)
        y[tokens, : operand.rows] = (y[tokens, : operand.rows].float() + product).to(y.dtype)


def multiply_recorded_(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments
) -> bool:
    """Do what :func:`matmul_` does if launches of an earlier product can be repeated; otherwise return False.

    This is the quick way of a decoding step. Tensors may have more than two dimensions, and must then be contiguous.
    """
    return _repeatable(outputs, x) and launching.run_recorded(outputs, x, table, segments)


def bind_product(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments
) -> BoundLaunches | None:
    """Return the launches of the product that was just made, for other tensors of the same form and the same tokens.

    They hold until the table's operands change; None if launches cannot be repeated.
    """
    return launching.bind_recorded(outputs, x, table, segments) if _repeatable(outputs, x) else None


def bind_fused(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor], table: OperandTable, slot: int
) -> BoundLaunches | None:
    """Return the launches of what :func:`fused_linear` has just made of one token, for other tokens.

    They write to outputs of this form, which the weights follow in the arguments. They hold until the table's operands
    change; None if launches cannot be repeated.

    Args:
        outputs: for each part of the table, shape (..., rows).
        x: one token, shape (..., columns).
        weights: of the base.
        table: the deltas.
        slot: the delta.
    """
    if x.numel() != x.shape[-1] or not _repeatable([*outputs, *weights], x):
        return None
    return launching.bind_recorded_fused(outputs, x, weights, table, slot)


def _repeatable(outputs: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
    if x.dtype != outputs[0].dtype or not x.is_cuda or torch.cuda.current_device() != x.device.index:
        return False
    return x.is_contiguous() and all(output.is_contiguous() for output in outputs)


def embedding_(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's row ``delta[id]`` onto the base's embedding, in place.

    Args:
        output: shape (tokens, columns), columns contiguous.
        ids: int32 or int64, shape (tokens,); a row that the delta lacks adds nothing.
        table: the deltas, of one part.
        segments: which token uses which of them.
    """
    by_kernel = devices.usable(output)
    if by_kernel:
        with devices.on_device_of(output):
            by_kernel = launching.launch_embeddings(output, ids.contiguous(), table, segments)
    for slot in range(table.slots):
        for operand in table.operands(slot)[0]:
            kernels = kernels_of(operand.layout)
            if not (by_kernel and kernels.embeds) and segments.lengths().get(slot):
                tokens = segments.members(slot)
                held = tokens[(ids[tokens] >= 0) & (ids[tokens] < operand.rows)]
                rows = kernels.decode_rows(operand, ids[held].long())
                output[held] = (output[held].float() + rows).to(output.dtype)


def _decoded(table: OperandTable, segments: Segments, *, by_kernel: bool) -> Iterator[tuple[int, int, Operand]]:
    """Yield slot, part and operand of every product that no kernel has made."""
    if not by_kernel:
        for slot in range(table.slots):
            for part, terms in enumerate(table.operands(slot)):
                for operand in terms:
                    if segments.lengths().get(slot):
                        yield slot, part, operand
        return
    for slot, one in table.bounded():
        if segments.longest > one.most and segments.lengths().get(slot, 0) > one.most:
            yield slot, one.part, table.operands(slot)[one.part][one.term]


def operand_delta(operand: Operand, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of an operand's dense float32 delta, shape (rows, columns)."""
    stop = operand.rows if stop is None else min(stop, operand.rows)
    return kernels_of(operand.layout).decode(operand, min(start, stop), stop)


def can_fuse(table: OperandTable, slot: int, tokens: int) -> bool:
    """Return True if :func:`fused_linear` takes a slot.

    It does on a GPU, if there are at most three parts, every part has one term with all rows of the part, all terms
    have the same layout, and the layout's kind fuses this number of tokens.
    """
    if not devices.usable_on(table.device) or len(table.parts) > MAX_PARTS:
        return False
    parts = table.forms(slot)
    if any(len(terms) != 1 or terms[0][1] != rows for terms, rows in zip(parts, table.parts, strict=True)):
        return False
    layouts = {terms[0][0] for terms in parts}
    if len(layouts) != 1:
        return False
    layout = layouts.pop()
    return kernels_of(layout).fuses(layout, tokens)


def fused_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], table: OperandTable, slot: int
) -> tuple[torch.Tensor, ...] | None:
    """Return ``x @ (weight + delta).T`` for each part, when all tokens are of one slot that :func:`can_fuse` accepts.

    For one token, base and delta are one kernel, in float32. For more, the sum is written out a part at a time, rounded
    as ``deltafmt unpack`` rounds it, and multiplied by the base's own library.

    Args:
        x: shape (tokens, columns), contiguous.
        weights: of the base, for each part, shape (rows, columns), contiguous, in the dtype of ``x``.
        table: the deltas.
        slot: the delta.

    Returns:
        The products; None if their kernels are still being compiled.
    """
    with devices.on_device_of(x):
        if x.shape[0] == 1:
            outputs = tuple(x.new_empty(1, rows) for rows in table.parts)
            return outputs if launching.launch_fused(outputs, x, weights, table, slot) else None
        operands = [terms[0] for terms in table.operands(slot)]
        kernels = kernels_of(operands[0].layout)

        def note() -> None:
            for weight, operand in zip(weights, operands, strict=True):
                kernels.add_to(weight, operand, weight)  # nothing is written while variants are collected

        if not may_launch(x.device, note):
            return None
        products = []
        for weight, operand in zip(weights, operands, strict=True):
            summed = torch.empty_like(weight)
            kernels.add_to(weight, operand, summed)
            products.append(x @ summed.T)
        return tuple(products)
