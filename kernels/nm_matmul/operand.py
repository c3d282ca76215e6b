"""Packed operands on a device, and the table of them that one launch multiplies with."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.packed import PackedOperand
from deltafmt.layout.lowbit import LowbitLayout
from deltafmt.layout.nm import NMLayout
from deltafmt.layout.tiles import TILE_ROWS

# Of codes, so that a thread can load the words of four rows at once; a file's buffers lie at multiples of 256.
WORD_ALIGNMENT = 16
# Parts of one launch: q, k and v.
MAX_PARTS = 3


@dataclass(frozen=True, slots=True, eq=False)
class NMOperand:
    """One ``nm`` term as it lies on a device (spec, section 11).

    Attributes:
        layout: of the term; ``seeded`` or ``fixed``.
        seed: the tensor seed; 0 for ``fixed``.
        rows, columns: of the delta.
        codes: int32, shape (tiles, words, 32), the bits of the packed words.
        index: likewise for a ``fixed`` index, otherwise None.
        scales: BF16 or F32, shape (tiles, scales per row, 32).

    Raises:
        UsageError: a rank index, or buffers whose shape, dtype or device do not fit.
    """

    layout: NMLayout
    seed: int
    rows: int
    columns: int
    codes: torch.Tensor
    index: torch.Tensor | None
    scales: torch.Tensor

    def __post_init__(self) -> None:
        layout = self.layout
        if layout.index == "rank":
            raise UsageError("a rank index is made fixed before it is multiplied with")
        if (self.index is None) != (layout.index == "seeded"):
            raise UsageError(f"a {layout.index} index comes with{'out' if layout.index == 'seeded' else ''} a buffer")
        scale_dtype = torch.bfloat16 if layout.scale_dtype == "BF16" else torch.float32
        row_tiles = layout.row_tiles(self.rows)
        check_buffer("codes", self.codes, (row_tiles, layout.codes_words(self.columns)), torch.int32)
        check_buffer("scales", self.scales, (row_tiles, layout.scales_per_row(self.columns)), scale_dtype)
        if self.index is not None:
            shape = (layout.index_tiles(self.rows), layout.index_words(self.columns))
            check_buffer("index", self.index, shape, torch.int32)
        if {tensor.device for tensor in self.tensors()} != {self.codes.device}:
            raise UsageError("the buffers of an operand lie on one device")

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the packed buffers."""
        yield self.codes
        if self.index is not None:
            yield self.index
        yield self.scales

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(tensor.nbytes for tensor in self.tensors())


Operand = NMOperand | PackedOperand
Tabled = NMLayout | LowbitLayout
LayoutT = TypeVar("LayoutT", NMLayout, LowbitLayout)


def check_buffer(name: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refuse a packed buffer that a kernel could leave."""
    wanted = (*shape, TILE_ROWS)
    if tuple(tensor.shape) != wanted or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UsageError(f"{name}: expected contiguous {dtype} {wanted}, found {found}")


@dataclass(frozen=True, slots=True, eq=False)
class LayoutTable(Generic[LayoutT]):
    """What a kernel reads of the operands of one layout.

    Attributes:
        layout: of all these operands.
        columns: in_features.
        entries: int64, shape (slots, parts, 5): addresses of codes, index or zero points, and scales, the seed, and the
            rows (0: none).
    """

    layout: LayoutT
    columns: int
    entries: torch.Tensor


class OperandTable:
    """Operands by slot and part: what one product multiplies with.

    A *slot* is one delta that tokens can choose; a *part* is one of the matrices that multiply the same activations
    (q, k and v; gate and up). A slot holds for each part the terms of its delta; no terms: that part is the base's.
    Kernels read ``nm`` and ``lowbit`` terms by :meth:`layout_tables`; :meth:`packed` gives all that are not ``nm``.

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
        self._tables: dict[tuple[Tabled, int, int, int], torch.Tensor] = {}
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
        rows: dict[tuple[Tabled, int, int, int], torch.Tensor] = {
            key: torch.zeros(entries.shape, dtype=torch.int64) for key, entries in self._tables.items()
        }
        for slot, held in enumerate(self._held):
            for part, terms in enumerate(held):
                seen: dict[Tabled, int] = {}
                for operand in terms:
                    layout = operand.layout
                    if not isinstance(layout, Tabled):
                        continue
                    number = seen[layout] = seen.get(layout, -1) + 1
                    first = part // MAX_PARTS * MAX_PARTS
                    width = min(len(self.parts) - first, MAX_PARTS)
                    key = (layout, number, first, width)
                    if key not in rows:
                        rows[key] = torch.zeros(self.slots, width, 5, dtype=torch.int64)
                    rows[key][slot, part - first] = torch.tensor(_addresses(operand))
        for key, values in rows.items():
            if key in self._tables:
                self._tables[key].copy_(values)
            else:
                self._tables[key] = values.to(self.device)
        if self.device.type == "cuda":
            # Other threads launch on other streams, which do not wait for this one's copies.
            torch.cuda.current_stream(self.device).synchronize()
        self._stale = False


def _addresses(operand: Operand) -> list[int]:
    if isinstance(operand, PackedOperand):
        buffers = operand.buffers
        if buffers["codes"].data_ptr() % WORD_ALIGNMENT:
            raise UsageError(f"the codes of a lowbit operand begin at no multiple of {WORD_ALIGNMENT} bytes")
        zero_points = buffers["zero_points"].data_ptr() if "zero_points" in buffers else 0
        return [buffers["codes"].data_ptr(), zero_points, buffers["scales"].data_ptr(), 0, operand.rows]
    index = 0 if operand.index is None else operand.index.data_ptr()
    return [operand.codes.data_ptr(), index, operand.scales.data_ptr(), operand.seed, operand.rows]
