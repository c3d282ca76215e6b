"""The tensor of the base that each tensor of a fine-tune belongs to, where names or layouts differ.

Equal names belong together. Where both sides have layers left, their names are compared in plain spelling, then by
their beginnings, then as joined tensors and members, and at last in the names that transformers uses in memory. What is
found so counts only if it leaves no layer over on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deltafmt.checkpoint.heads import Head, match_heads
from deltafmt.checkpoint.layouts import Slice, match_layouts
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.spellings import is_layered, plain_name
from deltafmt.checkpoint.stitched import Run, stitch
from deltafmt.format.constants import element_count


class Shaped(Protocol):
    """Whatever has a shape: a tensor of a checkpoint, an entry of a delta file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""


# Gives, for the names of both sides, the names that a model has in memory; see deltafmt.checkpoint.library_names.
Library = Callable[[Iterable[str]], Mapping[str, str]]


@dataclass(slots=True)
class Correspondence:
    """What belongs together.

    Attributes:
        tensors: the base's tensor by the name of the fine-tune's; a tensor without a counterpart is missing.
        found: names among them that were not found by equal names or by the user's rules.
        left: names of the fine-tune's layers that have no counterpart although the base has layers left.
        free: names of the base's layers that nothing took, if ``left`` is not empty.
        heads: beginnings that explain something; where the match is not used, they are what a user may say.
        ambiguous: beginnings that do equally well, in groups.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    heads: list[Head] = field(default_factory=list)
    ambiguous: list[tuple[Head, ...]] = field(default_factory=list)


def fits(wanted: tuple[int, ...], base: tuple[int, ...], *, may_grow: bool) -> bool:
    """Tell whether shapes go together: equal, or equal but for the rows of a matrix that may grow."""
    if wanted == base:
        return True
    return may_grow and len(wanted) == len(base) == 2 and wanted[1:] == base[1:]


def correspond(
    wanted: Mapping[str, Shaped],
    base: Mapping[str, Tensor],
    renames: Renames | None = None,
    library: Library | None = None,
) -> Correspondence:
    """Find the base's tensor of every tensor of a fine-tune.

    Args:
        wanted: the fine-tune's tensors by name.
        base: the base's tensors by name.
        renames: what the user says of the names.
        library: gives names as transformers has them in memory; called only where everything else leaves layers over.
    """
    rules = renames or Renames()
    stripped: dict[str, Tensor] = {}
    for name, tensor in base.items():
        stripped.setdefault(rules.strip(name), tensor)
    by_name = {name: stripped[found] for name in wanted if (found := rules.apply(name)) in stripped}
    result = Correspondence(dict(by_name))
    taken = {tensor.name for tensor in by_name.values()}
    left = {name: tensor.shape for name, tensor in wanted.items() if name not in by_name}
    free = {name: tensor for name, tensor in base.items() if name not in taken}
    if not _layers(left) or not _layers({name: tensor.shape for name, tensor in free.items()}):
        _match_rest(left, free, rules, result)
        return result
    matcher = _Matcher(left, free, rules)
    matcher.run()
    if matcher.is_open and library is not None:
        renamed = _Matcher(left, free, rules, library({*map(rules.apply, left), *map(rules.strip, free)}))
        renamed.run()
        if not renamed.is_open:
            matcher = renamed
    result.heads, result.ambiguous = matcher.heads, matcher.ambiguous
    if matcher.is_open:
        result.left, result.free = _layers(matcher.left), _layers(matcher.free_shapes())
        return result
    result.tensors.update(matcher.tensors)
    result.found = list(matcher.tensors)
    return result


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of matrices that belong to a model's layers."""
    return [name for name, shape in shapes.items() if len(shape) >= 2 and element_count(shape) and is_layered(name)]


def _match_rest(
    left: Mapping[str, tuple[int, ...]], free: Mapping[str, Tensor], rules: Renames, result: Correspondence
) -> None:
    """Match what is left outside the layers by plain spelling alone; a head of another name is another head."""
    names = _unique((plain_name(rules.strip(name)), name) for name in free)
    for name, shape in left.items():
        other = names.get(plain_name(rules.apply(name)))
        if other is not None and fits(shape, free[other].shape, may_grow=True):
            result.tensors[name] = free[other]
            result.found.append(name)


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a map of the keys that stand once."""
    found: dict[str, str] = {}
    twice = set()
    for key, value in pairs:
        if key in found:
            twice.add(key)
        found[key] = value
    return {key: value for key, value in found.items() if key not in twice}


class _Matcher:
    """One attempt to match names that are not equal."""

    def __init__(
        self,
        left: Mapping[str, tuple[int, ...]],
        free: Mapping[str, Tensor],
        rules: Renames,
        spelled: Mapping[str, str] | None = None,
    ) -> None:
        def spelling(name: str) -> str:
            return plain_name(name if spelled is None else spelled.get(name, name))

        self.left = dict(left)
        self._free = dict(free)
        self._own = {name: spelling(rules.apply(name)) for name in left}
        self._base = {name: spelling(rules.strip(name)) for name in free}
        self.tensors: dict[str, Tensor] = {}
        self.heads: list[Head] = []
        self.ambiguous: list[tuple[Head, ...]] = []

    @property
    def is_open(self) -> bool:
        """True if both sides still have layers."""
        return bool(_layers(self.left)) and bool(_layers(self.free_shapes()))

    def free_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the base's tensors that are not taken."""
        return {name: tensor.shape for name, tensor in self._free.items()}

    def run(self) -> None:
        """Match by spelling, by beginnings and by layouts."""
        self._by_spelling()
        self._by_heads()
        self._by_layouts()

    def _spellings(self) -> tuple[dict[str, str], dict[str, str]]:
        own = _unique((self._own[name], name) for name in self.left)
        return own, _unique((self._base[name], name) for name in self._free)

    def _take(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        del self.left[name]

    def _by_spelling(self) -> None:
        own, base = self._spellings()
        for spelled, name in own.items():
            other = base.get(spelled)
            if other is not None and self._fits(name, other):
                self._take(name, self._free.pop(other))

    def _by_heads(self) -> None:
        own, base = self._spellings()
        match = match_heads(own, base, lambda a, b: self._fits(own[a], base[b]))
        self.heads, self.ambiguous = match.heads, match.ambiguous
        for spelled, target in match.names.items():
            self._take(own[spelled], self._free.pop(base[target]))

    def _fits(self, name: str, other: str) -> bool:
        return fits(self.left[name], self._free[other].shape, may_grow=not is_layered(name))

    def _by_layouts(self) -> None:
        own, base = self._spellings()
        free = {spelled: self._free[name].shape for spelled, name in base.items()}
        for head in (Head("", ""), *self.heads):
            targets = {target: name for spelled, name in own.items() if (target := head.apply(spelled)) is not None}
            wanted = {target: self.left[name] for target, name in targets.items() if name in self.left}
            for target, slices in match_layouts(wanted, free).items():
                name = targets[target]
                tensor = self._stitched(name, [(self._free[base[part.name]], part) for part in slices])
                if tensor is not None:
                    self._take(name, tensor)
        for name in {run for tensor in self.tensors.values() for run in (part.name for part in tensor.parts())}:
            self._free.pop(name, None)

    def _stitched(self, name: str, parts: list[tuple[Tensor, Slice]]) -> Tensor | None:
        if len({tensor.dtype for tensor, _ in parts}) > 1:
            return None
        return stitch(name, self.left[name], [Run(tensor, part.start, part.count) for tensor, part in parts])
