"""Names that differ between two checkpoints, told in few words: ``model.* comes from language_model.model.*``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltafmt.checkpoint.spellings import numberless
from deltafmt.index.entries import TensorEntry

Pair = tuple[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class NameChange:
    """Some tensors of a fine-tune whose base has other names, or another layout.

    Attributes:
        name: the names in the fine-tune, with ``*`` for what varies.
        base: the names in the base, likewise; several if a tensor is made of several.
        tensors: number of tensors of the fine-tune.
    """

    name: str
    base: tuple[str, ...]
    tensors: int

    def __str__(self) -> str:
        tensors = f"{self.tensors:,} tensor{'' if self.tensors == 1 else 's'}"
        return f"{self.name} comes from {' and '.join(self.base)} of the base ({tensors})"

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return {"name": self.name, "base": list(self.base), "tensors": self.tensors}


def name_changes(pairs: Iterable[Pair]) -> list[NameChange]:
    """Return what differs, the change of most tensors first.

    Args:
        pairs: names of the fine-tune, each with the names of the base's tensors that it is made from.
    """
    counts: dict[tuple[str, tuple[str, ...]], int] = {}
    for name, bases in pairs:
        change = _change(name, bases)
        if change is not None:
            counts[change] = counts.get(change, 0) + 1
    found = [NameChange(name, bases, count) for (name, bases), count in counts.items()]
    return sorted(found, key=lambda change: -change.tensors)


def _change(name: str, bases: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    patterns = tuple(dict.fromkeys(map(numberless, bases)))
    if not bases or tuple(bases) == (name,):
        return None
    if len(bases) > 1 or len(patterns) > 1:
        return numberless(name), patterns
    mine, theirs = numberless(name).split("."), patterns[0].split(".")
    shared = 0
    while shared < min(len(mine), len(theirs)) and mine[-1 - shared] == theirs[-1 - shared]:
        shared += 1
    if not shared:
        return ".".join(mine), (".".join(theirs),)
    own, base = (".".join([*parts[: len(parts) - shared], "*"]) for parts in (mine, theirs))
    return own, (base,)


def entry_changes(entries: Iterable[TensorEntry]) -> list[NameChange]:
    """Return what the entries of a delta file say of names that differ."""
    with_base = (entry for entry in entries if entry.base is not None)
    return name_changes((entry.name, [part.name for part in entry.base.parts]) for entry in with_base if entry.base)
