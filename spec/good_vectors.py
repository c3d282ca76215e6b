"""Vectors that a reader must accept, one generator a scenario."""

from __future__ import annotations

import io

import numpy as np
from blake3 import blake3
from vector_tools import add_term, encode, join, parts, simple, summed, vector

from deltafmt.container import frame
from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry
from deltafmt.index.scaled import ScaledRef, StoredRef
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


@vector(
    "ok", "parts: a base of another name, one made of two tensors, and one that is a piece of a tensor; feature bit 0"
)
def base_parts() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out, features=c.FEATURE_PARTS)
    term, digest = add_term(writer, NMLayout(1, 4, 4), 6, 8, 3)
    joined = BaseRef(bytes(32), "BF16", (2, 3, 8), (BasePart("one", 0, 24), BasePart("two", 0, 24)))
    renamed = BaseRef(bytes(32), "F32", (4,), (BasePart("old.norm", 0, 4),))
    piece = BaseRef(bytes(32), "I8", (5,), (BasePart("stack", 10, 5),))
    writer.finish(
        [
            TensorEntry("both", "add", "BF16", (2, 3, 8), joined, digest, None, (term,)),
            TensorEntry("new.norm", "same", "F32", (4,), renamed),
            TensorEntry("third", "same", "I8", (5,), piece),
        ]
    )
    return out.getvalue()


@vector("ok", "leading: a kernel of shape [7, 2, 3, 3] as 7 rows of 18 columns; feature bit 1")
def leading_dimensions() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out, features=c.FEATURE_LEADING)
    term, digest = add_term(writer, NMLayout(1, 4, 4), 7, 18, 3)
    shape, base = (7, 2, 3, 3), BaseRef(bytes(32), "BF16", (7, 2, 3, 3))
    entry = TensorEntry("kernel", "add", "BF16", shape, base, digest, None, (term,), leading=1)
    writer.finish([entry])
    return out.getvalue()


@vector("ok", "scaled: the base keeps a matrix as 8-bit floats with four scales, and a vector without; feature bit 2")
def scaled_base() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out, features=c.FEATURE_SCALED)
    term, digest = add_term(writer, NMLayout(1, 4, 4), 7, 18, 3)
    entries = [
        TensorEntry("matrix", "add", "BF16", (7, 18), BaseRef(bytes(32), "BF16", (7, 18)), digest, None, (term,)),
        TensorEntry("vector", "same", "BF16", (9,), BaseRef(bytes(32), "BF16", (9,))),
    ]
    codes, scales = StoredRef(bytes(32), "F8_E4M3", (7, 18)), StoredRef(bytes(32), "F32", (2, 2))
    scaled = {
        "matrix": ScaledRef((4, 16), codes, scales, "matrix_scale_inv"),
        "vector": ScaledRef((9,), StoredRef(bytes(32), "F8_E5M2", (9,))),
    }
    writer.finish(entries, scaled=scaled)
    return out.getvalue()


@vector("ok", "two terms: their float32 sum is the delta")
def sum_of_terms() -> bytes:
    return summed(NMLayout(1, 4, 4), NMLayout(2, 16, 2, grid="midrise", share=8), rows=20, columns=32)


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
