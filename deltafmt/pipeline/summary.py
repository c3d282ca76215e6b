"""What is in a delta file and how many bytes each part takes, from the index alone: no section is read."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltafmt.checkpoint.name_changes import entry_changes
from deltafmt.checkpoint.weight_names import bounded
from deltafmt.container.reader import Container
from deltafmt.container.served import ServedPart, served_part
from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.read_as_values import dequantized


@dataclass(slots=True)
class Node:
    """A line of the tree of costs: a label, its bytes, a remark, and the parts that the bytes divide into."""

    label: str
    size: int
    note: str = ""
    children: list[Node] = field(default_factory=list)

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        obj: dict[str, Any] = {"label": self.label, "bytes": self.size}
        if self.note:
            obj["note"] = self.note
        if self.children:
            obj["children"] = [child.to_obj() for child in self.children]
        return obj


# The label of bytes that no term holds: tensors stored whole, and the rows that a fine-tune has added.
WHOLE = "stored whole"

# The short forms of layouts and methods, which files record and which therefore stay, as options are called.
_OPTIONS = {"k": "bits", "r": "rank", "v": "share"}


def plural(number: int, noun: str) -> str:
    """Return ``1 tensor``, ``2 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def times(ratio: float) -> str:
    """Return how a size compares with a larger or a smaller one: ``14.74 times smaller``, ``5.88 times larger``.

    Args:
        ratio: the other size over this one; 0 if nothing is there to be compared with.
    """
    if not ratio:
        return "larger"
    return f"{ratio:,.2f} times smaller" if ratio >= 1 else f"{1 / ratio:,.2f} times larger"


def left_out_line(names: Sequence[str]) -> str:
    """Return the line about tensors that the base has and the fine-tune has not."""
    return f"left out: {plural(len(names), 'tensor')} that only the base has: {bounded(names)}"


def finetuned_bytes(entries: Iterable[TensorEntry]) -> int:
    """Return the bytes of the fine-tuned tensors, with tied tensors counted once."""
    return sum(entry.nbytes for entry in entries if entry.action != "alias")


def spelled_out(text: str) -> str:
    """Return the short form of a layout or a method with the names of options: ``bits=4`` for ``k=4``."""
    return re.sub(r"(?<!\S)([krv])=", lambda found: f"{_OPTIONS[found[1]]}=", text)


def cost_tree(container: Container) -> Node:
    """Return the tree of costs. The root is the file, and the sizes of a node's children add up to the node's size."""
    groups: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for entry in container.entries():
        title = {"replace": "tensors stored whole", "exact": "exact tensors"}.get(entry.action, "deltas")
        group = groups.setdefault(title, {})
        for term in entry.terms:
            for name, ref in term.buffers.items():
                label = term.layout.counted_as[name]
                group[label] = group.get(label, 0) + ref.length
        if entry.data is not None:
            group[WHOLE] = group.get(WHOLE, 0) + entry.data.length
        if entry.exact is not None:
            # An exact part of a tensor with terms is counted apart from them.
            title = "exact parts" if entry.terms else title
            chunks = groups.setdefault(title, {})
            chunks["chunks"] = chunks.get("chunks", 0) + entry.exact.data.length
        if entry.exact is not None and entry.terms:
            counts[title] = counts.get(title, 0) + 1
        counts[entry.action] = counts.get(entry.action, 0) + 1
    tensors = [section for section in container.sections if section.kind == c.SECTION_KIND_TENSORS]
    raw = sum(section.raw_length for section in tensors)
    stored = sum(section.length for section in tensors)
    nodes = []
    for title, action in (
        ("deltas", "add"),
        ("exact tensors", "exact"),
        ("exact parts", "exact parts"),
        ("tensors stored whole", "replace"),
    ):
        parts = [Node(label, size) for label, size in groups.get(title, {}).items() if size]
        note = plural(counts.get(action, 0), "tensor")
        children = parts if action == "add" else []
        nodes.append(Node(title, sum(part.size for part in parts), note, children))
    if stored != raw:
        nodes.append(Node("zstd saves", stored - raw, plural(len(tensors), "section")))
    attached = [section for section in container.sections if section.kind == c.SECTION_KIND_ATTACHMENTS]
    if attached:
        names = ", ".join(container.attachments)
        names += ", heads of weight files" if container.files else ""
        nodes.append(Node("attachments", sum(section.length for section in attached), names.removeprefix(", ")))
    if container.served is not None:
        nodes.append(Node("end of the served part", container.sections[container.served].length))
    nodes.append(Node("index", container.index_length, plural(len(container.keys()), "tensor")))
    nodes.append(Node("header and trailer", c.HEADER_SIZE + c.TRAILER_SIZE))
    nodes.append(Node("alignment", container.size - sum(node.size for node in nodes)))
    return Node("file", container.size, "", [node for node in nodes if node.size])


