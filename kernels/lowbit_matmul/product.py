"""The products with packed ``lowbit`` deltas of few tokens: a Triton kernel on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt import accel
from deltafmt.kernels.nm_matmul.operand import OperandTable
from deltafmt.kernels.nm_matmul.segments import Segments
from deltafmt.layout.lowbit import LowbitLayout

# A group of columns that share a scale takes whole words of every plane.
GROUP_STEP = 32
# With more tokens of a delta, decoding it once is quicker than multiplying with its codes for every few of them.
MOST_TOKENS = 32


def lowbit_matmul_(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> bool:
    """Add each token's ``x @ delta.T`` onto the base's outputs, in place, where the kernel takes all ``lowbit`` terms.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; sums are taken in float32.
        x: shape (tokens, columns), BF16, F16 or F32, columns contiguous.
        table: the deltas.
        segments: which token uses which of them.

    Returns:
        Whether it did; if not, nothing was added.
    """
    layouts = {operand.layout for _, _, operand in table.packed() if isinstance(operand.layout, LowbitLayout)}
    whole_words = all(layout.scale_group % GROUP_STEP == 0 for layout in layouts)
    if not layouts or not whole_words or segments.longest > MOST_TOKENS:
        return False
    if not (x.is_cuda and accel.has_triton()):
        return False
    from deltafmt.kernels.lowbit_matmul.launch import launch_products

    with torch.cuda.device(x.device):
        launch_products(outputs, x if x.stride(1) == 1 else x.contiguous(), table, segments)
    return True
