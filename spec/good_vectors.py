"""Vectors that a reader must accept, one generator a scenario."""

from __future__ import annotations

import io

import numpy as np
from blake3 import blake3
from vector_tools import add_term, encode, join, one_tensor, parts, simple, summed, vector

from deltafmt.container import frame
from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout


@vector("ok", "no tensor at all: header, index and trailer")
def empty() -> bytes:
    out = io.BytesIO()
    ContainerWriter(out).finish([])
    return out.getvalue()


@vector("ok", "seeded 4:16, 4 bits midtread, masks shared by 4 rows, ragged rows")
def seeded_4_16_k4() -> bytes:
    return one_tensor(NMLayout(4, 16, 4, share=4), 70, 64)


@vector("ok", "seeded 1:32, 4 bits: one position a group needs 8 bits of a hash")
def seeded_1_32_k4() -> bytes:
    return one_tensor(NMLayout(1, 32, 4, share=1), 33, 100)


@vector("ok", "seeded 2:128, 8 bits, masks shared by 8 rows: 16 bits of a hash a group")
def seeded_2_128_k8() -> bytes:
    return one_tensor(NMLayout(2, 128, 8, share=8), 9, 300)


@vector("ok", "seeded 1:8, 1 bit midrise: 4 bits of a hash a group")
def seeded_1_8_k1() -> bytes:
    return one_tensor(NMLayout(1, 8, 1, grid="midrise", share=4), 64, 128)


@vector("ok", "seeded 2:16, 2 bits midrise, F32 scales for every 5 entries")
def seeded_2_16_k2_groups() -> bytes:
    return one_tensor(NMLayout(2, 16, 2, grid="midrise", share=2, scale_dtype="F32", scale_group=5), 35, 70)


@vector("ok", "fixed 3:7, 3 bits: M is no power of two, codes and positions in planes of 2 and 1 bits")
def fixed_3_7_k3() -> bytes:
    return one_tensor(NMLayout(3, 7, 3, "fixed", share=2), 37, 45)


@vector("ok", "fixed 5:100, 6 bits, two super-tiles of 128 rows: planes of 4 and 2 bits, of positions 4, 2 and 1")
def fixed_5_100_k6_super_tiles() -> bytes:
    return one_tensor(NMLayout(5, 100, 6, "fixed", share=4, scale_group=4), 130, 320)


@vector("ok", "fixed 16:16, 5 bits: every element is kept")
def fixed_16_16_k5() -> bytes:
    return one_tensor(NMLayout(16, 16, 5, "fixed"), 3, 32)


@vector("ok", "rank 4:16, 6 bits, in a cold file")
def rank_4_16_k6_cold() -> bytes:
    return one_tensor(NMLayout(4, 16, 6, "rank", share=4), 40, 100, "cold")


@vector("ok", "rank 31:66: ranks of 63 bits, in six planes")
def rank_31_66_cold() -> bytes:
    return one_tensor(NMLayout(31, 66, 2, "rank", grid="midrise"), 2, 140, "cold")


@vector(
    "ok", "every action: same, replace (also 0-d and empty), add with new rows, alias; an attachment, a removed tensor"
)
def every_action() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    layout = NMLayout(1, 4, 4)
    term, _ = add_term(writer, layout, 5, 8, 3)
    new_rows = bytes(range(32))
    data = writer.add(new_rows)
    digest = blake3()
    for name in ("codes", "scales"):
        ref = term.buffers[name]
        digest.update(out.getvalue()[4096 + ref.offset :][: ref.length])
    digest.update(new_rows)
    grown = TensorEntry(
        "grown", "add", "BF16", (7, 8), BaseRef(bytes(32), "BF16", (5, 8)), digest.digest(), data, (term,)
    )
    number, nothing = np.float32(1.5).tobytes(), b""
    entries = [
        grown,
        TensorEntry("tied", "alias", "BF16", (7, 8), target="grown"),
        TensorEntry("kept", "same", "I64", (3,), BaseRef(bytes(32), "I64", (3,))),
        TensorEntry("scalar", "replace", "F32", (), digest=blake3(number).digest(), data=writer.add(number)),
        TensorEntry("void", "replace", "F16", (0, 4), digest=blake3(nothing).digest(), data=writer.add(nothing)),
    ]
    config = b"{}\n"
    attachment = writer.attach(config)
    writer.finish(entries, removed=["gone"], attachments={"config.json": attachment}, metadata={"method": "made up"})
    return out.getvalue()


