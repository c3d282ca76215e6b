"""The device side of ``nm`` terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt.kernels import devices
from deltafmt.kernels.background_compile import may_launch
from deltafmt.kernels.kind import Conversion, TermKernels
from deltafmt.kernels.nm import decode
from deltafmt.kernels.nm.rank_index.convert import convert_ranks
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.record import LayoutTable, Record
from deltafmt.kernels.segments import Segments
from deltafmt.terms.nm.layout import NMLayout

RECORD = Record(codes="codes", index="index", scales="scales", seed="seed")


class NMKernels(TermKernels[NMLayout]):
    """Kernels for any number of tokens, for embeddings, and for one token with the base in the same kernel."""

    kind = NMLayout.kind
    record = RECORD

    def most_tokens(self, layout: NMLayout) -> None:
        """Return None: the kernels take any number of tokens."""

    def launch(
        self, outputs: Sequence[torch.Tensor], x: torch.Tensor, table: LayoutTable[NMLayout], segments: Segments
    ) -> None:
        """Launch the products of one layout."""
        from deltafmt.kernels.nm import launch

        launch.launch_products(outputs, x, table, segments)

    def decode(self, operand: Operand, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of a delta."""
        codes = operand.buffers["codes"]
        if not devices.usable(codes):
            return decode.decode(operand, start, stop)
        from deltafmt.kernels.nm import launch

        out = torch.empty(stop - start, operand.columns, dtype=torch.float32, device=operand.device)
        with devices.on_device_of(codes):
            if not may_launch(out.device, lambda: launch.launch_expand(operand, None, out, start, stop)):
                return decode.decode(operand, start, stop)
            launch.launch_expand(operand, None, out, start, stop)
        return out

    def decode_rows(self, operand: Operand, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a delta; no other row is unpacked."""
        return decode.decode_rows(operand, rows)

    @property
    def embeds(self) -> bool:
        """True: a kernel adds rows to embeddings."""
        return True

    def launch_embedding(
        self, output: torch.Tensor, ids: torch.Tensor, table: LayoutTable[NMLayout], segments: Segments
    ) -> None:
        """Launch the addition of each token's row onto its embedding."""
        from deltafmt.kernels.nm import launch

        launch.launch_embedding(output, ids, table, segments)

    def fuses(self, layout: NMLayout, tokens: int) -> bool:
        """True for one token of a layout that the gather kernel unrolls, and for a prompt."""
        from deltafmt.kernels.nm import launch

        return tokens > launch.gather_tokens(layout) or (tokens == 1 and launch.step_elements(layout) > 0)

    def launch_fused(
        self,
        outputs: Sequence[torch.Tensor],
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        table: LayoutTable[NMLayout],
        slot: int,
    ) -> None:
        """Launch base and one delta in one kernel."""
        from deltafmt.kernels.nm import launch

        launch.launch_fused(outputs, x, weights, table, slot)

    def add_to(self, base: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
        """Write ``base + delta`` to ``out``."""
        if not devices.usable(base):
            super().add_to(base, operand, out)
            return
        from deltafmt.kernels.nm import launch

        if not may_launch(out.device, lambda: launch.launch_expand(operand, base, out, 0, operand.rows)):
            super().add_to(base, operand, out)
            return
        launch.launch_expand(operand, base, out, 0, operand.rows)

    def convert(self, source: torch.Tensor, target: torch.Tensor, jobs: Sequence[Conversion]) -> dict[int, str]:
        """Make ``rank`` indexes ``fixed``."""
        return convert_ranks(source, target, jobs)
