"""The naive decoders and products of all kinds, which kernels and decoders are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from term_kinds import CASES


def naive_delta(operand: Operand) -> torch.Tensor:
    """Return the dense float32 delta of an operand of any kind, shape (rows, columns)."""
    return CASES[operand.layout.kind].naive(operand)


def naive_matmul_(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's ``x @ delta.T`` onto the outputs, slot by slot, in place."""
    slots = segments.slots.cpu()
    for slot in range(table.slots):
        tokens = (slots == slot).nonzero()[:, 0].to(x.device)
        for output, terms in zip(outputs, table.operands(slot), strict=True):
            for operand in terms if len(tokens) else ():
                product = x[tokens].float() @ naive_delta(operand).T
                output[tokens, : operand.rows] = (output[tokens, : operand.rows].float() + product).to(output.dtype)


def naive_embedding_(output: torch.Tensor, ids: torch.Tensor, table: OperandTable, segments: Segments) -> None:
    """Add each token's row ``delta[id]`` onto the outputs, in place; a row that the delta lacks adds nothing."""
    slots = segments.slots.cpu()
    for slot in range(table.slots):
        tokens = (slots == slot).nonzero()[:, 0].to(output.device)
        for operand in table.operands(slot)[0] if len(tokens) else ():
            held = tokens[(ids[tokens] >= 0) & (ids[tokens] < operand.rows)]
            output[held] = (output[held].float() + naive_delta(operand)[ids[held].long()]).to(output.dtype)
