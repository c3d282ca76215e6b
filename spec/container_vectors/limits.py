"""Vectors of the limits (section 9)."""

from __future__ import annotations

import io
from typing import Any

from draft import Draft, header
from vector_tools import change, small, stored, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry


def same(shape: tuple[int, ...], dtype: str = "BF16") -> bytes:
    """Return a file with one tensor that is the base's; it has any number of elements and takes no bytes."""
    out = io.BytesIO()
    ContainerWriter(out).finish([TensorEntry("w", "same", dtype, shape, BaseRef(bytes(32), dtype, shape))])
    return out.getvalue()


@vector("ok", "a tensor of eight dimensions")
def eight_dimensions() -> bytes:
    return same((2, 1, 1, 3, 1, 1, 1, 2))


@vector("invalid", "a tensor of nine dimensions", "at most 8 sizes")
def nine_dimensions() -> bytes:
    return same((2, 1, 1, 3, 1, 1, 1, 2, 1))


@vector("ok", "a tensor of 2**48 elements, which is the most")
def most_elements() -> bytes:
    return same((1 << 20, 1 << 28))


@vector("invalid", "a tensor of 2**48 + 2**20 elements", "more than")
def too_many_elements() -> bytes:
    return same((1 << 20, (1 << 28) + 1))


@vector("invalid", "a size of 0 beside sizes beyond all bounds", "more than")
def endless_shape() -> bytes:
    return same((1 << 40, 1 << 40, 0))


@vector("invalid", "the sizes of a shape overflow 64 bits: their product is 0 modulo 2**64", "more than")
def overflowing_shape() -> bytes:
    return same((1 << 32, 1 << 32))


@vector("invalid", "a base of more than 2**48 elements, of which most are cut off", "more than")
def too_many_elements_in_base() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"]["base"]["shape"] = [1 << 46, 8]

    return change(small(), edit)


def with_part(part: Any) -> bytes:
    """Return a small file whose base has one part."""
    draft = Draft.of(small())
    draft.header = header(incompatible=1)
    draft.entry["base"] = dict(sorted({**draft.entry["base"], "parts": [part]}.items()))
    return draft.build()


NAMES = {"empty": ("no bytes", ""), "long": ("1025 bytes", "\u00e4" * 512 + "x")}


def _bad(kind: str, what: str, error: str = "a name has 1 to 1024 bytes") -> Any:
    """Register a file for each name that is too short or too long."""

    def register(make: Any) -> Any:
        for name, (length, value) in NAMES.items():
            vector("invalid", f"the name of {what} has {length}", error, f"{name}-name-{kind}")(
                lambda value=value: make(value)  # type: ignore[misc]
            )
        return make

    return register


@_bad("tensor", "a tensor")
def named_tensor(name: str) -> bytes:
    return stored({name: b"x"})


@_bad("removed", "a removed tensor")
def named_removed(name: str) -> bytes:
    return change(small(), lambda index: index.update(removed=[name]))


@_bad("part", "a part")
def named_part(name: str) -> bytes:
    return with_part([name, 0, 32])


@vector("ok", "names of 1024 bytes: of a tensor, of a removed tensor, of a part")
def longest_names() -> bytes:
    draft = Draft.of(with_part(["\u00e4" * 512, 0, 32]))
    entry = draft.entry
    draft.index["tensors"] = {"w" * 1024: entry}
    draft.index["removed"] = ["r" * 1024]
    return draft.build()
