"""The products that Triton kernels make with packed terms of every kind but ``nm``, where a delta has few tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from deltafmt import accel
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.sparse.layout import SparseLayout

# A group of numbers that share a scale takes whole words of every plane.
GROUP_STEP = 32
# With more tokens of a delta, decoding it once is quicker than multiplying with its codes for every few of them.
MOST_TOKENS = 32


def few_token_products_(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments
) -> frozenset[type[TermLayout]]:
    """Add each token's ``x @ delta.T`` onto the base's outputs, in place, for all terms of the kinds that kernels take.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; sums are taken in float32.
        x: shape (tokens, columns), BF16, F16 or F32, columns contiguous.
        table: the deltas.
        segments: which token uses which of them.

    Returns:
        The kinds of layouts that are done; of others nothing was added.
    """
    layouts = {operand.layout for _, _, operand in table.packed()}
    kinds = frozenset(map(type, layouts)) - {type(layout) for layout in layouts if not has_kernel(layout)}
    if not kinds or segments.longest > MOST_TOKENS or not on_device(x):
        return frozenset()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        launch_kinds(kinds, outputs, x if x.stride(1) == 1 else x.contiguous(), table, segments)
    return kinds


def on_device(x: torch.Tensor) -> bool:
    """Tell whether kernels can multiply a tensor."""
    return x.is_cuda and accel.has_triton()


def has_kernel(layout: TermLayout) -> bool:
    """Tell whether a kernel can multiply with the terms of a layout; ``nm`` has its own."""
    if isinstance(layout, LowbitLayout):
        return layout.scale_group % GROUP_STEP == 0
    if isinstance(layout, LowRankLayout):
        return not isinstance(layout.factors, Coding) or layout.factors.scale_group % GROUP_STEP == 0
    return isinstance(layout, SparseLayout)


def launch_kinds(
    kinds: frozenset[type[TermLayout]],
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: OperandTable,
    segments: Segments,
) -> None:
    """Launch the kernels of some kinds, on the current device or in Triton's interpreter."""
    from deltafmt.kernels.lowbit import launch as lowbit
    from deltafmt.kernels.lowrank import launch as lowrank
    from deltafmt.kernels.sparse import launch as sparse

    for kind, launch in ((LowbitLayout, lowbit), (LowRankLayout, lowrank), (SparseLayout, sparse)):
        if kind in kinds:
            launch.launch_products(outputs, x, table, segments)
