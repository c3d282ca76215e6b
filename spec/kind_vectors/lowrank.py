"""The vectors of ``lowrank`` terms, good and bad."""

from __future__ import annotations

import numpy as np
from vector_tools import change, change_buffer, coded, fields, makes_arrays, one_tensor, vector

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


@vector("invalid", "a band of no vectors", "rank R = 0")
def lowrank_of_rank_0() -> bytes:
    return change(one_tensor(LowRankLayout(1, "BF16"), 32, 32), lambda index: index["layouts"][0].update(rank=0))


@vector("invalid", "more vectors than the buffers hold", "where the shape needs")
def lowrank_longer_than_buffers() -> bytes:
    return change(one_tensor(LowRankLayout(1, "BF16"), 32, 32), lambda index: index["layouts"][0].update(rank=32))


@vector("invalid", "more vectors than the matrix has columns", "rank R = 33 is more than a matrix of 40 x 32 has")
def lowrank_above_columns() -> bytes:
    return change(one_tensor(LowRankLayout(1, "BF16"), 40, 32), lambda index: index["layouts"][0].update(rank=33))


@vector("invalid", "unused bits of a vector's last word are set", "unused bits of the u_codes")
def lowrank_unused_bits() -> bytes:
    data = one_tensor(LowRankLayout(2, Coding(4, "midrise")), 33, 32)
    return change_buffer(data, "u_codes", 19, 0x10)


@vector("invalid", "a value of a vector is infinite", "factor v is not finite")
def lowrank_infinite() -> bytes:
    data = one_tensor(LowRankLayout(1, "BF16"), 32, 32)
    return change_buffer(change_buffer(data, "v", 0, 0x80), "v", 1, 0x7F)
