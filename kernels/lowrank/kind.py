"""The device side of ``lowrank`` terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from deltafmt.kernels.kind import TermKernels
from deltafmt.kernels.lowrank import decode
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import LayoutTable, Record
from deltafmt.kernels.segments import Segments
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.layout import MAX_VECTORS, LowRankLayout
from deltafmt.terms.tiles import WORD_BITS

RECORD = Record(
    u="u_codes|u",
    u_zero_points="u_zero_points",
    u_scales="u_scales",
    v="v_codes|v",
    v_zero_points="v_zero_points",
    v_scales="v_scales",
    rank="rank",
)

# With more tokens of a delta, decoding its vectors once is quicker than reading their codes for every few of them.
MOST_TOKENS = 32
# Ranks are rounded up to a power of two, at least this, so that bands of about as many vectors share a launch.
LEAST_RANK = 16


class LowRankKernels(TermKernels[LowRankLayout]):
    """Two kernels for few tokens; two thin products of decoded vectors for the rest."""

    kind = LowRankLayout.kind
    record = RECORD

    def table_layout(self, layout: LowRankLayout) -> LowRankLayout:
        """Return the layout of the largest rank that shares a launch with this one."""
        return replace(layout, rank=min(max(1 << (layout.rank - 1).bit_length(), LEAST_RANK), MAX_VECTORS))

    def numbers(self, operand: Operand) -> Mapping[str, int]:
        """Return the numbers of an operand, its true rank among them."""
        return {**super().numbers(operand), "rank": cast("LowRankLayout", operand.layout).rank}

    def most_tokens(self, layout: LowRankLayout) -> int:
        """Return the tokens that the kernels take; 0 where a group of codes that share a scale ends within a word."""
        coding = layout.factors
        return MOST_TOKENS if not isinstance(coding, Coding) or coding.scale_group % WORD_BITS == 0 else 0

    def launch(
        self, outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[LowRankLayout], segments: Segments
    ) -> None:
        """Launch the products of one layout."""
        from deltafmt.kernels.lowrank import launch

        launch.launch_products(outputs, x, table, segments, MOST_TOKENS)

    def decode(self, operand: Operand, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of a delta."""
        return decode.decode(operand, start, stop)

    def decode_rows(self, operand: Operand, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a delta; of U, no other element is unpacked."""
        return decode.decode_rows(operand, rows)

    def multiply(self, x: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return ``x @ delta.T`` as two thin products: the matrix is never made."""
        return (x.float() @ decode.vectors(operand, "v").T) @ decode.vectors(operand, "u")
