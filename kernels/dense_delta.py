"""The dense delta of a term of any kind on its device."""

from __future__ import annotations

import torch

from deltafmt.errors import UnsupportedError
from deltafmt.kernels.lowbit.naive import lowbit_delta
from deltafmt.kernels.lowrank.naive import lowrank_delta
from deltafmt.kernels.nm import product
from deltafmt.kernels.nm.operand import NMOperand
from deltafmt.kernels.sparse.naive import sparse_delta
from deltafmt.kernels.table import Operand
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.sparse.layout import SparseLayout


def operand_delta(operand: Operand, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of an operand's dense float32 delta, shape (rows, columns).

    Raises:
        UnsupportedError: of a kind that torch cannot decode.
    """
    if isinstance(operand, NMOperand):
        return product.operand_delta(operand, start, stop)
    layout, rows, columns = operand.layout, operand.rows, operand.columns
    if isinstance(layout, LowbitLayout):
        return lowbit_delta(layout, operand.buffers, rows, columns)[start:stop]
    if isinstance(layout, LowRankLayout):
        return lowrank_delta(layout, operand.buffers, rows, columns)[start:stop]
    if isinstance(layout, SparseLayout):
        return sparse_delta(layout, operand.buffers, rows, columns, operand.slots)[start:stop]
    raise UnsupportedError(f"no way to decode {layout.kind} terms on a device")
