"""Vectors of base tensors that are kept as 8-bit floats with scales (section 7.8)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from applied import meant
from draft import Draft, header
from vector_tools import WithBase, add_term, based, small, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.scaled import ScaledRef, StoredRef
from deltafmt.terms.nm.layout import NMLayout

CODES = {"digest": bytes(32), "dtype": "F8_E4M3", "shape": [4, 8]}


def scales(shape: list[int], dtype: str = "F32", name: str = "s") -> dict[str, Any]:
    """Return the description of scales."""
    return {"digest": bytes(32), "dtype": dtype, "name": name, "shape": shape}


def with_scaled(block: Any, stored: Any, features: int = 4, codes: Any = None) -> bytes:
    """Return a small file whose base keeps a tensor of shape [4, 8] as 8-bit floats."""
    draft = Draft.of(small())
    draft.header = header(incompatible=features)
    described = {"block": block, "codes": codes or CODES, "scales": stored}
    draft.index["scaled"] = {"w": described}
    draft.index = dict(sorted(draft.index.items()))
    return draft.build()


@vector("ok", "scaled: the base keeps a matrix as 8-bit floats with four scales, and a vector without; feature bit 2")
def scaled_base() -> WithBase:
    out = io.BytesIO()
    writer = ContainerWriter(out, features=c.FEATURE_SCALED)
    term, digest = add_term(writer, NMLayout(1, 4, 4), 7, 18, 3)
    entries = [
        TensorEntry("matrix", "add", "BF16", (7, 18), BaseRef(bytes(32), "BF16", (7, 18)), digest, None, (term,)),
        TensorEntry("vector", "same", "BF16", (9,), BaseRef(bytes(32), "BF16", (9,))),
    ]
    codes, four = StoredRef(bytes(32), "F8_E4M3", (7, 18)), StoredRef(bytes(32), "F32", (2, 2))
    described = {
        "matrix": ScaledRef((4, 16), codes, four, "matrix_scale_inv"),
        "vector": ScaledRef((9,), StoredRef(bytes(32), "F8_E5M2", (9,))),
    }
    writer.finish(entries, scaled=described)
    base = {
        "matrix": ("F8_E4M3", (7, 18), bytes(range(1, 127))),
        "matrix_scale_inv": ("F32", (2, 2), np.array([0.5, 3.0, 0.1, 1e-3], "<f4").tobytes()),
        "vector": ("F8_E5M2", (9,), bytes([0x3C, 0xBC, 0x01, 0x83, 0x7B, 0, 0x80, 0x04, 0x44])),
    }
    return based(out.getvalue(), base)


# Every code of either dtype, as the base's bytes: NaN and the infinities included.
ALL = bytes(range(256))
SCALES: dict[str, bytes] = {
    "F32": np.array([1.0, 0.3333333432674408, 1e-38, 3e38, 0.0, -2.0, 65537.0, 1.0078125], "<f4").tobytes(),
    "BF16": np.array([0x3F80, 0x3EAB, 0x0080, 0x7F00, 0x0000, 0xC000, 0x4780, 0x3F81], "<u2").tobytes(),
    "F16": np.array([1.0, 0.3333, 6e-8, 65504.0, 0.0, -2.0, 1.001, 0.1], "<f2").tobytes(),
    "F8_E8M0": bytes([127, 126, 0, 254, 128, 1, 100, 140]),
    "U8": bytes([127, 126, 0, 254, 128, 1, 100, 140]),
}


def _values(dtype: str, scale_dtype: str) -> WithBase:
    draft = Draft.of(small())
    draft.header = header(incompatible=4)
    codes = {"digest": bytes(32), "dtype": dtype, "shape": [16, 16]}
    block = [4, 8] if scale_dtype else [16, 16]
    stored = scales([8], scale_dtype, "w_scale") if scale_dtype else None
    draft.index["scaled"] = {"w": {"block": block, "codes": codes, "scales": stored}}
    ref = {"digest": bytes(32), "dtype": "BF16", "shape": [16, 16]}
    draft.index.update(layouts=[], sections=[])
    draft.raw = []
    draft.index["tensors"] = {"w": {"action": "same", "base": ref, "dtype": "BF16", "shape": [16, 16]}}
    draft.index = dict(sorted(draft.index.items()))
    base = {"w": (dtype, (16, 16), ALL)}
    if scale_dtype:
        base["w_scale"] = (scale_dtype, (8,), SCALES[scale_dtype])
    return based(draft.build(), base)


for _dtype in ("F8_E4M3", "F8_E5M2"):
    for _scale in (*SCALES, ""):
        _with = f"scales of {_scale}" if _scale else "no scales"
        _name = f"scaled-{_dtype}-{_scale or 'alone'}".lower().replace("_", "-")
        vector("ok", f"every code of {_dtype}, with {_with}: the BF16 values that the base means", name=_name)(
            lambda dtype=_dtype, scale=_scale: _values(dtype, scale)  # type: ignore[misc]
        )


@vector("ok", "a scale for each row, of a matrix whose blocks reach beyond its last column")
def scaled_rows() -> bytes:
    return with_scaled([1, 200], scales([4, 1]))


@vector("ok", "a base that holds the values themselves, as BF16, is the same base")
def scaled_held_as_values() -> WithBase:
    with_codes = _values("F8_E4M3", "F32")
    ref = ScaledRef.from_obj(Draft.of(with_codes.data).index["scaled"]["w"], "w")
    return WithBase(with_codes.data, {"w": ("BF16", (16, 16), meant(ref, "w", with_codes.base))})


@vector("ok", "a base whose scales differ from those that the file records: whoever applies the file refuses it")
def scaled_wrong_base() -> WithBase:
    right = _values("F8_E4M3", "F32")
    dtype, shape, data = right.base["w_scale"]
    return WithBase(right.data, {**right.base, "w_scale": (dtype, shape, data[::-1])}, refused=True)


@vector("invalid", "the base's tensors are scaled, and the header does not say so", "bit 2")
def scaled_without_feature() -> bytes:
    return with_scaled([2, 8], scales([2, 1]), 0)


@vector("invalid", "a block has a size of zero, and there is no scale", "is no block of a tensor")
def scaled_empty_block() -> bytes:
    return with_scaled([0, 8], None)


@vector("invalid", "a block has one dimension more than its tensor", "is no block of a tensor")
def scaled_block_of_three() -> bytes:
    return with_scaled([2, 8, 1], None)


@vector("ok", "scaled names no tensor; the content id has the key, too")
def scaled_empty() -> bytes:
    draft = Draft.of(small())
    draft.header = header(incompatible=4)
    draft.index = dict(sorted({**draft.index, "scaled": {}}.items()))
    return draft.build()


@vector("invalid", "a block has one dimension less than its tensor", "is no block of a tensor")
def scaled_block_of_one() -> bytes:
    return with_scaled([2], None)


@vector("invalid", "there are two scales, and the blocks need three", "2 scales where the blocks need 3")
def scaled_too_few() -> bytes:
    return with_scaled([2, 8], scales([2, 1]), codes={**CODES, "shape": [5, 8]})


@vector("invalid", "there are three scales, and the blocks need two", "3 scales where the blocks need 2")
def scaled_too_many() -> bytes:
    return with_scaled([2, 8], scales([3, 1]))


@vector("invalid", "scaled codes are 8-bit integers", "is not one of F8_E4M3, F8_E5M2")
def scaled_integers() -> bytes:
    return with_scaled([2, 8], scales([2, 1]), codes={**CODES, "dtype": "I8"})


@vector("invalid", "scales are 64-bit floats", "is not one of BF16")
def scaled_wide_scales() -> bytes:
    return with_scaled([2, 8], scales([2, 1], "F64"))


@vector("invalid", "the name of the scales has no bytes", "a name has 1 to 1024 bytes")
def scaled_nameless_scales() -> bytes:
    return with_scaled([2, 8], scales([2, 1], name=""))


@vector("invalid", "a description has a key that version 1 does not know", "expected the keys")
def scaled_unknown_key() -> bytes:
    draft = Draft.of(with_scaled([2, 8], scales([2, 1])))
    return draft.build(late=lambda index: index["scaled"]["w"].update(zero=None))


@vector("invalid", "a description lacks its scales", "expected the keys")
def scaled_without_scales() -> bytes:
    draft = Draft.of(with_scaled([2, 8], None))
    return draft.build(lambda index: index["scaled"]["w"].pop("scales"))


@vector("invalid", "an integer of a description is not in its shortest form", "canonical")
def scaled_long_integer() -> bytes:
    draft = Draft.of(with_scaled([2, 8], None))
    draft.spell["scaled", "w"] = lambda entry: entry.replace(b"\xa5block\x92\x02", b"\xa5block\x92\xcc\x02")
    return draft.build()


@vector("invalid", "a scaled tensor's name has no byte", "1 to 1024 bytes")
def scaled_nameless() -> bytes:
    draft = Draft.of(with_scaled([2, 8], None))
    draft.index["scaled"] = {"": draft.index["scaled"]["w"]}
    return draft.build()
