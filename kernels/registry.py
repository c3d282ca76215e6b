"""The device side of each kind of term, by the kind's name; it follows :mod:`deltafmt.terms.registry`."""

from __future__ import annotations

from typing import Final

from deltafmt.kernels.kind import AnyKernels
from deltafmt.kernels.lowbit.kind import LowbitKernels
from deltafmt.kernels.lowrank.kind import LowRankKernels
from deltafmt.kernels.nm.kind import NMKernels
from deltafmt.kernels.sparse.kind import SparseKernels
from deltafmt.terms.layout import TermLayout

KERNELS: Final[dict[str, AnyKernels]] = {
    kernels.kind: kernels for kernels in (NMKernels(), LowbitKernels(), LowRankKernels(), SparseKernels())
}


def kernels_of(layout: TermLayout) -> AnyKernels:
    """Return the device side of a layout's kind."""
    return KERNELS[layout.kind]
