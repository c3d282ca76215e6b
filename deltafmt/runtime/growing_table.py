"""The operand table of one module, which grows when the model's deltas need more slots."""

from __future__ import annotations

import torch

from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.selection import Selection


class GrowingTable:
    """An operand table of one part that can grow."""

    def __init__(self, rows: int, columns: int, device: torch.device, memory: RecordMemory | None) -> None:
        self.operands = OperandTable(1, (rows,), columns, device, memory)
        self.slots: set[int] = set()

    def put(self, slot: int, tensor: DeviceTensor) -> None:
        """Fill a slot with a tensor's terms."""
        self.operands.put(slot, (tensor.terms,))
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if slot in self.slots:
            self.slots.discard(slot)
            self.operands.clear(slot)

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        old = self.operands
        if slots > old.slots:
            self.operands = old.grown(slots)

    def serves(self, selection: Selection) -> bool:
        """Tell whether one of the selection's slots has terms here."""
        return not self.slots.isdisjoint(selection.used)
