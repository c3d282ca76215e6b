"""Vectors of the rules of ``lowrank`` terms that no other file has: parameters, unused bits, values (section 13)."""

from __future__ import annotations

import io

import numpy as np
from draft import Draft
from vector_tools import change_buffer, layout_is, one_tensor, unchecked, vector

from deltafmt.delta import DeltaFile
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.layout import LowRankLayout

SMALL = (4, 8)


def with_vectors(u: list[list[float]], v: list[list[float]], dtype: str = "F32") -> bytes:
    """Return a file whose vectors have these values."""
    factors = [np.array(side, np.float32) for side in (u, v)]
    draft = Draft.of(one_tensor(LowRankLayout(len(u), dtype), len(u[0]), len(v[0])))
    for name, factor in zip("uv", factors, strict=True):
        _, offset, length = draft.term["buffers"][name]
        draft.raw[0][offset : offset + length] = factor.tobytes()
    return draft.build()


@vector("ok", "lowrank sums that round: 2**24 + 1 - 2**24, in the order of the vectors, and products that are rounded")
def lowrank_rounded() -> bytes:
    large, third = 2.0**24, 1 / 3
    u = [[large, 1.0, third], [1.0, large, third], [-large, -large, -third]]
    v = [[1.0, third, *(i / 7 for i in range(9))], [1.0, 1.0, *(0.3 * i for i in range(9))], [1.0] * 11]
    data = with_vectors(u, v)
    with DeltaFile(io.BytesIO(data)) as delta:
        assert delta.delta("w")[0, 0] == 0.0
    return data


@vector("ok", "lowrank products that are subnormal, beyond float32 (infinity), and -0")
def lowrank_bounds() -> bytes:
    return with_vectors([[1e-30, 1e30, -1.0], [0.0, 1.0, 0.0]], [[1e-15, 1e15, 0.0], [0.0, -1.0, -0.0]])


@vector("ok", "lowrank of 40 vectors of F32 values: 40 sums an element")
def lowrank_40_f32() -> bytes:
    return one_tensor(LowRankLayout(40, "F32"), 40, 40)


@vector("ok", "lowrank of 3 vectors of BF16 values")
def lowrank_3_bf16() -> bytes:
    return one_tensor(LowRankLayout(3, "BF16"), 5, 70)


@vector("ok", "lowrank of one vector, 8 bits midtread, F32 scales, one element a group")
def lowrank_1_k8() -> bytes:
    return one_tensor(LowRankLayout(1, Coding(8, "midtread", "F32", 1)), 6, 35)


@vector("ok", "lowrank of 4 vectors, 1 bit midrise, scales for every 5 elements")
def lowrank_4_k1() -> bytes:
    return one_tensor(LowRankLayout(4, Coding(1, "midrise", "BF16", 5)), 33, 34)


@vector("ok", "lowrank of 2 vectors, 7 bits asymmetric in three planes, scales for every 16 elements")
def lowrank_2_k7_zero_points() -> bytes:
    return one_tensor(LowRankLayout(2, Coding(7, "asymmetric", "BF16", 16)), 37, 41)


@vector("ok", "as many vectors as the matrix has rows, which are fewer than its columns")
def lowrank_full() -> bytes:
    return one_tensor(LowRankLayout(4, Coding(4)), *SMALL)


def of_rank(rank: int, rows: int, columns: int) -> bytes:
    """Return a file whose layout has another rank than a matrix allows, with buffers for it."""
    draft = Draft.of(one_tensor(LowRankLayout(1, "BF16"), rows, columns))
    draft.index["layouts"][0]["rank"] = rank
    start, raw = 0, bytearray()
    for name, length in (("u", rows), ("v", columns)):
        raw += bytes(-len(raw) % 256)
        start = len(raw)
        raw += b"\x80\x3f" * (rank * length)
        draft.term["buffers"][name] = [0, start, 2 * rank * length]
    draft.raw[0] = raw
    return draft.build()


@vector("invalid", "a band of no vectors", "rank R = 0")
def lowrank_of_rank_0() -> bytes:
    return of_rank(0, *SMALL)


@vector("invalid", "more vectors than the matrix has columns", "rank R = 9 is more than a matrix of 10 x 8 has")
def lowrank_above_columns() -> bytes:
    return of_rank(9, 10, 8)


@vector("invalid", "more vectors than the matrix has rows", "rank R = 5 is more than a matrix of 4 x 8 has")
def lowrank_above_rows() -> bytes:
    return of_rank(5, *SMALL)


@vector("invalid", "65536 vectors", "rank R = 65536")
def lowrank_65536() -> bytes:
    return layout_is(of_rank(1, *SMALL), rank=65536)


@vector("invalid", "vectors of F64 values", "dtype of factors 'F64'")
def lowrank_f64() -> bytes:
    return layout_is(one_tensor(LowRankLayout(1, "F32"), *SMALL), factors="F64")


