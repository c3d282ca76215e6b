"""The products with packed ``nm`` deltas: Triton kernels where they run, otherwise the reference."""

from __future__ import annotations

from deltafmt.kernels.nm_matmul.naive import nm_embedding_, nm_matmul_, operand_delta

__all__ = ["nm_embedding_", "nm_matmul_", "operand_delta"]
