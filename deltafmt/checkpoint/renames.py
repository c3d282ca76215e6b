"""Rules with which a user says what a tensor is called on the other side: ``--rename FROM=TO``, ``--strip-prefix``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from deltafmt.errors import UsageError
from deltafmt.format.choices import check_list


@dataclass(frozen=True, slots=True)
class Rename:
    """One rule.

    Attributes:
        source: how names begin, such as ``model.``; or, with a ``*`` in it, what a whole name looks like.
        target: what stands in its place. Each ``*`` of it stands for what the same ``*`` of ``source`` stood for.
    """

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the rule that a text such as ``model.*=language_model.model.*`` or ``model.=`` says.

        Raises:
            UsageError: the text is not a rule.
        """
        source, equals, target = text.partition("=")
        if not equals or "=" in target:
            raise UsageError(f"rename {text!r} is not of the form FROM=TO")
        if source.count("*") != target.count("*"):
            raise UsageError(f"rename {text!r} has another number of * on its two sides")
        return cls(source, target)

    def __str__(self) -> str:
        return f"{self.source}={self.target}"

    def apply(self, name: str) -> str | None:
        """Return the new name, or None if the rule does not match."""
        if "*" not in self.source:
            return self.target + name[len(self.source) :] if name.startswith(self.source) else None
        first, *middle, last = self.source.split("*")
        position, end = len(first), len(name) - len(last)
        if not name.startswith(first) or not name.endswith(last):
            return None
        held = []
        for piece in middle:  # every * but the last ends where the next piece first stands
            place = name.find(piece, position, end)
            if place < 0:
                return None
            held.append(name[position:place])
            position = place + len(piece)
        if position > end:
            return None
        held.append(name[position:end])
        start, *rest = self.target.split("*")
        return start + "".join(text + piece for text, piece in zip(held, rest, strict=True))


@dataclass(frozen=True, slots=True)
class Renames:
    """All rules of a call.

    Attributes:
        rules: from names of the fine-tune to names of the base; the first one that matches a name decides.
        prefixes: beginnings that names lose, on both sides, before the rules are applied.
    """

    rules: tuple[Rename, ...] = ()
    prefixes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, rename: Sequence[str] = (), strip_prefix: Sequence[str] = ()) -> Self:
        """Return the rules that texts say.

        Raises:
            UsageError: a text is not a rule.
        """
        check_list("rename", rename)
        check_list("strip_prefix", strip_prefix)
        if "" in strip_prefix:
            raise UsageError("strip_prefix '' strips nothing")
        return cls(tuple(map(Rename.parse, rename)), tuple(strip_prefix))

    def __bool__(self) -> bool:
        return bool(self.rules or self.prefixes)

    def strip(self, name: str) -> str:
        """Return a name of either side without the first of the prefixes that it begins with."""
        for prefix in self.prefixes:
            if name.startswith(prefix) and name != prefix:
                return name[len(prefix) :]
        return name

    def stripped(self, names: Iterable[str]) -> dict[str, str]:
        """Return the names of the base by what is left of them.

        Raises:
            UsageError: of two names the same is left.
        """
        found: dict[str, str] = {}
        for name in names:
            other = found.setdefault(self.strip(name), name)
            if other != name:
                raise UsageError(f'stripping a prefix makes one name of "{other}" and "{name}" of the base')
        return found

    def apply(self, name: str) -> str:
        """Return the name that a tensor of the fine-tune has in the base, where both sides are stripped."""
        stripped = self.strip(name)
        for rule in self.rules:
            found = rule.apply(stripped)
            if found is not None:
                return found
        return stripped

    def unused(self, names: Sequence[str]) -> str | None:
        """Return the first rule that matches none of the names, or None."""
        stripped = [self.strip(name) for name in names]
        for rule in self.rules:
            if all(rule.apply(name) is None for name in stripped):
                return str(rule)
        return None
