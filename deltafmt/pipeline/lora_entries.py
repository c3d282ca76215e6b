"""The entries of a delta under the names of its base: an adapter names the base's modules, not the fine-tune's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.heads import Head
from deltafmt.errors import UsageError
from deltafmt.index.entries import TensorEntry


def entries_in_base(entries: Iterable[TensorEntry], where: str) -> dict[str, TensorEntry]:
    """Return the entries with the names that the base has for them, in natural order, by their names in the file.

    A tensor that is stored whole has no recorded base; it is renamed as most tensors are whose names begin alike.

    Args:
        entries: the entries of a delta file.
        where: the file's name, for messages.

    Raises:
        UsageError: a changed tensor's base is made of several tensors, or is a piece of one.
    """
    found = list(entries)
    uses = Counter(part.name for entry in found if entry.base is not None for part in entry.base.parts)
    heads: Counter[Head] = Counter()
    names: dict[str, str] = {}
    for entry in found:
        parts = entry.base.parts if entry.base is not None else ()
        if not parts:
            continue
        if len(parts) > 1 or parts[0].start or uses[parts[0].name] > 1:
            if entry.action == "add":
                text = f'tensor "{entry.name}" has another layout than the base, which keeps it in "{parts[0].name}"'
                raise UsageError(f"{where}: {text}; an adapter cannot say that")
            continue
        names[entry.name] = parts[0].name
        heads[_head(entry.name, parts[0].name)] += 1
    common = [head for head, _ in heads.most_common()]
    for entry in found:
        if entry.name not in names and entry.base is None:
            targets = (head.apply(entry.name) for head in common)
            names[entry.name] = next((target for target in targets if target is not None), entry.name)
    renamed = {entry.name: replace(entry, name=names.get(entry.name, entry.name)) for entry in found}
    return dict(sorted(renamed.items(), key=lambda item: natural_key(item[1].name)))


def _head(own: str, base: str) -> Head:
    """Return the beginnings in which two names differ."""
    mine, theirs = own.split("."), base.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        mine.pop()
        theirs.pop()
    return Head(".".join(mine), ".".join(theirs))