@vector("invalid", "vectors of 9 bits", "bits k = 9")
def lowrank_9_bits() -> bytes:
    return one_tensor(LowRankLayout(1, unchecked(Coding, 9)), *SMALL)


@vector("invalid", "vectors on a midtread grid of one bit", "midtread grid of 1 bit")
def lowrank_midtread_1_bit() -> bytes:
    return one_tensor(LowRankLayout(1, unchecked(Coding, 1)), *SMALL)


@vector("invalid", "vectors on a grid that version 1 does not know", "grid 'uniform'")
def lowrank_grid() -> bytes:
    coding = Coding(4, "midrise").to_obj()
    return layout_is(one_tensor(LowRankLayout(1, Coding(4, "midrise")), *SMALL), factors={**coding, "grid": "uniform"})


@vector("invalid", "vectors with scales of F16", "scale dtype 'F16'")
def lowrank_scale_dtype() -> bytes:
    coding = Coding(4).to_obj()
    return layout_is(one_tensor(LowRankLayout(1, Coding(4)), *SMALL), factors={**coding, "scale_dtype": "F16"})


@vector("invalid", "vectors with scales for groups of 2**31 elements", "scale group 2147483648")
def lowrank_scale_group() -> bytes:
    coding = Coding(4).to_obj()
    return layout_is(one_tensor(LowRankLayout(1, Coding(4)), *SMALL), factors={**coding, "scale_group": 1 << 31})


@vector("invalid", "a coding of vectors has a key that version 1 does not know", "expected the keys")
def lowrank_unknown_key() -> bytes:
    draft = Draft.of(one_tensor(LowRankLayout(1, Coding(4)), *SMALL))
    return draft.build(late=lambda index: index["layouts"][0]["factors"].update(zzz=1))


@vector("invalid", "a lowrank term, which draws nothing, has a seed", "has seed 0")
def lowrank_seed() -> bytes:
    draft = Draft.of(one_tensor(LowRankLayout(1, "F32"), *SMALL))
    draft.term["seed"] = 1
    return draft.build()


@vector("invalid", "unused bits of a vector's last word are set", "unused bits of the u_codes")
def lowrank_unused_bits() -> bytes:
    # Two vectors of 33 fields: 5 words each.
    return change_buffer(one_tensor(LowRankLayout(2, Coding(4, "midrise")), 33, 32), "u_codes", 19, 0x10)


@vector("invalid", "unused bits of the last word of the other vectors are set", "unused bits of the v_codes")
def lowrank_unused_bits_of_v() -> bytes:
    return change_buffer(one_tensor(LowRankLayout(2, Coding(4, "midrise")), 4, 7), "v_codes", 7, 0x10)


@vector("invalid", "unused bits of the first plane of a vector are set", "unused bits of the u_codes")
def lowrank_unused_bits_of_a_plane() -> bytes:
    return change_buffer(one_tensor(LowRankLayout(1, Coding(3, "midrise")), *SMALL), "u_codes", 1, 0x01)


@vector("invalid", "a field of 7 on a midtread grid of 3 bits, in the last vector", "the grid ends at 6")
def lowrank_field_beyond_grid() -> bytes:
    # Vectors of 8 fields: words of 16 bits and of 8. Vector 1 of v has words 2 and 3.
    data = one_tensor(LowRankLayout(2, Coding(3)), *SMALL)
    return change_buffer(change_buffer(data, "v_codes", 9, 0xC0), "v_codes", 12, 0x80)


@vector("invalid", "a zero point of a vector is beyond its grid", "a zero point is 8")
def lowrank_zero_point_beyond_grid() -> bytes:
    return change_buffer(one_tensor(LowRankLayout(2, Coding(3, "asymmetric")), *SMALL), "u_zero_points", 1, 8)


@vector("invalid", "a scale of a vector is negative", "negative or not finite")
def lowrank_negative_scale() -> bytes:
    return change_buffer(one_tensor(LowRankLayout(2, Coding(3)), *SMALL), "v_scales", 3, 0xBF)


@vector("invalid", "a scale of a vector is not a number", "negative or not finite")
def lowrank_nan_scale() -> bytes:
    data = one_tensor(LowRankLayout(2, Coding(3)), *SMALL)
    return change_buffer(change_buffer(data, "u_scales", 2, 0xC0), "u_scales", 3, 0x7F)


VALUES = {"bf16": (2, b"\x80\x7f"), "f16": (2, b"\x00\xfc"), "f32": (4, b"\x00\x00\xc0\x7f")}
for _dtype, (_size, _bits) in VALUES.items():

    @vector(
        "invalid",
        f"a vector of {_dtype.upper()} is not finite",
        "is not finite",
        f"lowrank-{_dtype}-not-finite",
    )
    def _not_finite(dtype: str = _dtype, size: int = _size, bits: bytes = _bits) -> bytes:
        draft = Draft.of(one_tensor(LowRankLayout(2, dtype.upper()), *SMALL))
        _, offset, length = draft.term["buffers"]["u"]
        draft.raw[0][offset + length - size : offset + length] = bits
        return draft.build()
