"""The launches of all products of an operand table: which kernel takes which slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels.beside import may_launch
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.repeated import Repeated, can_repeat, form, recording
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable


def launch_products(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> bool:
    """Launch the products of every layout of a table that has a kernel, on the current device or in the interpreter.

    A kernel leaves out the slots that have more tokens than it takes. The host does not wait for the device.

    Args:
        outputs: for each part of the table, shape (tokens, rows), rows contiguous; products are added in place.
        x: shape (tokens, columns), columns contiguous.
        table: the deltas.
        segments: which token uses which of them.

    Returns:
        False if nothing is launched, because a kernel is still being compiled (:mod:`.beside`).
    """
    if segments.longest == 0:
        return True  # no token has a delta
    key = form(outputs, x, segments) if can_repeat(x.device) else None
    found = None if key is None else table.repeated(key)
    if found is not None:
        found.run(outputs, x, segments)
        return True
    # A graph that is captured could not hold decoded deltas: the host chooses them.
    if not segments.fixed and not may_launch(x.device, lambda: _launch_products(outputs, x, table, segments)):
        return False
    if key is None:
        _launch_products(outputs, x, table, segments)
        return True
    with recording(outputs, x, table.records(), segments) as recorder:
        _launch_products(outputs, x, table, segments)
    if recorder.launches is not None:
        table.keep_repeated(key, Repeated(recorder.launches, recorder.scratch))
    return True


def repeat_products(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> bool:
    """Repeat the launches of an earlier product of the same form, if there was one.

    Args:
        outputs: for each part of the table, contiguous, shape (..., rows).
        x: contiguous, shape (..., columns), on the current device and of the outputs' dtype.
        table: the deltas.
        segments: which token uses which of them.

    Returns:
        True if the whole product is made; False if nothing has been done.
    """
    if segments.longest > table.fewest or not can_repeat(x.device):
        return False
    key = form(outputs, x, segments)
    found = None if key is None else table.repeated(key)
    if found is None:
        return False
    found.run(outputs, x, segments)
    return True


def _launch_products(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    for first in range(0, len(table.parts), MAX_PARTS):
        parts = slice(first, first + MAX_PARTS)
        for held in table.layout_tables(parts):
            kernels = kernels_of(held.layout)
            most = kernels.most_tokens(held.layout)
            if most is None or segments.shortest <= most:
                kernels.launch(outputs[parts], x, held, segments)


def launch_embeddings(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> bool:
    """Launch the addition of embedding rows for every layout of a table that has a kernel for it.

    Args:
        output: shape (tokens, columns), columns contiguous; rows are added in place.
        ids: int32 or int64, shape (tokens,), contiguous; a row that the delta lacks adds nothing.
        table: the deltas, of one part.
        segments: which token uses which of them.

    Returns:
        False if nothing is launched, because a kernel is still being compiled (:mod:`.beside`).
    """
    tables = [held for held in table.layout_tables(slice(0, 1)) if kernels_of(held.layout).embeds]

    def launch() -> None:
        for held in tables:
            kernels_of(held.layout).launch_embedding(output, ids, held, segments)

    if not may_launch(output.device, launch):
        return False
    launch()
    return True
