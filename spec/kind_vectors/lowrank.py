"""The vectors of ``lowrank`` terms, good and bad."""

from __future__ import annotations

import numpy as np
from vector_tools import change_buffer, coded, fields, makes_arrays, one_tensor, vector

from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout


@makes_arrays("lowrank")
def arrays(layout: LowRankLayout, rows: int, columns: int, seed: int) -> LowRankArrays:  # noqa: ARG001
    """Return made-up content of a ``lowrank`` term."""
    coding, rank = layout.factors, layout.rank
    if isinstance(coding, Coding):
        u, v = (coded(coding, rank, n, coding.scales(n), salt) for salt, n in enumerate((rows, columns)))
        return LowRankArrays(u, v)
    raw = []
    for salt, length in enumerate((rows, columns)):
        values = fields(rank * length, 254, salt).astype(np.float32) / 64 - 2
        raw.append(narrow(values.reshape(rank, length), coding))
    return LowRankArrays(*raw)


@vector("ok", "lowrank of 3 vectors, 5 bits midrise, scales for every 16 elements; sums are rounded vector by vector")
def lowrank_3_k5() -> bytes:
    return one_tensor(LowRankLayout(3, Coding(5, "midrise", "BF16", 16)), 45, 70)


@vector("ok", "lowrank of 33 vectors, 2 bits asymmetric, F32 scales, in a cold file")
def lowrank_33_k2_cold() -> bytes:
    return one_tensor(LowRankLayout(33, Coding(2, "asymmetric", "F32")), 40, 33, "cold")


@vector("ok", "lowrank of 2 vectors of F16 values, as an adapter has them")
def lowrank_2_f16() -> bytes:
    return one_tensor(LowRankLayout(2, "F16"), 33, 50)


@vector("invalid", "a value of a vector is infinite", "factor v is not finite")
def lowrank_infinite() -> bytes:
    data = one_tensor(LowRankLayout(1, "BF16"), 32, 32)
    return change_buffer(change_buffer(data, "v", 0, 0x80), "v", 1, 0x7F)
