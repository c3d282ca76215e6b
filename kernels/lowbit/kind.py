"""The device side of ``lowbit`` terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.kind import TermKernels
from deltafmt.kernels.lowbit import decode
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import LayoutTable, Record
from deltafmt.kernels.segments import Segments
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.tiles import WORD_BITS

RECORD = Record(codes="codes", zero_points="zero_points", scales="scales")

# With more tokens of a delta, decoding it once is quicker than multiplying with its codes for every few of them.
MOST_TOKENS = 32
# Where codes begin, so that a thread can load the words of four rows at once; a file's buffers lie at multiples of 256.
WORD_ALIGNMENT = 16


class LowbitKernels(TermKernels[LowbitLayout]):
    """One kernel for few tokens; a decoder for the rest."""

    kind = LowbitLayout.kind
    record = RECORD

    def numbers(self, operand: Operand) -> Mapping[str, int]:
        """Return the numbers of an operand, whose codes must be aligned for loads of four words."""
        if operand.addresses()["codes"] % WORD_ALIGNMENT:
            raise UsageError(f"the codes of a lowbit operand begin at no multiple of {WORD_ALIGNMENT} bytes")
        return super().numbers(operand)

    def most_tokens(self, layout: LowbitLayout) -> int:
        """Return the tokens that the kernel takes; 0 where a group of columns that share a scale ends within a word."""
        return MOST_TOKENS if layout.scale_group % WORD_BITS == 0 else 0

    def launch(
        self, outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[LowbitLayout], segments: Segments
    ) -> None:
        """Launch the products of one layout."""
        from deltafmt.kernels.lowbit import launch

        launch.launch_products(outputs, x, table, segments, MOST_TOKENS)

    def decode(self, operand: Operand, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of a delta."""
        return decode.decode(operand, start, stop)

    def decode_rows(self, operand: Operand, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a delta; no other row is unpacked."""
        return decode.decode_rows(operand, rows)
