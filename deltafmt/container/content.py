"""The content id: one digest of a file's meaning, however the file is stored (spec/deltafmt-v1.md, section 7.6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from blake3 import blake3

from deltafmt.container import canonical
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.scaled import ScaledRef
from deltafmt.index.sections import Attachment


def content_id(
    entries: Iterable[TensorEntry],
    removed: Iterable[str],
    attachments: Mapping[str, Attachment],
    metadata: Mapping[str, str],
    scaled: Mapping[str, ScaledRef] | None = None,
    files: Mapping[str, FileRef] | None = None,
    parent: bytes | None = None,
) -> bytes:
    """Return the BLAKE3 of the semantic index.

    The semantic index leaves out where and how the bytes are stored: profile, sections, buffers, and whether an index
    is ``rank`` or ``fixed``. Repacking a file from ``hot`` to ``cold`` therefore keeps its content id.
    """
    index = {
        "attachments": {name: attachments[name].digest for name in sorted(attachments)},
        **({"files": {name: files[name].digest for name in sorted(files)}} if files else {}),
        "metadata": {key: metadata[key] for key in sorted(metadata)},
        **({"parent": parent} if parent is not None else {}),
        "removed": list(removed),
        **({"scaled": {name: scaled[name].to_obj() for name in sorted(scaled)}} if scaled is not None else {}),
        "tensors": {entry.name: semantic_entry(entry) for entry in sorted(entries, key=attrgetter("name"))},
    }
    return blake3(canonical.encode_ordered(index)).digest()


def semantic_entry(entry: TensorEntry) -> dict[str, Any]:
    """Return an entry as a plain object with its keys sorted, without the places of its bytes."""
    obj = entry.to_obj()
    obj.pop("data", None)
    if entry.exact is not None:
        obj["exact"] = {"digest": entry.exact.digest}
    if entry.terms:
        obj["terms"] = [{"layout": term.layout.plain().to_obj(), **term.numbers()} for term in entry.terms]
    return obj
