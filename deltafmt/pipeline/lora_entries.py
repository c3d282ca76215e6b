"""The entries of a delta under the names of its base: an adapter names the base's modules, not the fine-tune's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.heads import Head
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.spellings import is_layered
from deltafmt.delta import DeltaFile
from deltafmt.errors import Remedy, UsageError
from deltafmt.format.constants import element_count
from deltafmt.index.entries import BasePart, TensorEntry
from deltafmt.pipeline.bases import BaseTensors


class EntriesInBase:
    """The entries of a delta, by the names that the base has for them.

    A tensor that is stored whole has no recorded base, and a head that was untied has that of the embedding. Both are
    renamed as most tensors are whose names begin alike.

    Args:
        delta: the delta.
        tensors: the base's tensors, which may have other names than those that the delta records; None without a base.

    Attributes:
        delta: the delta.
        entries: the entries, renamed, in natural order of their names in the base.

    Raises:
        UsageError: a changed tensor's base is made of several tensors, or is a piece of one; or the
            base has to be given to tell ties.
    """

    def __init__(self, delta: DeltaFile, tensors: BaseTensors | None) -> None:
        self.delta = delta
        self._tensors = tensors
        self._own = {entry.name: entry for entry in delta.container.entries()}
        names = self._names()
        found = [
            replace(entry, name=names[entry.name], target=None if entry.target is None else names[entry.target])
            for entry in self._own.values()
        ]
        self.entries = {entry.name: entry for entry in sorted(found, key=lambda entry: natural_key(entry.name))}
        self._named = {named: self._own[own] for own, named in names.items()}

    @property
    def name(self) -> str:
        """The delta's name in messages."""
        return self.delta.container.name

    @property
    def has_base(self) -> bool:
        """True if the base is given."""
        return self._tensors is not None

    def resolve(self, name: str) -> TensorEntry:
        """Return a tensor's entry by its name in the base; for an alias, the entry of its target."""
        entry = self.entries[name]
        return entry if entry.target is None else self.entries[entry.target]

    def base_tensor(self, entry: TensorEntry) -> Tensor:
        """Return the base tensor of a renamed entry that has one."""
        assert self._tensors is not None
        tensor = self._tensors.find(self._named[entry.name])
        assert tensor is not None
        return tensor

    def _parts(self, entry: TensorEntry) -> Sequence[BasePart]:
        """Return what an entry's base is made of: in the base that is given, or as the delta records it."""
        if entry.base is None:
            return ()
        tensor = None if self._tensors is None else self._tensors.find(entry)
        if tensor is not None:
            return tensor.parts()
        return entry.base.parts or (BasePart(entry.name, 0, element_count(entry.base.shape)),)

    def _names(self) -> dict[str, str]:
        """Return the names in the base, by the names in the file."""
        parts = {name: self._parts(entry) for name, entry in self._own.items()}
        split = {part.name for made_of in parts.values() for part in made_of if part.start}
        names: dict[str, str] = {}
        taken: set[str] = set()
        heads: Counter[Head] = Counter()
        # Of several tensors that one tensor of the base is the base of, that one has its name whose own is most alike.
        for name in sorted(self._own, key=lambda name: (-_shared(name, parts[name]), name.count("."))):
            made_of = parts[name]
            if not made_of:
                continue
            first = made_of[0]
            if len(made_of) > 1 or first.name in split or not self._is_whole(first):
                if self._own[name].action == "add":
                    text = f'tensor "{name}" has another layout than the base, which keeps it in "{first.name}"'
                    raise UsageError(f"{self.name}: {text}; an adapter cannot say that")
            elif first.name not in taken:
                names[name] = first.name
                taken.add(first.name)
                heads[_head(name, first.name)] += 1
            elif is_layered(name):
                text = f'tensor "{name}" is a second one whose base is "{first.name}"'
                raise UsageError(f"{self.name}: {text}; an adapter has no place for it, use unpack")
            elif not self.has_base and self._own[name].action == "add":
                text = f'tensor "{name}" is a delta of "{first.name}", and only the base\'s config.json tells if its'
                raise UsageError(f"{self.name}: {text} model ties them", Remedy("base", None))
        common = [head for head, _ in heads.most_common()]
        for name in self._own:
            if name not in names:
                targets = (*(head.apply(name) for head in common), name)
                found = next((target for target in targets if target is not None and target not in taken), None)
                if found is None:
                    raise UsageError(f'{self.name}: tensor "{name}" has the name of another in the base; use unpack')
                names[name] = found
                taken.add(found)
        return names

    def _is_whole(self, part: BasePart) -> bool:
        """Tell whether a part is all of a tensor of the base, as far as the base is there."""
        base = {} if self._tensors is None else self._tensors.checkpoint.tensors
        return part.name not in base or element_count(base[part.name].shape) == part.elements


def _shared(name: str, made_of: Sequence[BasePart]) -> int:
    """Return how many parts a name and that of its base have in common at their ends."""
    if len(made_of) != 1:
        return 0
    pairs = zip(reversed(name.split(".")), reversed(made_of[0].name.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _head(own: str, base: str) -> Head:
    """Return the beginnings in which two names differ."""
    mine, theirs = own.split("."), base.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        mine.pop()
        theirs.pop()
    return Head(".".join(mine), ".".join(theirs))
