"""Vectors of tensor entries (section 7.4), but for those of action ``add`` and for parts."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from blake3 import blake3
from draft import Edit
from vector_tools import add_term, change, simple, small, stored, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.terms.nm.layout import NMLayout

FORM = {"dtype": "U8", "shape": [2]}


def entry_is(**changes: Any) -> Edit:
    """Return an edit of the entry of ``w``."""

    def edit(index: Any) -> None:
        index["tensors"]["w"] = dict(sorted({**index["tensors"]["w"], **changes}.items()))

    return edit


def others(entries: dict[str, Any]) -> bytes:
    """Return a small file with further entries."""

    def edit(index: Any) -> None:
        index["tensors"] = dict(sorted({**entries, **index["tensors"]}.items()))

    return change(small(), edit)


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


# Dtypes of the format, and the bits of an element.
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@vector("ok", "a tensor of every dtype replaces the base's; elements of 4 and of 6 bits are packed without gaps")
def every_dtype() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    entries = []
    for dtype, bits in DTYPES.items():
        data = bytes(i % 2 for i in range(12 * bits // 8))
        digest = blake3(data).digest()
        entries.append(TensorEntry(dtype, "replace", dtype, (3, 4), digest=digest, data=writer.add(data)))
    writer.finish(entries)
    return out.getvalue()


@vector("invalid", "an action that version 1 does not know", "unknown action")
def unknown_action() -> bytes:
    return change(stored({"w": b"xy"}), entry_is(action="put"))


@vector("invalid", "a dtype that version 1 does not know", "unknown dtype")
def unknown_dtype() -> bytes:
    return change(stored({"w": b"xy"}), entry_is(dtype="BYTE"))


@vector("invalid", "a dtype in lower case", "unknown dtype")
def lower_case_dtype() -> bytes:
    return change(stored({"w": b"xy"}), entry_is(dtype="u8"))


@vector("invalid", "a size is negative", "is not an integer from 0")
def negative_size() -> bytes:
    return change(stored({"w": b"xy"}), entry_is(shape=[-1, -2]))


@vector("invalid", "a tensor is the same as the base's, in another dtype", "has the base's dtype and shape")
def same_other_dtype() -> bytes:
    base = {"digest": bytes(32), "dtype": "I8", "shape": [2]}
    return others({"s": {"action": "same", "base": base, **FORM}})


@vector("invalid", "a tensor is the same as the base's, in another shape", "has the base's dtype and shape")
def same_other_shape() -> bytes:
    base = {"digest": bytes(32), "dtype": "U8", "shape": [2, 1]}
    return others({"s": {"action": "same", "base": base, **FORM}})


@vector("invalid", "a tensor of four bytes is replaced by three", "3 bytes where the shape needs 4")
def replace_short() -> bytes:
    return change(stored({"w": b"xyz"}), entry_is(shape=[4]))


@vector("invalid", "a tensor of four bytes is replaced by five", "5 bytes where the shape needs 4")
def replace_long() -> bytes:
    return change(stored({"w": b"vwxyz"}), entry_is(shape=[4]))


@vector("invalid", "an alias of an alias", "not a tensor of its own")
def alias_of_alias() -> bytes:
    tied = {"action": "alias", "dtype": "BF16", "shape": [4, 8]}
    return others({"a": {**tied, "target": "b"}, "b": {**tied, "target": "w"}})


@vector("invalid", "two aliases of each other", "not a tensor of its own")
def aliases_of_each_other() -> bytes:
    tied = {"action": "alias", "dtype": "BF16", "shape": [4, 8]}
    return others({"a": {**tied, "target": "b"}, "b": {**tied, "target": "a"}})


@vector("invalid", "an alias of itself", "is not the name of another tensor")
def alias_of_itself() -> bytes:
    return others({"a": {"action": "alias", "dtype": "BF16", "shape": [4, 8], "target": "a"}})


@vector("invalid", "an alias of a tensor that is not there", "not a tensor of its own")
def alias_of_nothing() -> bytes:
    return others({"a": {"action": "alias", "dtype": "BF16", "shape": [4, 8], "target": "v"}})


@vector("invalid", "an alias in another dtype of as many bits", "another dtype or shape")
def alias_other_dtype() -> bytes:
    return others({"a": {"action": "alias", "dtype": "F16", "shape": [4, 8], "target": "w"}})


@vector("invalid", "an alias in another shape of as many elements", "another dtype or shape")
def alias_other_shape() -> bytes:
    return others({"a": {"action": "alias", "dtype": "BF16", "shape": [8, 4], "target": "w"}})


@vector(
    "ok", "the file that most vectors start from: 40 rows of 50 columns, seeded 2:8, 4 bits, masks shared by 4 rows"
)
def simple_file() -> bytes:
    return simple()


def same(name: str, dtype: str = "U8", shape: tuple[int, ...] = (3,)) -> bytes:
    """Return a file with one tensor that is the base's."""
    out = io.BytesIO()
    ContainerWriter(out).finish([TensorEntry(name, "same", dtype, shape, BaseRef(bytes(32), dtype, shape))])
    return out.getvalue()


@vector("ok", "tensors whose names come close to that of the metadata of safetensors files")
def names_close_to_metadata() -> bytes:
    names = ("__metadata__/w", "x__metadata__", "__metadata__.")
    form = {"dtype": "U8", "shape": [3]}
    return others({name: {"action": "same", "base": {"digest": bytes(32), **form}, **form} for name in names})


@vector("invalid", "a tensor is called __metadata__", "keeps no tensor under this name")
def name_of_metadata() -> bytes:
    return same("__metadata__")


@vector("invalid", "a tensor is called unet/__metadata__", "keeps no tensor under this name")
def name_of_metadata_in_folder() -> bytes:
    return same("unet/__metadata__")


def replaced(dtype: str, shape: list[int], data: bytes) -> bytes:
    """Return a file with a tensor of a dtype and a shape."""
    return change(stored({"w": data}), entry_is(dtype=dtype, shape=shape))


@vector("ok", "a tensor of no 6-bit floats")
def no_bytes() -> bytes:
    return replaced("F6_E3M2", [0], b"")


@vector("invalid", "a tensor of three 4-bit floats, in two bytes", "does not take whole bytes")
def half_a_byte() -> bytes:
    return replaced("F4", [3], b"\x12\x03")


@vector("invalid", "a tensor of the base of six 6-bit floats", "does not take whole bytes")
def half_a_byte_of_base() -> bytes:
    return same("a", "F6_E2M3", (6,))


@vector("ok", "a layout that no term uses")
def layout_unused() -> bytes:
    def edit(index: Any) -> None:
        index["layouts"].append({**index["layouts"][0], "bits": 3})

    return change(small(), edit)
