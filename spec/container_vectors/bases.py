"""Vectors of bases made of parts (section 7.4) and of the names of weight files (7.7)."""

from __future__ import annotations

import io
from typing import Any

from draft import Draft, header
from vector_tools import WithBase, add_term, based, change, small, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry
from deltafmt.terms.nm.layout import NMLayout

from . import arithmetic


def with_parts(parts: Any, features: int = 1, dtype: str = "BF16") -> bytes:
    """Return a small file, whose tensor has 32 elements, with a base made of parts."""
    draft = Draft.of(small())
    draft.header = header(incompatible=features)
    draft.entry["base"] = dict(sorted({**draft.entry["base"], "dtype": dtype, "parts": parts}.items()))
    return draft.build()


@vector(
    "ok", "parts: a base of another name, one made of two tensors, and one that is a piece of a tensor; feature bit 0"
)
def base_parts() -> WithBase:
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
    base = arithmetic.plain("one", "BF16", 3, 8) | arithmetic.plain("two", "BF16", 24)
    base |= arithmetic.plain("old.norm", "F32", 4) | {"stack": ("I8", (4, 5), bytes(range(20)))}
    return based(out.getvalue(), base)


@vector("ok", "parts from the middle of tensors, in another order, one of them empty; a part of a tensor stands twice")
def parts_in_any_order() -> WithBase:
    parts = [["b", 3, 10], ["a", 0, 0], ["a", 1, 11], ["b", 3, 10], ["w", 31, 1]]
    base = arithmetic.plain("a", "BF16", 3, 4) | arithmetic.plain("b", "BF16", 13) | arithmetic.plain("w", "BF16", 32)
    return based(with_parts(parts), base)


@vector("invalid", "a base is made of parts, and the header does not say so", "bit 0")
def parts_without_feature() -> bytes:
    return with_parts([["v", 0, 32]], 0)


@vector("invalid", "the parts of a base have one element too few", "31 elements where the shape needs 32")
def parts_too_few() -> bytes:
    return with_parts([["v", 0, 16], ["u", 1, 15]])


@vector("invalid", "the parts of a base have one element too many", "33 elements where the shape needs 32")
def parts_too_many() -> bytes:
    return with_parts([["v", 0, 16], ["u", 1, 17]])


@vector("invalid", "the list of the parts of a base without elements is empty", "at least one part")
def parts_none() -> bytes:
    draft = Draft.of(small())
    base = {"digest": bytes(32), "dtype": "U8", "shape": [0]}
    draft.header = header(incompatible=1)
    draft.index["tensors"] = {
        "s": {"action": "same", "base": base, "dtype": "U8", "shape": [0]},
        "w": draft.entry,
    }

    def edit(index: Any) -> None:
        index["tensors"]["s"]["base"] = {"digest": bytes(32), "dtype": "U8", "parts": [], "shape": [0]}

    return draft.build(late=edit)


@vector("invalid", "a part starts before its tensor", "is not an integer from 0")
def parts_negative() -> bytes:
    return with_parts([["v", -1, 32]])


@vector("invalid", "a part has fewer than no elements, and another makes up for it", "is not an integer from 0")
def parts_negative_count() -> bytes:
    return with_parts([["v", 0, 33], ["u", 0, -1]])


@vector("invalid", "a part has a fourth member", "a name and two integers")
def part_of_four() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"]["base"]["parts"][0].append(0)

    return Draft.of(with_parts([["v", 0, 32]])).build(late=edit)


@vector("invalid", "parts of a tensor of 4-bit floats", "has no parts")
def parts_of_f4() -> bytes:
    base = {"digest": bytes(32), "dtype": "F4", "parts": [["v", 0, 4]], "shape": [4]}

    def edit(index: Any) -> None:
        index["tensors"] = {"s": {"action": "same", "base": base, "dtype": "F4", "shape": [4]}, **index["tensors"]}

    return change(small(), edit, header(incompatible=1))


@vector("ok", "a part ends behind its tensor: whoever applies the file refuses the base")
def part_beyond_its_tensor() -> WithBase:
    whole = arithmetic.plain("v", "BF16", 40)
    right = based(with_parts([["v", 8, 32]]), whole)
    dtype, _, data = whole["v"]
    return WithBase(right.data, {"v": (dtype, (39,), data[:-2])}, refused=True)


@vector("ok", "a part is of a tensor of another dtype: whoever applies the file refuses the base")
def part_of_other_dtype() -> WithBase:
    right = based(with_parts([["v", 0, 32]]), arithmetic.plain("v", "BF16", 32))
    return WithBase(right.data, {"v": ("F16", (32,), right.base["v"][2])}, refused=True)


def with_weights(metadata: dict[str, str]) -> bytes:
    """Return a small file that names weight files."""
    return change(small(), lambda index: index.update(metadata=metadata))


@vector("ok", "names of weight files, at the top and in two components; the key base_variant")
def weight_names() -> bytes:
    names = {"weights": "model.fp16.safetensors", "weights/a": "x.safetensors", "weights/a/b": "y.safetensors"}
    return with_weights({"base_variant": "fp16", **names, "weightsx": "/"})


BAD_NAMES = {
    "ending": ("does not end in .safetensors", "weights", "model.bin"),
    "ending-only": ("is .safetensors alone", "weights", ".safetensors"),
    "folder": ("lies in a folder", "weights", "a/model.safetensors"),
    "parent": ("of a component lies outside the folder", "weights/..", "model.safetensors"),
    "absolute": ("of a component is an absolute path", "weights/", "model.safetensors"),
    "device": ("is that of a device of Windows", "weights", "con.safetensors"),
    "hidden": ("of a component lies in a hidden folder", "weights/a/.b", "model.safetensors"),
    "control": ("has a control character", "weights", "a\nb.safetensors"),
    "case": ("ends in upper case", "weights", "MODEL.SAFETENSORS"),
}
for _name, (_what, _key, _value) in BAD_NAMES.items():
    vector("invalid", f"the name of a weight file {_what}", "not the name of a weight file", f"weights-{_name}")(
        lambda key=_key, value=_value: with_weights({key: value})  # type: ignore[misc]
    )


@vector("ok", "parts of no elements; a part that ends with the last element that a tensor can have")
def parts_at_the_ends() -> bytes:
    return with_parts([["huge", 2**48 - 32, 32], ["old", 7, 0], ["gone", 2**48, 0]])


@vector("invalid", "a part ends behind the last element that a tensor can have", "is not an integer from 0")
def parts_beyond() -> bytes:
    return with_parts([["huge", 2**48 - 31, 32]])
