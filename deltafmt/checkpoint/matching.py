"""Names of one side that are names of the other, told by spelling, beginnings, shapes and layouts; nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from deltafmt.checkpoint.heads import Head, match_heads
from deltafmt.checkpoint.layouts import Shapes, Slice, match_layouts
from deltafmt.checkpoint.spellings import is_layered, plain_name
from deltafmt.format.constants import element_count

# Gives, for names of both sides, the names that a model has in memory; see deltafmt.checkpoint.library_names.
Library = Callable[[Iterable[str]], Mapping[str, str]]


@dataclass(slots=True)
class Match:
    """What belongs together.

    Attributes:
        slices: what each name of the one side is on the other: slices of tensors, one for a tensor that is whole.
        left: the shapes of the names that are not matched.
        free: the shapes of the other side's names that nothing took.
        heads: beginnings that explain something.
        ambiguous: beginnings that do equally well, in groups.
        numbered: True if the models have numbered layers; every matrix of a model without any counts as a layer.
    """

    slices: dict[str, list[Slice]] = field(default_factory=dict)
    left: dict[str, tuple[int, ...]] = field(default_factory=dict)
    free: dict[str, tuple[int, ...]] = field(default_factory=dict)
    heads: list[Head] = field(default_factory=list)
    ambiguous: list[tuple[Head, ...]] = field(default_factory=list)
    numbered: bool = True

    @property
    def is_open(self) -> bool:
        """True if both sides still have layers."""
        return bool(layers(self.left, numbered=self.numbered)) and bool(layers(self.free, numbered=self.numbered))


def layers(shapes: Shapes, *, numbered: bool) -> list[str]:
    """Return the names of matrices that belong to a model's layers; all matrices if the layers have no numbers."""
    return [
        name
        for name, shape in shapes.items()
        if len(shape) >= 2 and element_count(shape) and (is_layered(name) or not numbered)
    ]


def fits(wanted: tuple[int, ...], base: tuple[int, ...], *, may_grow: bool) -> bool:
    """Tell whether shapes go together: equal, or equal but for the rows of a matrix that may grow."""
    if wanted == base:
        return True
    return may_grow and len(wanted) == len(base) == 2 and wanted[1:] == base[1:]


def match_shapes(
    left: Shapes,
    free: Shapes,
    own_name: Callable[[str], str] = str,
    base_name: Callable[[str], str] = str,
    library: Library | None = None,
    *,
    numbered: bool = True,
) -> Match:
    """Match names that are not equal.

    Args:
        left, free: the shapes of the two sides' tensors, by name.
        own_name, base_name: give the names to compare.
        library: gives names as they are in memory; called only if everything else leaves layers over on both sides.
        numbered: True if the models have numbered layers.
    """
    match = _match(Match(left=dict(left), free=dict(free), numbered=numbered), own_name, base_name, {})
    if match.is_open and library is not None:
        names = library({*map(own_name, left), *map(base_name, free)})
        fresh = Match(left=dict(left), free=dict(free), numbered=numbered)
        found = _match(fresh, own_name, base_name, names)
        return match if found.is_open else found
    return match


def _match(
    match: Match, own_name: Callable[[str], str], base_name: Callable[[str], str], spelled: Mapping[str, str]
) -> Match:
    def plain(name: str) -> str:
        return plain_name(spelled.get(name, name))

    own = {name: plain(own_name(name)) for name in match.left}
    base = {name: plain(base_name(name)) for name in match.free}
    _by_spelling(match, own, base)
    if match.left and match.free:
        _by_heads(match, own, base)
    if match.left and match.free:
        _by_layouts(match, own, base)
    return match


def unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a map of the keys that stand once."""
    found: dict[str, str] = {}
    twice = set()
    for key, value in pairs:
        if key in found:
            twice.add(key)
        found[key] = value
    return {key: value for key, value in found.items() if key not in twice}


def _spellings(match: Match, own: Mapping[str, str], base: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    return unique((own[name], name) for name in match.left), unique((base[name], name) for name in match.free)


def _fits(match: Match, name: str, other: str) -> bool:
    return fits(match.left[name], match.free[other], may_grow=not is_layered(name))


def _take(match: Match, name: str, other: str) -> None:
    match.slices[name] = [Slice(other, 0, element_count(match.free.pop(other)))]
    del match.left[name]


def _by_spelling(match: Match, own: Mapping[str, str], base: Mapping[str, str]) -> None:
    mine, theirs = _spellings(match, own, base)
    for spelled, name in mine.items():
        other = theirs.get(spelled)
        if other is not None and _fits(match, name, other):
            _take(match, name, other)


def _by_heads(match: Match, own: Mapping[str, str], base: Mapping[str, str]) -> None:
    mine, theirs = _spellings(match, own, base)
    found = match_heads(mine, theirs, lambda a, b: _fits(match, mine[a], theirs[b]))
    match.heads, match.ambiguous = found.heads, found.ambiguous
    for spelled, target in found.names.items():
        _take(match, mine[spelled], theirs[target])


def _by_layouts(match: Match, own: Mapping[str, str], base: Mapping[str, str]) -> None:
    mine, theirs = _spellings(match, own, base)
    free = {spelled: match.free[name] for spelled, name in theirs.items()}
    used: set[str] = set()
    for head in (Head("", ""), *match.heads):
        targets = {target: name for spelled, name in mine.items() if (target := head.apply(spelled)) is not None}
        wanted = {target: match.left[name] for target, name in targets.items() if name in match.left}
        for target, slices in match_layouts(wanted, free).items():
            name = targets[target]
            match.slices[name] = [Slice(theirs[part.name], part.start, part.count) for part in slices]
            used.update(part.name for part in match.slices[name])
            del match.left[name]
    for name in used:
        del match.free[name]
