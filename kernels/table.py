"""The table of packed operands that one product multiplies with, and the records that kernels read of it.

Operands are found by slot (which delta) and part (which of the matrices with the same input). For the kernels, each
layout among the operands has a tensor of records, int64, shape (slots, parts, fields): the addresses of an operand's
buffers, and its numbers. Slot 2 of a table of q, k and v whose deltas are ``nm`` terms of one layout::

    records[2] = [[codes, index, scales, seed, rows],    of q
                  [codes, index, scales, seed, rows],    of k
                  [0, 0, 0, 0, 0]]                       of v, which the delta does not change: no rows

A second term of the same layout has a tensor of its own, and more than three parts are split into groups of three.
Each such tensor is one launch. The tensors stay in place when deltas come and go, so captured graphs can read them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.device_memory import PlacedBuffers
from deltafmt.kernels.kind import AnyKernels
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import MAX_PARTS, LayoutTable
from deltafmt.kernels.record_memory import RecordMemory, Records
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
        memory: the memory of the records, which tables can share; of its own if not given.

    Attributes:
        fewest: the most tokens that a slot may have so that kernels multiply every operand: the smallest limit of all.
        used: True once somebody has read the records.
        added: the number of layouts that came after that; no graph that was captured before launches for them.
    """

    def __init__(
        self,
        slots: int,
        parts: Sequence[int],
        columns: int,
        device: torch.device | str,
        memory: RecordMemory | None = None,
    ) -> None:
        self.slots = slots
        self.parts = tuple(parts)
        self.columns = columns
        self.device = torch.empty(0, device=device).device  # with its number
        self._held: list[tuple[tuple[Operand, ...], ...]] = [((),) * len(self.parts)] * slots
        self.memory = RecordMemory(self.device) if memory is None else memory
        self._tables: dict[_Key, Records] = {}
        self._bounded: list[BoundedOperand] = []
        self.fewest: float = math.inf
        self.used = False
        self.added = 0
        self._changed: set[int] = set()
        self._written = 0
        self._repeated: dict[Hashable, Repeated] = {}
        self._lock = threading.Lock()

    def grown(self, slots: int) -> OperandTable:
        """Return a table with the same operands and room for more slots."""
        made = OperandTable(slots, self.parts, self.columns, self.device, self.memory)
        with self._lock:
            for slot, parts in enumerate(self._held):
                made._held[slot] = parts
                if any(parts):
                    made._changed.add(slot)
            made._bounded, made.fewest = self._bounded, self.fewest
        return made

    def put(self, slot: int, parts: Sequence[Sequence[Operand]]) -> None:
        """Set a slot's operands; what was there is forgotten.

        Raises:
            UsageError: an operand's shape or device is not the part's, or there is no such slot.
        """
        if not 0 <= slot < self.slots:
            raise UsageError(f"slot {slot} is not one of the table's {self.slots}")
        if len(parts) != len(self.parts):
            raise UsageError(f"{len(parts)} parts where the table has {len(self.parts)}")
        held = tuple(map(tuple, parts))
        bounded = []
        for part, (rows, terms) in enumerate(zip(self.parts, held, strict=True)):
            for operand in terms:
                # A delta has fewer rows than its part where the fine-tune has more rows than the base.
                if operand.rows > rows or operand.columns != self.columns:
                    found = f"{operand.rows}x{operand.columns}"
                    raise UsageError(f"a delta of {found} does not fit a part of {rows}x{self.columns}")
                if operand.device != self.device:
                    raise UsageError(f"an operand on {operand.device} does not fit a table on {self.device}")
                most = kernels_of(operand.layout).most_tokens(operand.layout)
                if most is not None:
                    bounded.append(BoundedOperand(slot, part, operand, most))
        # Under the lock, so that a thread which is building the records now does not take them for complete.
        with self._lock:
            self._held[slot] = held
            if bounded or self._bounded:
                # Another list: a thread may be going through the old one.
                self._bounded = [one for one in self._bounded if one.slot != slot] + bounded
                self.fewest = min((one.most for one in self._bounded), default=math.inf)
            self._changed.add(slot)

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

        A table's memory stays where it is when operands change, so a captured graph goes on reading it. A layout that
        is new to the table is not part of graphs captured before. Only the first call after a change copies to the
        device and waits for that.
        """
        first, stop, _ = parts.indices(len(self.parts))
        with self._lock:
            self._read()
            return [
                LayoutTable(layout, self.columns, records.tensor)
                for (layout, _, at, _), records in self._tables.items()
                if at == first and stop > first
            ]

    def records(self) -> list[torch.Tensor]:
        """Return the records of all layouts and parts, which stay where they are for as long as the table lives."""
        with self._lock:
            self._read()
            return [records.tensor for records in self._tables.values()]

    def repeated(self, key: Hashable) -> Repeated | None:
        """Return the launches that were kept for calls of a form; the records they read are then up to date."""
        with self._lock:
            self._read()
            return self._repeated.get(key)

    def keep_repeated(self, key: Hashable, launches: Repeated) -> None:
        """Keep the launches of a product for calls of the same form."""
        with self._lock:
            if len(self._repeated) >= MOST_REPEATED:
                self._repeated.clear()
            self._repeated[key] = launches

    def prepare(self) -> None:
        """Write the records of new operands; flush the memory to bring those of all tables over with one copy."""
        with self._lock:
            if self._changed:
                self._write()

    def _read(self) -> None:
        """Bring the records up to date, because somebody is going to read them."""
        self.used = True
        if self._changed:
            self._write()
        if self._written > self.memory.flushed:  # another thread may have prepared the table
            self.memory.flush()

    def _write(self) -> None:
        """Write the records of the slots that have changed."""
        with self.memory.lock:
            for records in self._tables.values():
                for slot in self._changed:
                    records.host[slot] = 0
                records.changed()
            for slot in self._changed:
                self._write_slot(slot)
            self._written = self.memory.note_written()
        self._changed.clear()

    def _write_slot(self, slot: int) -> None:
        for part, terms in enumerate(self._held[slot]):
            first = part // MAX_PARTS * MAX_PARTS
            width = min(len(self.parts) - first, MAX_PARTS)
            seen: list[TermLayout] = []
            for operand in terms:
                kernels = kernels_of(operand.layout)
                layout = kernels.table_layout(operand.layout)
                key = (layout, seen.count(layout), first, width)
                seen.append(layout)
                records = self._tables.get(key)
                if records is None:
                    records = self._tables[key] = self.memory.take((self.slots, width, len(kernels.record)))
                    self._repeated.clear()  # the layout is not among their launches
                    self.added += self.used
                records.host[slot, part - first] = record_of(operand)


def record_of(operand: Operand) -> list[int]:
    """Return an operand's record; that of buffers in one allocation is kept with them.

    Raises:
        UsageError: kernels cannot read the operand.
    """
    buffers, kernels = operand.buffers, kernels_of(operand.layout)
    if not isinstance(buffers, PlacedBuffers):
        return _record(kernels, operand)
    if buffers.record is None:
        buffers.record = _record(kernels, operand)
    return buffers.record


def _record(kernels: AnyKernels, operand: Operand) -> list[int]:
    """Return an operand's record."""
    return kernels.record.values({**operand.addresses(), **kernels.numbers(operand)})
