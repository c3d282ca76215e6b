"""The device side of ``sparse`` terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels.kind import TermKernels
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import LayoutTable, Record
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.sparse import decode
from deltafmt.terms.sparse.layout import SparseLayout

RECORD = Record(values="codes|values", gaps="gaps", scales="scales", starts="starts", slots="slots")

# With more tokens of a delta, decoding it once is quicker than walking through its slots for every few of them.
MOST_TOKENS = 32


class SparseKernels(TermKernels[SparseLayout]):
    """One kernel for few tokens; a decoder for the rest."""

    kind = SparseLayout.kind
    record = RECORD

    def most_tokens(self, layout: SparseLayout) -> int:  # noqa: ARG002 - every layout
        """Return the tokens that the kernel takes."""
        return MOST_TOKENS

    def launch(
        self, outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[SparseLayout], segments: Segments
    ) -> None:
        """Launch the products of one layout."""
        from deltafmt.kernels.sparse import launch

        launch.launch_products(outputs, x, table, segments, MOST_TOKENS)

    def decode(self, operand: Operand, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of a delta."""
        return decode.decode(operand, start, stop)

    def decode_rows(self, operand: Operand, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a delta; the tiles that hold them are decoded."""
        return decode.decode_rows(operand, rows)
