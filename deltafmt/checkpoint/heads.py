"""Beginnings of names that differ between two checkpoints, found from the names themselves.

For example, one side says ``model.language_model.layers.0.mlp.up_proj.weight`` and the other
``model.layers.0.mlp.up_proj.weight``: where one has ``model.language_model``, the other has ``model``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from deltafmt.checkpoint.spellings import is_layered

# The parts that two names must share at their ends before their beginnings count.
_SHARED_PARTS: Final = 2
# An ending that so many names of the base have tells nothing.
_MOST_ALIKE: Final = 8
# Pairs of beginnings that are tried.
_MOST_PAIRS: Final = 256


@dataclass(frozen=True, slots=True)
class Head:
    """A beginning of names, and what stands in its place in the base; either may be empty."""

    own: str
    base: str

    def apply(self, name: str) -> str | None:
        """Return the name in the base, or None if the name does not begin so."""
        if self.own and not name.startswith(f"{self.own}."):
            return None
        rest = name[len(self.own) + 1 :] if self.own else name
        return f"{self.base}.{rest}" if self.base else rest


@dataclass(slots=True)
class HeadMatch:
    """What beginnings explain.

    Attributes:
        names: the name in the base by the name of the fine-tune.
        heads: the beginnings, the one with most tensors first.
        ambiguous: beginnings of the base that would do equally well, in groups.
    """

    names: dict[str, str] = field(default_factory=dict)
    heads: list[Head] = field(default_factory=list)
    ambiguous: list[tuple[Head, ...]] = field(default_factory=list)


def match_heads(wanted: Iterable[str], base: Iterable[str], fits: Callable[[str, str], bool]) -> HeadMatch:
    """Find the beginnings that lead from names of the fine-tune to names of the base.

    Args:
        wanted: names of the fine-tune.
        base: names of the base, none of which may be taken twice.
        fits: tells whether a tensor of the fine-tune (its name comes first) has a shape that goes with one of the base.
    """
    left, free = dict.fromkeys(wanted), dict.fromkeys(base)
    found = HeadMatch()
    votes = _votes(left, _endings(free), fits)
    by_own: dict[str, list[str]] = {}
    for head, _ in votes.most_common(_MOST_PAIRS):
        by_own.setdefault(head.own, []).append(head.base)
    for own, bases in by_own.items():
        explained = {other: _explained(Head(own, other), left, free, fits) for other in bases}
        explained = {other: names for other, names in explained.items() if _tells(Head(own, other), names)}
        most = max(map(len, explained.values()), default=0)
        best = [other for other, names in explained.items() if len(names) == most]
        if not most:
            continue
        if len(best) > 1:
            found.ambiguous.append(tuple(Head(own, other) for other in best))
            continue
        for name, target in explained[best[0]].items():
            found.names[name] = target
            del left[name], free[target]
        found.heads.append(Head(own, best[0]))
    return found


def _endings(names: Mapping[str, None]) -> dict[str, list[str]]:
    """Return the names that have each ending, by the ending."""
    endings: dict[str, list[str]] = {}
    for name in names:
        place = 0
        while True:
            endings.setdefault(name[place:], []).append(name)
            dot = name.find(".", place)
            if dot < 0:
                break
            place = dot + 1
    return endings


def _votes(
    wanted: Mapping[str, None], endings: Mapping[str, list[str]], fits: Callable[[str, str], bool]
) -> Counter[Head]:
    """Count the pairs of beginnings that stand before the longest ending that a name shares with some of the base."""
    votes: Counter[Head] = Counter()
    for name in wanted:
        parts = name.split(".")
        for skipped in range(max(len(parts) - _SHARED_PARTS + 1, 0)):
            ending = ".".join(parts[skipped:])
            alike = [other for other in endings.get(ending, ())[: _MOST_ALIKE + 1] if fits(name, other)]
            if alike and len(alike) <= _MOST_ALIKE:
                own = ".".join(parts[:skipped])
                votes.update(Head(own, other[: -len(ending)].rstrip(".")) for other in alike)
                break
    return votes


def _explained(
    head: Head, wanted: Mapping[str, None], base: Mapping[str, None], fits: Callable[[str, str], bool]
) -> dict[str, str]:
    targets = ((name, head.apply(name)) for name in wanted)
    return {name: other for name, other in targets if other is not None and other in base and fits(name, other)}


def _tells(head: Head, names: Mapping[str, str]) -> bool:
    """Tell whether a pair of beginnings means something: it holds for a layer, or one of the two is empty."""
    return not head.own or not head.base or any(map(is_layered, names))
