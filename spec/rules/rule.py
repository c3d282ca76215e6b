"""One rule of the specification, the vectors that isolate it, and the wrong reader that shows that they do."""

from __future__ import annotations

from dataclasses import dataclass

from mutation import Mutation, Patch, Skip

__all__ = ["RULES", "Patch", "Rule", "Skip", "rule"]


@dataclass(frozen=True)
class Rule:
    """A sentence of the specification that a reader must keep.

    Attributes:
        section: its number, such as ``5.4``.
        words: the words of the text that say it, as they stand there.
        vectors: the vectors that break it and nothing else; of a rule that says what a reader does with a right file,
            the good vectors that show it.
        without: a reader that does not know the rule: it accepts the bad vectors, and gives a wrong result for the good
            ones. Empty if no reader can go on where the rule is broken.
        others: vectors that break the rule, but that the wrong reader refuses nevertheless.
        reason: why no reader can go on, why no vector can break the rule, or why the wrong reader refuses the others.
    """

    section: str
    words: str
    vectors: tuple[str, ...]
    without: Mutation = ()
    others: tuple[str, ...] = ()
    reason: str = ""


RULES: list[Rule] = []


def rule(
    section: str, words: str, vectors: str = "", *without: Skip | Patch, others: str = "", reason: str = ""
) -> None:
    """Register a rule; vectors are names with spaces between them."""
    assert vectors or reason, (section, words)
    assert bool(without) == bool(vectors) or reason, (section, words)
    RULES.append(Rule(section, words, tuple(vectors.split()), without, tuple(others.split()), reason))
