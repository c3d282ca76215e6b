"""The parts of deltas that change one parameter of a stack of experts [E, rows, columns], by slot and expert.

A file has a matrix for each expert, or for each half of one (gate and up), or the stack whole. Packed terms of an
expert lie in one operand table, whose slots are pairs of a delta and an expert. Terms of a whole stack are cut where
its experts begin at whole tiles; otherwise, and where the stack's dimensions are exchanged, an expert's rows are
decoded when a token has chosen it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from deltafmt.kernels.operand import Operand, buffer_forms
from deltafmt.kernels.products import matmul_, operand_delta
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.part_keys import split_key
from deltafmt.terms.tiles import TILE_ROWS

_Terms = dict[int, dict[tuple[int, int], tuple[Operand, ...]]]  # by expert, and by where their rows start and end


@dataclass(slots=True)
class _Held:
    """What is multiplied with apart from the table.

    Attributes:
        stacks: terms of the whole stack that could not be cut.
        pieces: by expert, where rows start, and packed terms of them or a matrix that takes the place of the base's.
    """

    stacks: tuple[Operand, ...] = ()
    pieces: dict[int, list[tuple[int, Operand | torch.Tensor]]] = field(default_factory=dict)

    def keep(self, expert: int, start: int, piece: Operand | torch.Tensor) -> None:
        """Keep a piece of an expert."""
        self.pieces.setdefault(expert, []).append((start, piece))


class ExpertMatrices:
    """The matrices of one parameter.

    Args:
        name: the parameter's, for messages.
        base: the parameter, shape (E, rows, columns), or (E, columns, rows) if ``transposed``.
        transposed: True if tokens multiply with the matrices from the left.
    """

    def __init__(self, name: str, base: torch.Tensor, *, transposed: bool) -> None:
        self.name = name
        self.transposed = transposed
        self._experts, self._rows, self._columns = base.shape
        self._base = base
        self._slots = 0
        self._table: OperandTable | None = None
        self._parts: tuple[int, ...] = ()
        self._tabled: set[int] = set()
        self._held: dict[int, _Held] = {}

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        self._slots = max(slots, self._slots)
        old = self._table
        if old is not None and old.slots < self._slots * self._experts:
            self._table = self._new_table(self._parts)
            for slot in self._tabled:
                for pair in self._pairs(slot):
                    self._table.put(pair, old.operands(pair))

    def _new_table(self, parts: tuple[int, ...]) -> OperandTable:
        return OperandTable(self._slots * self._experts, parts, self._columns, self._base.device)

    def _pairs(self, slot: int) -> range:
        return range(slot * self._experts, (slot + 1) * self._experts)

    def put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        """Fill a slot, given by the keys of the parameter or of its parts."""
        self.clear(slot)
        held = _Held()
        terms: _Terms = {}
        for key, tensor in tensors.items():
            elements = split_key(key)[1]
            if elements is None:
                self._put_stack(tensor, held, terms)
                continue
            expert, first = divmod(elements.start, self._rows * self._columns)
            start = first // self._columns
            if tensor.data is not None:
                held.keep(expert, start, tensor.data.view(-1, self._columns))
            else:
                terms.setdefault(expert, {})[start, start + tensor.entry.rows] = tensor.terms
        if terms and (self.transposed or not self._put_terms(slot, terms)):
            for expert, found in terms.items():
                for (start, _), operands in found.items():
                    for operand in operands:
                        held.keep(expert, start, operand)
        if held.stacks or held.pieces:
            self._held[slot] = held

    def _put_stack(self, tensor: DeviceTensor, held: _Held, terms: _Terms) -> None:
        """Take a tensor that has the parameter's shape."""
        if tensor.data is not None:
            for expert, matrix in enumerate(tensor.data):
                held.keep(expert, 0, matrix)
            return
        left = []
        for operand in tensor.terms:
            cut = None if self.transposed else cut_rows(operand, self._rows)
            if cut is None:
                left.append(operand)
                continue
            for expert, one in enumerate(cut):
                before = terms.setdefault(expert, {}).get((0, self._rows), ())
                terms[expert][0, self._rows] = (*before, one)
        held.stacks = tuple(left)

    def _put_terms(self, slot: int, terms: _Terms) -> bool:
        """Put packed terms of experts into the table; return False if they divide the rows otherwise than the table."""
        edges = sorted({0, self._rows, *(edge for parts in terms.values() for part in parts for edge in part)})
        parts = tuple(stop - start for start, stop in itertools.pairwise(edges))
        if self._table is None or not self._tabled:
            self._table, self._parts = self._new_table(parts), parts
        if parts != self._parts:
            return False
        for expert, found in terms.items():
            rows = [found.get(part, ()) for part in itertools.pairwise(edges)]
            self._table.put(slot * self._experts + expert, rows)
        self._tabled.add(slot)
        return True

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._held.pop(slot, None)
        if slot in self._tabled and self._table is not None:
            for pair in self._pairs(slot):
                self._table.clear(pair)
            self._tabled.discard(slot)

    def add(
        self, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor, used: AbstractSet[int]
    ) -> None:
        """Add the deltas to the products of pairs of a token and an expert, in place.

        Args:
            y: the base's products, shape (pairs, rows of the product); sums are taken in float32.
            x: shape (pairs, columns of the product).
            experts: int64, shape (pairs,).
            slots: int64, shape (pairs,): a slot, or a negative number for none.
            used: the slots that may occur.
        """
        for slot in used & self._held.keys():
            held = self._held[slot]
            self._add_held(held, y, x, experts, slots == slot)
        if self._table is not None and used & self._tabled and len(x):
            valid = (slots >= 0) & (experts < self._experts)
            pairs = torch.where(valid, slots * self._experts + experts, -1).int()
            edges = itertools.pairwise(itertools.accumulate(self._parts, initial=0))
            outputs = [y[:, start:stop] for start, stop in edges]
            matmul_(outputs, x.to(y.dtype), self._table, Segments(pairs, self._table.slots))

    def _add_held(
        self, held: _Held, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, mine: torch.Tensor
    ) -> None:
        """Add what is not in the table: each chosen expert for itself."""
        for expert in torch.unique(experts[mine]).tolist():
            if expert >= self._experts:
                continue
            tokens = (mine & (experts == expert)).nonzero()[:, 0]
            given = x[tokens]
            total = y[tokens].float()
            for start, piece in held.pieces.get(expert, ()):
                if isinstance(piece, Operand):
                    change = operand_delta(piece)
                else:
                    change = piece.float() - self._base[expert, start : start + len(piece)].float()
                self._multiply(total, given, change, start)
            for operand in held.stacks:
                change = operand_delta(operand, expert * self._rows, (expert + 1) * self._rows)
                self._multiply(total, given, change, 0)
            y[tokens] = total.to(y.dtype)

    def _multiply(self, total: torch.Tensor, x: torch.Tensor, change: torch.Tensor, start: int) -> None:
        """Add the products with some rows of an expert's delta, in float32."""
        mine = slice(start, start + len(change))
        if self.transposed:
            total += x[:, mine].float() @ change
        else:
            total[:, mine] += x.float() @ change.T


def cut_rows(operand: Operand, rows: int) -> list[Operand] | None:
    """Cut an operand into operands of ``rows`` rows each, which share its memory; None if the layout does not allow it.

    Packed words and scales lie in tiles of rows, one behind the other: runs of whole tiles are operands of their own.
    A seeded index is drawn for the row numbers of the whole tensor, and factors of a low rank have no tiles.
    """
    count, rest = divmod(operand.rows, rows)
    # Tiles that share an index are complete, so that the tensor's last ones may lie behind its rows.
    tiles_together = getattr(operand.layout, "share", 1)
    tiled = operand.layout.kind in ("nm", "lowbit") and not operand.layout.seeded
    if not tiled or rest or rows % (TILE_ROWS * tiles_together):
        return None
    forms = buffer_forms(operand.layout, rows, operand.columns)

    def part(name: str, number: int) -> torch.Tensor:
        buffer, size = operand.buffers[name], forms[name].shape[0]
        # Scales of columns are those of all rows.
        return buffer if len(forms[name].shape) == 1 else buffer[number * size : (number + 1) * size]

    return [
        Operand(operand.layout, rows, operand.columns, {name: part(name, number) for name in operand.buffers})
        for number in range(count)
    ]
