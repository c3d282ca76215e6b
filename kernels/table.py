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
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import MAX_PARTS, LayoutTable
from deltafmt.kernels.record_memory import RecordMemory, Records
from deltafmt.kernels.recorded_launches import RecordedLaunches
from deltafmt.kernels.registry import kernels_of
from deltafmt.terms.layout import TermLayout

# Forms of calls whose launches a table keeps: a prompt, a decoding step and what lies between.
MOST_RECORDINGS = 64

_Key = tuple[TermLayout, int, int, int]
# A slot's operands, by part and term; and the layout and the rows of each.
Parts = tuple[tuple[Operand, ...], ...]
Forms = tuple[tuple[tuple[TermLayout, int], ...], ...]


class Later(Protocol):
    """The operands of a slot that are made when they are asked for (:mod:`deltafmt.runtime.slot_plan`)."""

    def parts(self, key: object) -> Parts:
        """Return the operands in the table of a key."""

    def forms(self, key: object) -> Forms:
        """Return the layouts and the rows of these operands, none of which is made for that."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Of an operand whose kernel takes only so many tokens of a slot; the delta is decoded for more.

    Attributes:
        part, term: its place in the slot.
        most: the most tokens that its kernel takes; 0 where it has none.
    """

    part: int
    term: int
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
        token_limit: the most tokens that a slot may have so that kernels multiply every operand: the smallest limit of
            all.
        held: the operands of each slot. Whoever sets one sees to the records.
        key: stands for the table, and for those that grow out of it.
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
        self.empty: Parts = ((),) * len(self.parts)
        self.held: list[Parts | Later] = [self.empty] * slots
        self.key = object()
        self.memory = RecordMemory(self.device) if memory is None else memory
        self._tables: dict[_Key, Records] = {}
        self._bounds: dict[int, tuple[Bound, ...]] = {}
        self.token_limit: float = math.inf
        self.used = False
        self.added = 0
        self._changed: set[int] = set()
        self._written = 0
        self._launches: dict[Hashable, RecordedLaunches] = {}
        self._lock = threading.Lock()

    def grown(self, slots: int) -> OperandTable:
        """Return a table with the same operands and room for more slots."""
        made = OperandTable(slots, self.parts, self.columns, self.device, self.memory)
        with self._lock:
            made.held[: self.slots] = self.held
            made._changed.update(slot for slot, parts in enumerate(self.held) if parts != self.empty)
            made.key, made._bounds, made.token_limit = self.key, self._bounds, self.token_limit
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
        bounds = []
        for part, (rows, terms) in enumerate(zip(self.parts, held, strict=True)):
            for number, operand in enumerate(terms):
                # A delta has fewer rows than its part where the fine-tune has more rows than the base.
                if operand.rows > rows or operand.columns != self.columns:
                    found = f"{operand.rows}x{operand.columns}"
                    raise UsageError(f"a delta of {found} does not fit a part of {rows}x{self.columns}")
                if operand.device != self.device:
                    raise UsageError(f"an operand on {operand.device} does not fit a table on {self.device}")
                most = kernels_of(operand.layout).most_tokens(operand.layout)
                if most is not None:
                    bounds.append(Bound(part, number, most))
        self.put_later(slot, held)
        self.bound(slot, tuple(bounds))

    def put_later(self, slot: int, held: Parts | Later) -> None:
        """Set a slot's operands, which are known to fit; their records are written when somebody reads them."""
        # Under the lock, so that a thread which is building the records now does not take them for complete.
        with self._lock:
            self.held[slot] = held
            self._changed.add(slot)

    def bound(self, slot: int, bounds: tuple[Bound, ...]) -> None:
        """Set the bounds of a slot's operands."""
        with self._lock:
            if bounds or slot in self._bounds:
                # Another dict: a thread may be going through the old one.
                others = {other: held for other, held in self._bounds.items() if other != slot}
                self._bounds = {**others, slot: bounds} if bounds else others
                self.token_limit = min((one.most for held in self._bounds.values() for one in held), default=math.inf)

    def bounds_of(self, slot: int) -> tuple[Bound, ...]:
        """Return the bounds of a slot's operands."""
        return self._bounds.get(slot, ())

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.put(slot, ((),) * len(self.parts))

    def operands(self, slot: int) -> Parts:
        """Return a slot's operands, by part and term."""
        held = self.held[slot]
        return held if isinstance(held, tuple) else held.parts(self.key)

    def forms(self, slot: int) -> Forms:
        """Return the layout and the rows of each of a slot's operands, by part and term; none is made for that."""
        held = self.held[slot]
        if not isinstance(held, tuple):
            return held.forms(self.key)
        return tuple(tuple((operand.layout, operand.rows) for operand in terms) for terms in held)

    def bounded(self) -> Iterator[tuple[int, Bound]]:
        """Give the slots and the bounds of operands whose kernels take few tokens, or that have no kernel."""
        return ((slot, one) for slot, bounds in self._bounds.items() for one in bounds)

    def places(self, slot: int) -> list[tuple[Records, int, Operand]]:
        """Return the records and the parts in them that a slot's operands have; none if they are not written yet."""
        with self._lock:
            return [] if slot in self._changed else list(self._places(slot))

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

    @property
    def layouts(self) -> int:
        """The number of layouts that have records; it only grows."""
        with self._lock:
            return len(self._tables)

    def records(self) -> list[torch.Tensor]:
        """Return the records of all layouts and parts, which stay where they are for as long as the table lives."""
        with self._lock:
            self._read()
            return [records.tensor for records in self._tables.values()]

    def launches_for(self, key: Hashable) -> RecordedLaunches | None:
        """Return the launches that were kept for calls of a form; the records they read are then up to date."""
        with self._lock:
            self._read()
            return self._launches.get(key)

    def keep_launches(self, key: Hashable, launches: RecordedLaunches, layouts: int) -> None:
        """Keep the launches of a product for calls of the same form.

        Args:
            key: the form.
            launches: those that were recorded.
            layouts: how many layouts the table had when the recording began. If another thread has brought one since,
                there is no launch for it among these, and nothing is kept.
        """
        with self._lock:
            if layouts != len(self._tables):
                return
            if len(self._launches) >= MOST_RECORDINGS:
                self._launches.clear()
            self._launches[key] = launches

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
        for records, part, operand in self._places(slot):
            records.host[slot, part] = record_of(operand)

    def _places(self, slot: int) -> Iterator[tuple[Records, int, Operand]]:
        for part, terms in enumerate(self.operands(slot)):
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
                    self._launches.clear()  # the layout is not among their launches
                    self.added += self.used
                yield records, part - first, operand


def record_of(operand: Operand) -> list[int]:
    """Return an operand's record.

    Raises:
        UsageError: kernels cannot read the operand.
    """
    kernels = kernels_of(operand.layout)
    return kernels.record.values({**operand.addresses(), **kernels.numbers(operand)})
