"""The base class of the device side of all kinds of terms: a record, kernels and a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import LayoutT, LayoutTable, Record
from deltafmt.kernels.segments import Segments
from deltafmt.terms.layout import TermLayout

# A product decodes about this many elements of a delta at a time, in runs of a multiple of DECODED_ROWS rows, which are
# whole tiles of every kind.
DECODED_ELEMENTS = 1 << 24
DECODED_ROWS = 256


@dataclass(frozen=True, slots=True)
class Conversion:
    """One buffer that is brought into the form that kernels read, after it has arrived on a device.

    Attributes:
        tensor: the tensor's name.
        buffer: the buffer's name.
        layout: the term's layout in the file.
        rows, columns: the shape of the delta.
        source: where the buffer starts in the source, in bytes.
        target: where its plain form is to start in the target, in bytes.
    """

    tensor: str
    buffer: str
    layout: TermLayout
    rows: int
    columns: int
    source: int
    target: int


class TermKernels(ABC, Generic[LayoutT]):
    """The kernels and the decoder of one kind of term.

    Other modules find a kind in :data:`deltafmt.kernels.registry.KERNELS`. A kind that defines no more than ``decode``
    has no kernels: every product decodes the delta.

    Attributes:
        kind: the kind's name, as its layout has it.
        record: what operand tables hold of an operand.
    """

    kind: ClassVar[str]
    record: ClassVar[Record]

    def table_layout(self, layout: LayoutT) -> LayoutT:
        """Return the layout under which operands of a layout are launched together."""
        return layout

    def numbers(self, operand: Operand) -> Mapping[str, int]:
        """Return the numbers that the record takes of an operand, by their names.

        Raises:
            UsageError: kernels cannot read the operand.
        """
        return {"seed": operand.seed, "slots": operand.slots, "rows": operand.rows}

    def most_tokens(self, layout: LayoutT) -> int | None:
        """Return the most tokens of one delta that a kernel multiplies: 0 without a kernel, None for any number."""
        return 0

    def launch(
        self,
        outputs: Sequence[torch.Tensor],
        x: torch.Tensor,
        table: LayoutTable[LayoutT],
        segments: Segments,
    ) -> None:
        """Launch the products of one layout, for the slots that have at most ``most_tokens`` tokens.

        Args:
            outputs: for each part of the table, shape (tokens, rows); products are added in place.
            x: shape (tokens, columns), columns contiguous.
            table: the operands.
            segments: which token uses which slot.
        """
        raise TypeError(f"{self.kind} terms have no kernel")

    @abstractmethod
    def decode(self, operand: Operand, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of an operand's delta, float32, shape (stop - start, columns)."""

    def decode_rows(self, operand: Operand, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of an operand's delta, float32, shape (len(rows), columns); rows are int64."""
        return self.decode(operand, 0, operand.rows)[rows]

    def multiply(self, x: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return ``x @ delta.T`` in float32, shape (tokens, rows): the delta is decoded, some rows at a time."""
        wide = x.float()
        product = torch.empty(len(x), operand.rows, dtype=torch.float32, device=x.device)
        step = max(DECODED_ELEMENTS // max(operand.columns, 1) // DECODED_ROWS, 1) * DECODED_ROWS
        for start in range(0, operand.rows, step):
            stop = min(start + step, operand.rows)
            torch.matmul(wide, self.decode(operand, start, stop).T, out=product[:, start:stop])
        return product

    @property
    def embeds(self) -> bool:
        """True if a kernel adds rows of a delta to embeddings."""
        return False

    def launch_embedding(
        self, output: torch.Tensor, ids: torch.Tensor, table: LayoutTable[LayoutT], segments: Segments
    ) -> None:
        """Launch the addition of each token's row onto its embedding, for the operands of one layout."""
        raise TypeError(f"{self.kind} terms have no embedding kernel")

    def fuses(self, layout: LayoutT, tokens: int) -> bool:
        """True if base and one delta are quicker as one product, for this number of tokens of one slot."""
        return False

    def launch_fused(
        self,
        outputs: Sequence[torch.Tensor],
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        table: LayoutTable[LayoutT],
        slot: int,
    ) -> None:
        """Launch ``x @ (weight + delta).T`` of one token, for each part of the table.

        Args:
            outputs: for each part, shape (1, rows); written, not added to.
            x: shape (1, columns).
            weights: of the base, for each part, shape (rows, columns), contiguous.
            table: the operands.
            slot: the delta.
        """
        raise TypeError(f"{self.kind} terms have no kernel that takes the base as well")

    def add_to(self, base: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
        """Write ``base + delta`` to ``out``, summed in float32 and rounded once; both have the delta's shape."""
        out.copy_((base.float() + self.decode(operand, 0, operand.rows)).to(out.dtype))

    def convert(self, source: torch.Tensor, target: torch.Tensor, jobs: Sequence[Conversion]) -> dict[int, str]:
        """Bring buffers of layouts that are not plain into their plain form.

        Args:
            source: uint8, 1-d, holds the buffers as the file has them.
            target: uint8, 1-d, on the same device; takes the plain forms.
            jobs: which buffers, and where.

        Returns:
            The problem of each buffer that is not valid, by the number of its job.
        """
        raise TypeError(f"{self.kind} terms are read as they are stored")


AnyKernels = TermKernels[Any]