def overhead(container: Container) -> int:
    """Return the bytes that belong to no tensor's buffer: attachments, the index, alignment and the like."""
    payload = sum(ref.length for entry in container.entries() for _, ref in entry.refs())
    return container.size - payload


def describe_entry(entry: TensorEntry) -> str:
    """Return how a tensor is made from its base, in a few words, such as ``same as the base``."""
    if entry.action == "alias":
        return f"alias of {entry.target}"
    if entry.terms:
        grown = f" + {entry.rows - entry.delta_rows} new rows" if entry.data is not None else ""
        terms = itertools.groupby(f"{term.layout.kind} {spelled_out(term.layout.describe())}" for term in entry.terms)
        counted = ((text, len(list(same))) for text, same in terms)
        exact = ", and exact" if entry.exact is not None else ""
        return " + ".join(text if count == 1 else f"{count} of {text}" for text, count in counted) + grown + exact
    exact = "exact" if entry.base is not None else "exact, without the base"
    return {"same": "same as the base", "replace": WHOLE, "exact": exact}[entry.action]


def entry_obj(container: Container, entry: TensorEntry) -> dict[str, Any]:
    """Return everything about a tensor as a plain object; ``file_offset`` is a stored buffer's place in the file."""
    obj: dict[str, Any] = {
        "action": entry.action,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "bytes": entry.nbytes,
        "stored_bytes": sum(ref.length for _, ref in entry.refs()),
    }
    if entry.base is not None:
        obj["base"] = {
            "digest": entry.base.digest.hex(),
            "dtype": entry.base.dtype,
            "shape": list(entry.base.shape),
        }
        if entry.base.parts:
            obj["base"]["parts"] = [part._asdict() for part in entry.base.parts]
    if entry.exact is not None:
        obj["exact_digest" if entry.terms else "digest"] = entry.exact.digest.hex()
        obj["chunk"] = entry.exact.chunk
        if entry.terms:
            obj["factors"] = list(
                struct.unpack(f"<{len(entry.terms)}f", struct.pack(f"<{len(entry.terms)}I", *entry.exact.factors))
            )
    if entry.digest is not None:
        obj["digest"] = entry.digest.hex()
    if entry.target is not None:
        obj["target"] = entry.target
    if entry.terms:
        obj["rows"], obj["columns"] = entry.delta_rows, entry.columns
        obj["terms"] = [{**term.layout.to_obj(), **term.numbers()} for term in entry.terms]
    buffers = {}
    for name, ref in entry.refs():
        section = container.sections[ref.section]
        buffers[name] = {"section": ref.section, "offset": ref.offset, "length": ref.length}
        if section.codec == c.CODEC_STORED:
            buffers[name]["file_offset"] = section.offset + ref.offset
    if buffers:
        obj["buffers"] = buffers
    return obj


def served_obj(served: ServedPart | None) -> dict[str, Any] | None:
    """Return the served part of a progressive file as a plain object; None for other files."""
    return None if served is None else {"bytes": served.length, "content_id": served.content_id.hex()}


def served_line(served: ServedPart) -> str:
    """Return the line about the served part of a progressive file."""
    return f"served from its first {served.length:,} bytes, content id {served.content_id.hex()}"


def summary_obj(container: Container) -> dict[str, Any]:
    """Return everything about a file as a plain object."""
    entries = list(container.entries())
    total = finetuned_bytes(entries)
    return {
        "file": container.name,
        "bytes": container.size,
        "content_id": container.content_id.hex(),
        **({} if container.parent is None else {"parent": container.parent.hex()}),
        "profile": container.profile,
        "metadata": dict(container.metadata),
        "finetuned_bytes": total,
        "ratio": round(total / container.size, 4),
        "overhead_bytes": overhead(container),
        "tree": cost_tree(container).to_obj(),
        "sections": [{**section.to_obj(), "checksum": section.checksum.hex()} for section in container.sections],
        "attachments": {name: item.data.length for name, item in container.attachments.items()},
        "restored_files": {name: file.digest.hex() for name, file in container.files.items()},
        "served": served_obj(served_part(container, entries)),
        "removed": list(container.removed),
        "names": [change.to_obj() for change in entry_changes(entries)],
        "dequantized": dequantized(container.scaled(), container.metadata).to_obj(),
        "tensors": {entry.name: entry_obj(container, entry) for entry in entries},
    }
