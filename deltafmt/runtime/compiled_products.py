"""The products of the deltas within compiled code.

Compiled code cannot be told which deltas a call serves. It reads that from memory of fixed addresses
(:mod:`deltafmt.runtime.compiled_state`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.products import matmul_
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.compiled_state import CompiledState
from deltafmt.runtime.sites import LinearSite


def multiply_now(
    outputs: Sequence[torch.Tensor],
    given: torch.Tensor,
    table: OperandTable,
    compiled_state: CompiledState,
    sites: Sequence[LinearSite],
) -> None:
    """Add the products of the deltas that are served now, within compiled code.

    Args:
        outputs: for each part of the table, shape (..., rows).
        given: shape (..., columns).
        table: the deltas.
        compiled_state: what compiled code reads.
        sites: of the parts.

    Raises:
        UsageError: a slot may have more tokens than its kernel takes, which a captured graph could not tell.
    """
    where = sites[0].name
    tokens = given.numel() // given.shape[-1]
    segments = compiled_state.segments(given, sites[0], where)
    if segments is None:
        return
    if given.is_cuda and tokens > table.token_limit:
        raise UsageError(
            f"{where} has {tokens} tokens, and its deltas are compiled for {table.token_limit}; call it as it is"
        )
    for site in sites:
        site.ran = True
    flat = [output.reshape(tokens, -1) for output in outputs]
    matmul_(flat, given.to(flat[0].dtype).reshape(tokens, -1), table, segments)
    for output, product in zip(outputs, flat, strict=True):
        if product.data_ptr() != output.data_ptr():  # a view was not possible
            output.copy_(product.view(output.shape))
