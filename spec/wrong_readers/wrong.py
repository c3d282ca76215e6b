"""One wrong reader."""

from __future__ import annotations

from dataclasses import dataclass

from mutation import Constant, Mutation, Patch, Skip

__all__ = ["WRONG", "Constant", "Patch", "Skip", "Wrong", "patched", "wrong"]


@dataclass(frozen=True)
class Wrong:
    """A wrong reader.

    Attributes:
        what: what it does, in a few words.
        by: a vector that catches it.
        mutation: how this package's reader becomes it.
    """

    what: str
    by: str
    mutation: Mutation


WRONG: list[Wrong] = []


def wrong(what: str, by: str, *mutation: Skip | Patch | Constant) -> None:
    """Register a wrong reader."""
    WRONG.append(Wrong(what, by, mutation))


def patched(module: str, *cases: tuple[str, str, str, str]) -> None:
    """Register wrong readers of which each has one piece of a module's source replaced: what, by, old, new."""
    for what, by, old, new in cases:
        wrong(what, by, Patch(module, old, new))
