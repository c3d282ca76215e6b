"""The served part of a progressive file: a delta file by itself at the beginning of another (specification, 17.7).

The whole file's index decides every byte of the index and the trailer that end the served part. So a verifier makes
them anew, and compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltafmt.container import canonical, frame
from deltafmt.container.content import content_id
from deltafmt.errors import InvalidFileError
from deltafmt.index.entries import TensorEntry

if TYPE_CHECKING:
    from deltafmt.container.reader import Container


@dataclass(frozen=True, slots=True)
class ServedPart:
    """The served part of a progressive file.

    Attributes:
        length: its bytes: those of the file from the beginning on that are a delta file by themselves.
        content_id: that of this delta file, computed from the whole file's index.
    """

    length: int
    content_id: bytes


def served_part(container: Container, entries: Iterable[TensorEntry]) -> ServedPart | None:
    """Return what the served part of a file is, or None if the file has none.

    Args:
        container: the file.
        entries: all of its entries.
    """
    if container.served is None:
        return None
    section = container.sections[container.served]
    about = container.removed, container.attachments, container.metadata, container.scaled_key()
    parts = map(without_exact, entries)
    return ServedPart(section.offset + section.length, content_id(parts, *about, parent=container.parent))


def without_exact(entry: TensorEntry) -> TensorEntry:
    """Return an entry as the served part has it."""
    return entry if entry.exact is None else replace(entry, exact=None)


def check_served(container: Container, entries: Iterable[TensorEntry]) -> ServedPart | None:
    """Return the served part of a progressive file, after checking that it is the one that the index describes.

    Args:
        container: the file.
        entries: all of its entries.

    Raises:
        InvalidFileError: it is another one.
    """
    number, found = container.served, list(entries)
    served = served_part(container, found)
    if served is None or number is None:
        return None
    obj: dict[str, Any] = dict(container.index_obj())
    obj.pop("files", None)
    obj["sections"] = obj["sections"][:number]
    exact = {entry.name: entry for entry in found if entry.exact is not None}
    obj["tensors"] = {
        name: canonical.encode(without_exact(exact[name]).to_obj()) if name in exact else data
        for name, data in obj["tensors"].items()
    }
    section, index = container.sections[number], canonical.encode_ordered(obj)
    ending = index + frame.encode_trailer(container.header, index, section.offset, served.content_id)
    if container.section_bytes(number) != ending:
        raise InvalidFileError(f"section {number}: it does not end the served part of this file")
    return served
