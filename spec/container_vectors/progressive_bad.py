"""Vectors of progressive files (sections 17.7 and 17.8) that a reader must refuse."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from blake3 import blake3
from draft import Draft, header
from vector_tools import change, small, vector

from container_vectors.exact import Made
from container_vectors.progressive import FEATURES, one_part
from deltafmt.format.constants import SECTION_KIND_ATTACHMENTS
from deltafmt.index.entries import TensorEntry
from deltafmt.index.sections import Attachment

GOOD = one_part().data


def part(**keys: Any) -> bytes:
    """Return a file with an edit of what the entry has under ``exact``."""
    return change(GOOD, lambda index: index["tensors"]["seeded"]["exact"].update(keys))


def without_factors() -> bytes:
    """Return a file whose exact part has no factors."""
    return change(GOOD, lambda index: index["tensors"]["seeded"]["exact"].pop("factors"))


def with_features(features: int) -> bytes:
    """Return a file whose header has other features."""
    draft = Draft.of(GOOD)
    draft.header = header(incompatible=features)
    return draft.build()


def end_changed(edit: Callable[[bytearray], object]) -> bytes:
    """Return a file in which the end of the served part has other bytes."""
    draft = Draft.of(GOOD)
    draft.serves = False
    edit(draft.raw[2])
    return draft.build()


def end_compressed() -> bytes:
    """Return a file in which the end of the served part is compressed."""
    draft = Draft.of(GOOD)
    draft.serves = False
    draft.index["sections"][2]["codec"] = 1
    return draft.build()


def of_kinds(*kinds: int) -> bytes:
    """Return a file with sections of these kinds: tensors, attachments, exact tensors and ends of served parts."""
    made = Made(FEATURES)
    attachments: dict[str, Attachment] = {}
    for number, kind in enumerate(kinds):
        name, data = f"x{number}", bytes([number] * 4)
        if kind == 1:
            ref = made.writer.add(data)
            made.entries.append(TensorEntry(name, "replace", "U8", (4,), digest=blake3(data).digest(), data=ref))
        elif kind == SECTION_KIND_ATTACHMENTS:
            attachments[name] = made.writer.attach(data)
        elif kind == 3:
            made.exact(name, struct.pack("<QII", 0, 0, 0), np.zeros(4, np.uint8), "U8", (4,), None)
        else:
            made.writer.serve(made.entries, attachments=attachments)
    return Draft.of(made.finish(attachments=attachments)).build()


def not_served() -> bytes:
    """Return a file whose tensor has an exact part, and that is not progressive."""
    draft = Draft.of(small())
    draft.header = header(incompatible=8)
    draft.entry["exact"] = {"chunk": 256, "data": [1, 0, 16], "digest": bytes(32), "factors": [0]}
    draft.index["tensors"]["w"] = dict(sorted(draft.entry.items()))
    draft.index["sections"].append({**draft.index["sections"][0], "kind": 3})
    draft.raw.append(bytearray(16))
    return draft.build()


BAD: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "progressive_without_feature": (
        "a served part ends, and the header lacks feature 4",
        "bit 4",
        lambda: with_features(8),
    ),
    "progressive_without_feature_3": (
        "exact parts, and the header lacks feature 3",
        "bit 3",
        lambda: with_features(16),
    ),
    "progressive_end_compressed": ("the end of a served part has codec 1", "stored as they are", end_compressed),
    "progressive_tensors_behind": (
        "a section of kind 1 lies behind the served part",
        "lies behind the served part",
        lambda: of_kinds(4, 1),
    ),
    "progressive_attachment_behind": (
        "an attachment lies behind the served part",
        "lies behind the served part",
        lambda: of_kinds(1, 4, 2),
    ),
    "progressive_exact_before": (
        "a section of kind 3 lies before that of kind 4",
        "behind exact tensors",
        lambda: of_kinds(3, 4),
    ),
    "progressive_twice": ("two sections have kind 4", "ends behind another one", lambda: of_kinds(1, 4, 4)),
    "progressive_exact_tensor": (
        "a progressive file has an exact tensor",
        "which nobody can serve",
        lambda: of_kinds(1, 4, 3),
    ),
    "progressive_no_served_part": ("an exact part in a file that is not progressive", "no served part", not_served),
    "progressive_without_factors": ("an exact part has no factors", "expected the keys", without_factors),
    "progressive_factors_too_many": ("two factors, and one term", "a list of 1", lambda: part(factors=[0, 0])),
    "progressive_factor_nan": (
        "a factor is not a number",
        "no finite float32",
        lambda: part(factors=[0x7FC00000]),
    ),
    "progressive_factor_infinite": (
        "a factor is minus infinity",
        "no finite float32",
        lambda: part(factors=[0xFF800000]),
    ),
    "progressive_factor_of_33_bits": ("a factor has 33 bits", "is not an integer", lambda: part(factors=[1 << 32])),
    "progressive_other_content_id": (
        "the end of the served part has another content id",
        "does not end the served part",
        lambda: end_changed(lambda end: end.__setitem__(len(end) - 100, end[-100] ^ 1)),
    ),
    "progressive_other_index": (
        "the end of the served part has another index",
        "does not end the served part",
        lambda: end_changed(lambda end: end.__setitem__(20, end[20] ^ 1)),
    ),
    "progressive_short_end": (
        "the end of the served part lacks its last byte",
        "does not end the served part",
        lambda: end_changed(lambda end: end.pop()),
    ),
}

for _name, (_comment, _error, _make) in BAD.items():
    vector("invalid", _comment, _error, _name.replace("_", "-"))(_make)
