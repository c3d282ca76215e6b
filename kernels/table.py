"""The table of packed operands that one product multiplies with, and the records that kernels read of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.kind import AnyKernels
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import MAX_PARTS, LayoutTable
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.repeated import Repeated
from deltafmt.terms.layout import TermLayout

# Forms of calls whose launches a table keeps: a prompt, a decoding step and what lies between.
MOST_REPEATED = 64

_Key = tuple[TermLayout, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class BoundedOperand:
    """An operand whose kernel takes only so many tokens of a slot; the delta is decoded for more.

    Attributes:
        slot, part: its place in the table.
        operand: the operand.
        most: the most tokens that its kernel takes; 0 where it has none.
    """

    slot: int
    part: int
    operand: Operand
    most: int


class OperandTable:
    """Operands by slot and part: what one product multiplies with.

    A *slot* is one delta that tokens can choose; a *part* is one of the matrices that multiply the same activations
    (q, k and v; gate and up). For each part, a slot holds the terms of its delta; a part without terms is the base's.

    Args:
        slots: the number of deltas that the table has room for.
        parts: rows (out_features) of each part.
        columns: in_features, the same for all parts.
        device: where all operands lie.

    Attributes:
        fewest: the most tokens of a slot for which the kernels multiply every operand.
    """

    def __init__(self, slots: int, parts: Sequence[int], columns: int, device: torch.device | str) -> None:
        self.slots = slots
        self.parts = tuple(parts)
        self.columns = columns
        self.device = torch.empty(0, device=device).device  # with its number
        self._held: list[tuple[tuple[Operand, ...], ...]] = [((),) * len(self.parts)] * slots
        self._tables: dict[_Key, torch.Tensor] = {}
        self._bounded: list[BoundedOperand] = []
        self.fewest: float = math.inf
        self._stale = False
        self._changed: set[int] = set()
        self._values: dict[_Key, torch.Tensor] = {}
        self._repeated: dict[Hashable, Repeated] = {}
        self._lock = threading.Lock()

    def put(self, slot: int, parts: Sequence[Sequence[Operand]]) -> None:
        """Set a slot's operands; what was there is forgotten.

        Raises:
            UsageError: an operand's shape or device is not the part's, or there is no such slot.
        """
        if not 0 <= slot < self.slots:
            raise UsageError(f"slot {slot} is not one of the table's {self.slots}")
        if len(parts) != len(self.parts):
            raise UsageError(f"{len(parts)} parts where the table has {len(self.parts)}")
        for rows, terms in zip(self.parts, parts, strict=True):
            for operand in terms:
                # A delta has fewer rows than its part where the fine-tune has more rows than the base.
                if operand.rows > rows or operand.columns != self.columns:
                    found = f"{operand.rows}x{operand.columns}"
                    raise UsageError(f"a delta of {found} does not fit a part of {rows}x{self.columns}")
                if operand.device != self.device:
                    raise UsageError(f"an operand on {operand.device} does not fit a table on {self.device}")
        bounded = [
            BoundedOperand(slot, part, operand, most)
            for part, terms in enumerate(parts)
            for operand in terms
            if (most := kernels_of(operand.layout).most_tokens(operand.layout)) is not None
        ]
        # Under the lock, so that a thread which is building the records now does not take them for complete.
        with self._lock:
            self._held[slot] = tuple(tuple(terms) for terms in parts)
            # Another list: a thread may be going through the old one.
            self._bounded = [one for one in self._bounded if one.slot != slot] + bounded
            self.fewest = min((one.most for one in self._bounded), default=math.inf)
            self._changed.add(slot)
            self._stale = True

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.put(slot, ((),) * len(self.parts))

    def operands(self, slot: int) -> tuple[tuple[Operand, ...], ...]:
        """Return a slot's operands, by part and term."""
        return self._held[slot]

    def bounded(self) -> list[BoundedOperand]:
        """Return the operands whose kernels take only a limited number of tokens, or that have no kernel."""
        return self._bounded

    def layout_tables(self, parts: slice) -> list[LayoutTable[Any]]:
        """Return one table for each layout among the operands of some parts; a second term of a layout gets another.

        A table's memory stays where it is when operands change, so that a captured graph goes on reading it; a layout
        that is new to the table is not part of graphs captured before. The first call after a change copies to the
        device and waits for that; nothing else does.
        """
        first, stop, _ = parts.indices(len(self.parts))
        with self._lock:
            if self._stale:
                self._rebuild()
            return [
                LayoutTable(layout, self.columns, records)
                for (layout, _, at, _), records in self._tables.items()
                if at == first and stop > first
            ]

    def records(self) -> list[torch.Tensor]:
        """Return the records of all layouts and parts, which stay where they are for as long as the table lives."""
        with self._lock:
            if self._stale:
                self._rebuild()
            return list(self._tables.values())

    def repeated(self, key: Hashable) -> Repeated | None:
        """Return the launches that were kept for calls of a form; the records they read are then up to date."""
        with self._lock:
            if self._stale:
                self._rebuild()
            return self._repeated.get(key)

    def keep_repeated(self, key: Hashable, launches: Repeated) -> None:
        """Keep the launches of a product for calls of the same form."""
        with self._lock:
            if len(self._repeated) >= MOST_REPEATED:
                self._repeated.clear()
            self._repeated[key] = launches

    @torch.inference_mode(mode=False)  # tensors that are made in inference mode could not be written to outside of it
    def _rebuild(self) -> None:
        """Bring the records of the slots that have changed to the device; a table of a layout stays where it is."""
        changed = sorted(self._changed)
        for values in self._values.values():
            values[changed] = 0
        for slot in changed:
            for part, terms in enumerate(self._held[slot]):
                seen: dict[TermLayout, int] = {}
                for operand in terms:
                    kernels = kernels_of(operand.layout)
                    layout = kernels.table_layout(operand.layout)
                    number = seen[layout] = seen.get(layout, -1) + 1
                    first = part // MAX_PARTS * MAX_PARTS
                    width = min(len(self.parts) - first, MAX_PARTS)
                    key = (layout, number, first, width)
                    if key not in self._values:
                        self._values[key] = torch.zeros(self.slots, width, len(kernels.record), dtype=torch.int64)
                    self._values[key][slot, part - first] = torch.tensor(_record(kernels, operand))
        for key, values in self._values.items():
            if key not in self._tables:
                self._tables[key] = values.to(self.device, copy=True)
                self._repeated.clear()  # the layout is not among their launches
            else:
                first, stop = changed[0], changed[-1] + 1
                self._tables[key][first:stop].copy_(values[first:stop])
        if self.device.type == "cuda":
            # Other threads launch on other streams, which do not wait for this one's copies.
            torch.cuda.current_stream(self.device).synchronize()
        self._changed.clear()
        self._stale = False


def _record(kernels: AnyKernels, operand: Operand) -> list[int]:
    """Return an operand's record."""
    addresses = {name: tensor.data_ptr() for name, tensor in operand.buffers.items()}
    return kernels.record.values({**addresses, **kernels.numbers(operand)})
