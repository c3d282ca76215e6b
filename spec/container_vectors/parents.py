"""Vectors of files with a parent (section 18)."""

from __future__ import annotations

from typing import Any

from draft import Draft, header
from vector_tools import Stored, WithBase, based, one_tensor, vector

from deltafmt.format.constants import FEATURE_PARENT
from deltafmt.terms.nm.layout import NMLayout

PARENT = bytes(range(32))


def with_parent(parent: Any = PARENT, features: int = FEATURE_PARENT) -> Draft:
    """Return a file with a parent, taken apart."""
    draft = Draft.of(one_tensor(NMLayout(1, 4, 4), 4, 8))
    draft.header = header(incompatible=features)
    draft.index["parent"] = parent
    draft.index = dict(sorted(draft.index.items()))
    return draft


def before(salt: int) -> dict[str, Stored]:
    """Return tensors that a parent, or a base, may give."""
    return {"w": ("BF16", (4, 8), bytes((salt + 37 * i) % 128 for i in range(64)))}


@vector("ok", "a file with a parent: the base is what the parent gives, and the content id names the parent")
def parent() -> WithBase:
    return based(with_parent().build(), before(3))


@vector(
    "ok", "the base of a file with a parent is another one, such as that of its parent: whoever applies it refuses it"
)
def parent_of_another_base() -> WithBase:
    right = based(with_parent().build(), before(3))
    return WithBase(right.data, before(4), refused=True)


@vector("invalid", "the file has a parent, and the header does not say so", "bit 5")
def parent_without_feature() -> bytes:
    return with_parent(features=0).build()


@vector("invalid", "the content id of the parent has 31 bytes", "parent")
def parent_short() -> bytes:
    return with_parent(PARENT[:31]).build()


@vector("invalid", "the content id of the parent is text", "parent")
def parent_text() -> bytes:
    return with_parent("0" * 32).build()


@vector("invalid", "the content id is that of the same file without its parent", "the content id is not")
def parent_not_in_content_id() -> bytes:
    draft = with_parent()
    without = Draft.of(draft.build())
    del without.index["parent"]
    return draft.build(content_id=without.content_id())
