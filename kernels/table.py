"""The table of packed operands that one product multiplies with, and what kernels read of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.nm.operand import NMOperand
from deltafmt.kernels.packed import PackedOperand
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowrank.layout import MAX_VECTORS, LowRankLayout

# Of codes, so that a thread can load the words of four rows at once; a file's buffers lie at multiples of 256.
WORD_ALIGNMENT = 16
# Parts of one launch: q, k and v.
MAX_PARTS = 3
# Ranks are rounded up to a power of two, at least this, so that bands of about as many vectors share a launch.
LEAST_RANK = 16

Operand = NMOperand | PackedOperand
LayoutT = TypeVar("LayoutT", bound=TermLayout)

# What a table says of an operand of each kind: addresses of buffers (``a|b``: of the one it has; 0: of none), numbers.
ENTRIES = {
    "nm": ("codes", "index", "scales", "seed"),
    "lowbit": ("codes", "zero_points", "scales", "seed"),
    "lowrank": ("u_codes|u", "u_zero_points", "u_scales", "v_codes|v", "v_zero_points", "v_scales", "rank"),
    "sparse": ("codes|values", "gaps", "scales", "starts", "slots"),
}

_Key = tuple[TermLayout, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class LayoutTable(Generic[LayoutT]):
    """What a kernel reads of the operands of one layout.

    Attributes:
        layout: of all these operands; of a ``lowrank`` one the rank is the most that one may have.
        columns: in_features.
        entries: int64, shape (slots, parts, numbers): what :data:`ENTRIES` says for the kind, and last the rows (0:
            none).
    """

    layout: LayoutT
    columns: int
    entries: torch.Tensor


class OperandTable:
    """Operands by slot and part: what one product multiplies with.

    A *slot* is one delta that tokens can choose; a *part* is one of the matrices that multiply the same activations
    (q, k and v; gate and up). A slot holds for each part the terms of its delta; no terms: that part is the base's.
    Kernels read terms by :meth:`layout_tables`; :meth:`packed` gives all that are not ``nm``.

    Args:
        slots: deltas that the table has room for.
        parts: rows (out_features) of each part.
        columns: in_features, the same for all parts.
        device: of all operands.
    """

    def __init__(self, slots: int, parts: Sequence[int], columns: int, device: torch.device | str) -> None:
        self.slots = slots
        self.parts = tuple(parts)
        self.columns = columns
        self.device = torch.empty(0, device=device).device  # with its number
        self._held: list[tuple[tuple[Operand, ...], ...]] = [((),) * len(self.parts)] * slots
        self._tables: dict[_Key, torch.Tensor] = {}
        self._packed: list[tuple[int, int, PackedOperand]] = []
        self._stale = False
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
        self._held[slot] = tuple(tuple(terms) for terms in parts)
        others = [
            (slot, part, operand)
            for part, terms in enumerate(parts)
            for operand in terms
            if isinstance(operand, PackedOperand)
        ]
        # Another list: a thread may be going through the old one.
        self._packed = [one for one in self._packed if one[0] != slot] + others
        self._stale = True

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.put(slot, ((),) * len(self.parts))

    def operands(self, slot: int) -> tuple[tuple[Operand, ...], ...]:
        """Return a slot's operands, by part and term."""
        return self._held[slot]

    def packed(self) -> list[tuple[int, int, PackedOperand]]:
        """Return slot, part and operand of every term that is not ``nm``."""
        return self._packed

    def layout_tables(self, parts: slice, kind: type[LayoutT]) -> list[LayoutTable[LayoutT]]:
        """Return one table for each layout of a kind among the operands of some parts; a second term gets another.

        A table's memory stays where it is when operands change, so that a captured graph goes on reading it; a layout
        that is new to the table is not part of graphs captured before. The first call after a change copies to the
        device and waits for that; nothing else does.
        """
        first, stop, _ = parts.indices(len(self.parts))
        with self._lock:
            if self._stale:
                self._rebuild()
            return [
                LayoutTable(layout, self.columns, entries)
                for (layout, _, at, _), entries in self._tables.items()
                if at == first and stop > first and isinstance(layout, kind)
            ]

    def _rebuild(self) -> None:
        rows: dict[_Key, torch.Tensor] = {
            key: torch.zeros(entries.shape, dtype=torch.int64) for key, entries in self._tables.items()
        }
        for slot, held in enumerate(self._held):
            for part, terms in enumerate(held):
                seen: dict[TermLayout, int] = {}
                for operand in terms:
                    layout = _table_layout(operand.layout)
                    number = seen[layout] = seen.get(layout, -1) + 1
                    first = part // MAX_PARTS * MAX_PARTS
                    width = min(len(self.parts) - first, MAX_PARTS)
                    key = (layout, number, first, width)
                    if key not in rows:
                        rows[key] = torch.zeros(self.slots, width, len(ENTRIES[layout.kind]) + 1, dtype=torch.int64)
                    rows[key][slot, part - first] = torch.tensor(_entry(operand))
        for key, values in rows.items():
            if key in self._tables:
                self._tables[key].copy_(values)
            else:
                self._tables[key] = values.to(self.device)
        if self.device.type == "cuda":
            # Other threads launch on other streams, which do not wait for this one's copies.
            torch.cuda.current_stream(self.device).synchronize()
        self._stale = False


def _table_layout(layout: TermLayout) -> TermLayout:
    """Return the layout under which a term's operands are launched together."""
    if not isinstance(layout, LowRankLayout):
        return layout
    return replace(layout, rank=min(max(1 << (layout.rank - 1).bit_length(), LEAST_RANK), MAX_VECTORS))


def _entry(operand: Operand) -> list[int]:
    """Return an operand's numbers in a table."""
    known = {"seed": operand.seed, "rank": getattr(operand.layout, "rank", 0)}
    if isinstance(operand, NMOperand):
        index = {} if operand.index is None else {"index": operand.index}
        buffers = {"codes": operand.codes, **index, "scales": operand.scales}
    else:
        buffers = dict(operand.buffers)
        known["slots"] = operand.slots
    known |= {name: tensor.data_ptr() for name, tensor in buffers.items()}
    kind = operand.layout.kind
    if kind == "lowbit" and known["codes"] % WORD_ALIGNMENT:
        raise UsageError(f"the codes of a lowbit operand begin at no multiple of {WORD_ALIGNMENT} bytes")
    numbers = [next((known[name] for name in names.split("|") if name in known), 0) for names in ENTRIES[kind]]
    return [*numbers, operand.rows]
