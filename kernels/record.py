"""The record of one operand in an operand table: int64 fields, which kernels load by their offsets.

A kernel is launched for many operands at once, so it cannot be given their buffers as arguments. It loads the addresses
from records and casts them to pointers. Each kind of term declares its record once. The table writes the fields in that
order, and the kernels take their offsets from the same declaration, as constants of the compilation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch

from deltafmt.terms.layout import TermLayout

# Parts of one launch: q, k and v.
MAX_PARTS: Final = 3
ROWS: Final = "rows"

LayoutT = TypeVar("LayoutT", bound=TermLayout)


class Record:
    """The fields of one operand, in the order in which they are stored.

    ``Record(codes="codes", scales="scales", seed="seed")`` has the fields ``codes``, ``scales``, ``seed`` and, last,
    ``rows``. A field's source is the name of a buffer, whose address is stored, or of a number of the operand.
    ``"codes|values"`` means: the buffer ``codes`` or ``values``, whichever the operand has. A buffer that the operand
    lacks has the address 0.
    """

    def __init__(self, **sources: str) -> None:
        given = {**sources, ROWS: ROWS}
        self._offsets = {name: offset for offset, name in enumerate(given)}
        self._sources = [source.split("|") for source in given.values()]

    def __len__(self) -> int:
        """Fields of a record: how far two records of a table lie apart."""
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    def offset(self, field: str) -> int:
        """Return where a field stands in a record.

        Raises:
            KeyError: there is no such field.
        """
        return self._offsets[field]

    def sources(self, known: Collection[str]) -> list[str | None]:
        """Return which buffer or number each field is taken from; None for a field that the operand lacks.

        Args:
            known: the names of the operand's buffers and numbers.
        """
        return [next((name for name in names if name in known), None) for names in self._sources]

    def values(self, known: Mapping[str, int]) -> list[int]:
        """Return the fields' values, given the addresses of the buffers and the numbers of an operand."""
        return [0 if name is None else known[name] for name in self.sources(known)]


@dataclass(frozen=True, slots=True, eq=False)
class LayoutTable(Generic[LayoutT]):
    """The records of the operands of one layout, as a kernel reads them.

    Attributes:
        layout: of all these operands, as :meth:`deltafmt.kernels.kind.TermKernels.table_layout` gives it.
        columns: in_features.
        records: int64, shape (slots, parts, fields): what the kind's record says of each operand; rows are 0 where
            there is no operand.
    """

    layout: LayoutT
    columns: int
    records: torch.Tensor
