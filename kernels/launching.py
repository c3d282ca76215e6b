"""The launches of one product with an operand table: which kernel takes which slots.

For each layout in the table there is one launch (or two: the kinds decide), for all slots with few enough tokens. In
this order, a product is made

1. by repeating the launches of an earlier product of the same form (:mod:`.recorded_launches`);
2. not at all, if a kernel is still being compiled: the caller then decodes the deltas (:mod:`.background_compile`);
3. by Triton; the launches are recorded for the next product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence

import torch

from deltafmt.kernels.background_compile import may_launch
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.recorded_launches import BoundLaunches, RecordedLaunches, can_repeat, form, recording
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.segments import Segments, is_captured
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
        False if nothing is launched, because a kernel is still being compiled (:mod:`.background_compile`).
    """
    if segments.longest == 0:
        return True  # no token has a delta
    key = form(outputs, x, segments) if can_repeat(x.device) else None
    found = None if key is None else table.launches_for(key)
    if found is not None:
        found.run(outputs, x, segments)
        return True
    # A graph that is captured could not hold decoded deltas: the host chooses them.
    if not segments.fixed and not may_launch(x.device, lambda: _launch_products(outputs, x, table, segments)):
        return False
    if key is None:
        _launch_products(outputs, x, table, segments)
        return True
    with _kept(table, key, outputs, x, table.records(), segments):
        _launch_products(outputs, x, table, segments)
    return True


def run_recorded(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> bool:
    """Repeat the launches of an earlier product of the same form, if there was one.

    Args:
        outputs: for each part of the table, contiguous, shape (..., rows).
        x: contiguous, shape (..., columns), on the current device and of the outputs' dtype.
        table: the deltas.
        segments: which token uses which of them.

    Returns:
        True if the whole product is made; False if nothing has been done.
    """
    found = _find_recorded(outputs, x, table, segments)
    if found is not None:
        found.run(outputs, x, segments)
    return found is not None


def bind_recorded(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments
) -> BoundLaunches | None:
    """Return the launches of a product as :func:`run_recorded` makes it, for more products of the same tokens.

    They hold for as long as the table's operands stay what they are.
    """
    # What is made while a graph is captured holds nothing before the graph is replayed.
    if segments.fixed or is_captured(x):
        return None
    found = _find_recorded(outputs, x, table, segments)
    return None if found is None else BoundLaunches(found, outputs, x, segments, table)


def launch_fused(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor], table: OperandTable, slot: int
) -> bool:
    """Launch base and one delta in one kernel, or repeat that, for one token.

    Args:
        outputs: for each part of the table, shape (1, rows); written.
        x: shape (1, columns), contiguous, on the current device.
        weights: of the base, for each part, contiguous.
        table: the deltas.
        slot: one that :func:`deltafmt.kernels.products.can_fuse` accepts.

    Returns:
        False if nothing is launched, because the kernel is still being compiled (:mod:`.background_compile`).
    """
    key = _fused_form(outputs, x, weights, table, slot)
    found = None if key is None else table.launches_for(key)
    if found is not None:
        found.run([*outputs, *weights], x, None, [slot])
        return True
    layout, _ = table.forms(slot)[0][0]
    kernels = kernels_of(layout)
    layout = kernels.table_layout(layout)
    layout_table = next(one for one in table.layout_tables(slice(0, len(table.parts))) if one.layout == layout)

    def launch() -> None:
        kernels.launch_fused(outputs, x, weights, layout_table, slot)

    if not may_launch(x.device, launch):
        return False
    if key is None:
        launch()
        return True
    with _kept(table, key, [*outputs, *weights], x, [layout_table.records], None, ["slot"]):
        launch()
    return True


def bind_recorded_fused(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor], table: OperandTable, slot: int
) -> BoundLaunches | None:
    """Return the launches of a product as :func:`launch_fused` makes it, for more products with the same delta.

    Their outputs are followed by the weights. They hold for as long as the table's operands stay what they are.
    """
    key = None if is_captured(x) else _fused_form(outputs, x, weights, table, slot)
    found = None if key is None else table.launches_for(key)
    return None if found is None else BoundLaunches(found, [*outputs, *weights], x, None, table, [slot])


def _fused_form(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor], table: OperandTable, slot: int
) -> tuple[Hashable, ...] | None:
    """Return all that a fused product's launch depends on: the slot's layout has the kernel, any slot is taken."""
    found = form([*outputs, *weights], x, None) if can_repeat(x.device) else None
    return None if found is None else ("fused", table.forms(slot)[0][0][0], *found)


@contextlib.contextmanager
def _kept(
    table: OperandTable,
    key: tuple[Hashable, ...],
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    records: Sequence[torch.Tensor],
    segments: Segments | None,
    numbers: Sequence[str] = (),
) -> Iterator[None]:
    """Keep the launches of a block in the table, to be repeated, if they can be."""
    layouts = table.layouts
    with recording(outputs, x, records, segments, numbers) as recorder:
        yield
    if recorder.launches is not None:
        made = RecordedLaunches(recorder.launches, recorder.scratch, len(outputs), len(numbers))
        table.keep_launches(key, made, layouts)


def _find_recorded(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments
) -> RecordedLaunches | None:
    if segments.longest > table.token_limit or not can_repeat(x.device):
        return None
    key = form(outputs, x, segments)
    return None if key is None else table.launches_for(key)


def _launch_products(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    for first in range(0, len(table.parts), MAX_PARTS):
        parts = slice(first, first + MAX_PARTS)
        for layout_table in table.layout_tables(parts):
            kernels = kernels_of(layout_table.layout)
            most = kernels.most_tokens(layout_table.layout)
            if most is None or segments.shortest <= most:
                kernels.launch(outputs[parts], x, layout_table, segments)


def launch_embeddings(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> bool:
    """Launch the addition of embedding rows for every layout of a table that has a kernel for it.

    Args:
        output: shape (tokens, columns), columns contiguous; rows are added in place.
        ids: int32 or int64, shape (tokens,), contiguous; a row that the delta lacks adds nothing.
        table: the deltas, of one part.
        segments: which token uses which of them.

    Returns:
        False if nothing is launched, because a kernel is still being compiled (:mod:`.background_compile`).
    """
    tables = [one for one in table.layout_tables(slice(0, 1)) if kernels_of(one.layout).embeds]

    def launch() -> None:
        for layout_table in tables:
            kernels_of(layout_table.layout).launch_embedding(output, ids, layout_table, segments)

    if not may_launch(output.device, launch):
        return False
    launch()
    return True
