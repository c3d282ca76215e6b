"""Kept entries packed in one pass: differences, gathered, quantized, and written as an ``nm`` term's words.

Compiled: ``nm_pack`` in ``kernels/cpu/loops/nm.c``, which keeps each row in the processor's first-level cache. The
reference does the same in steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.quantize import coding_arguments, quantize
from deltafmt.terms.buffers import Packed
from deltafmt.terms.nm.codec import NMArrays, encode
from deltafmt.terms.nm.index.codecs import INDEX_CODECS
from deltafmt.terms.nm.layout import NMLayout


def _pack_kept(
    native: Native,
    rows: DeltaRows,
    positions: NDArray[np.uint8],
    layout: NMLayout,
    rule: str,
    factor: np.float32,
    packed: Packed,
) -> None:
    kept = max(layout.kept(rows.shape[1]), 1)
    size = min(layout.scale_group or kept, kept)
    done = native.nm_pack(
        *(np.ascontiguousarray(rows.finetuned), rows.finetuned_dtype),
        *(np.ascontiguousarray(rows.base), rows.base_dtype),
        *(positions, layout.m, layout.share, factor),
        *coding_arguments(layout.bits, layout.grid, rule, size, layout.scale_dtype),
        *(packed["codes"].view(np.uint32), packed["scales"]),
    )
    if not done:
        pack_kept.reference(rows, positions, layout, rule, factor, packed)
    elif "index" in packed:
        INDEX_CODECS[layout.index].encode(positions, layout, packed["index"].view(np.uint32))


@loop(_pack_kept)
def pack_kept(
    rows: DeltaRows,
    positions: NDArray[np.uint8],
    layout: NMLayout,
    rule: str,
    factor: np.float32,
    packed: Packed,
) -> None:
    """Pack the kept entries of a run of rows.

    Args:
        rows: the run, which starts where a super-tile does.
        positions: shape (mask rows, groups, N).
        layout: the term's layout.
        rule: rule of the scales: ``minmax`` or ``mse``.
        factor: what kept entries are multiplied by.
        packed: the run's slices of :func:`deltafmt.terms.buffers.blank`; changed.

    Raises:
        NonFiniteError: an element of the delta, kept or not, is NaN or infinite; names the first.
        UsageError: a scale would overflow its dtype.
    """
    kept = rows.gather(positions, layout.m, layout.share, factor)
    codes, scales = quantize(kept, layout.bits, layout.grid, rule, layout.scale_group, layout.scale_dtype)
    encode(layout, NMArrays(positions, codes, scales), packed)
