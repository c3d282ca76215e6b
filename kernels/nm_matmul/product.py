"""The products with packed ``nm`` deltas: Triton kernels on a GPU, otherwise the reference."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch

from deltafmt.kernels.nm_matmul import naive
from deltafmt.kernels.nm_matmul.operand import NMOperand, OperandTable
from deltafmt.kernels.nm_matmul.segments import Segments


def nm_matmul_(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: OperandTable,
    segments: Segments,
    *,
    overlap: bool = False,
) -> None:
    """Add each token's ``x @ delta.T`` onto the base's outputs, in place; nothing waits for the device.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; sums are taken in float32.
        x: shape (tokens, columns), BF16, F16 or F32, columns contiguous.
        table: the deltas.
        segments: which token uses which of them.
        overlap: start while the kernel before is still running (programmatic dependent launch). Only where that
            kernel does not write ``x`` and was itself started after ``x`` was complete: where it made ``outputs``.
    """
    if _on_gpu(x):
        from deltafmt.kernels.nm_matmul.launch import launch_products

        launch_products(outputs, x, table, segments, overlap=overlap)
    else:
        naive.nm_matmul_(outputs, x, table, segments)


def nm_embedding_(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's row ``delta[id]`` onto the base's embedding, in place.

    Args:
        output: shape (tokens, columns), columns contiguous.
        ids: int32 or int64, shape (tokens,); a row that the delta lacks adds nothing.
        table: the deltas, of one part.
        segments: which token uses which of them.
    """
    if _on_gpu(output):
        from deltafmt.kernels.nm_matmul.launch import launch_embedding

        launch_embedding(output, ids.contiguous(), table, segments)
    else:
        naive.nm_embedding_(output, ids, table, segments)


def operand_delta(operand: NMOperand, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of an operand's dense float32 delta, shape (rows, columns)."""
    stop = operand.rows if stop is None else min(stop, operand.rows)
    if _on_gpu(operand.codes):
        from deltafmt.kernels.nm_matmul.launch import launch_expand

        out = torch.empty(stop - start, operand.columns, device=operand.device)
        launch_expand(operand, None, out, start, stop)
        return out
    return naive.operand_delta(operand)[start:stop]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and _has_triton()