@vector("ok", "two terms: their float32 sum is the delta")
def sum_of_terms() -> bytes:
    return summed(NMLayout(1, 4, 4), NMLayout(2, 16, 2, grid="midrise", share=8), rows=20, columns=32)


@vector("ok", "lowbit 1 bit midrise: signs, one scale a row, ragged rows and columns")
def lowbit_k1() -> bytes:
    return one_tensor(LowbitLayout(1, "midrise"), 37, 45)


@vector(
    "ok",
    "lowbit 7 bits midtread in planes of 4, 2 and 1 bits, F32 scales for every 20 columns, of which the last has 5",
)
def lowbit_k7_groups() -> bytes:
    return one_tensor(LowbitLayout(7, "midtread", "F32", 20), 33, 45)


@vector("ok", "lowbit 3 bits asymmetric: a zero point for every scale")
def lowbit_k3_zero_points() -> bytes:
    return one_tensor(LowbitLayout(3, "asymmetric", "BF16", 16), 70, 70)


@vector("ok", "lowbit 1 bit midrise, one scale a column")
def lowbit_k1_columns() -> bytes:
    return one_tensor(LowbitLayout(1, "midrise", axis="column"), 40, 50)


@vector("ok", "lowrank of 3 vectors, 5 bits midrise, scales for every 16 elements; sums are rounded vector by vector")
def lowrank_3_k5() -> bytes:
    return one_tensor(LowRankLayout(3, Coding(5, "midrise", "BF16", 16)), 45, 70)


@vector("ok", "lowrank of 33 vectors, 2 bits asymmetric, F32 scales, in a cold file")
def lowrank_33_k2_cold() -> bytes:
    return one_tensor(LowRankLayout(33, Coding(2, "asymmetric", "F32")), 40, 33, "cold")


@vector("ok", "lowrank of 2 vectors of F16 values, as an adapter has them")
def lowrank_2_f16() -> bytes:
    return one_tensor(LowRankLayout(2, "F16"), 33, 50)


@vector("ok", "sparse, 4 bits midtread, gaps of 4 bits, two tiles, the second ragged, and empty rows")
def sparse_k4_gaps_4() -> bytes:
    return one_tensor(SparseLayout(Coding(4), 4, 256), 37, 200)


@vector("ok", "sparse, BF16 values, gaps of 1 bit: a map of bits; three blocks of 256 columns, the last of 88")
def sparse_bf16_bitmap() -> bytes:
    return one_tensor(SparseLayout("BF16", 1, 256), 20, 600)


@vector("ok", "sparse, 1 bit midrise, gaps of 16 bits, F32 scales, in a cold file")
def sparse_k1_gaps_16_cold() -> bytes:
    return one_tensor(SparseLayout(Coding(1, "midrise", "F32"), 16, 65536), 40, 300, "cold")


@vector("ok", "a sum of kinds: two bands of vectors, a seeded nm term, a lowbit term, a sparse term")
def sum_of_kinds() -> bytes:
    bands = LowRankLayout(2, Coding(8, scale_group=32)), LowRankLayout(5, Coding(3, scale_group=32))
    others = NMLayout(1, 8, 4, share=4), LowbitLayout(2, "midrise"), SparseLayout("F32", 2, 256)
    return summed(*bands, *others, rows=70, columns=50)


@vector("ok", "compatible feature bit 9 is set, which a reader ignores")
def compatible_bit() -> bytes:
    body, index = parts(simple())
    body = frame.encode_header(compatible=1 << 9) + body[c.HEADER_SIZE :]
    return join(body, encode(index), simple()[-104:-72])
