"""The base tensor that a name of an adapter means: an adapter names modules in memory, a base tensors of files."""

from __future__ import annotations

from collections.abc import Iterable

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.heads import match_heads
from deltafmt.checkpoint.library_names import library_names
from deltafmt.checkpoint.matching import unique
from deltafmt.checkpoint.name_changes import NameChange, name_changes
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.spellings import plain_name


class LoraNames:
    """The base's tensors by the names of an adapter.

    Args:
        base: the base.
        names: every name that the adapter has, without the beginning that PEFT gives to all of them.
        renames: what the user says of the names.
    """

    def __init__(self, base: Checkpoint, names: Iterable[str], renames: Renames) -> None:
        self._rules = renames
        self._names = renames.stripped(base.tensors)
        self._inner = unique((found.partition(".")[2], own) for found, own in self._names.items())
        asked = list(names)
        self._matched: dict[str, str] = {}
        missing = [name for name in asked if self._near(name) is None]
        if missing:
            self._match(missing, {})
        missing = [name for name in missing if name not in self._matched]
        if missing:
            # The base's names are the files', the adapter's those in memory: only the base's are renamed.
            self._match(missing, dict(library_names((base,), self._names)))

    def changes(self) -> list[NameChange]:
        """Return what differs in names, beyond a part more or less in front."""
        return name_changes((name, [found]) for name, found in self._matched.items())

    def find(self, name: str) -> str | None:
        """Return the name of the base's tensor, or None if the base has none."""
        return self._near(name) or self._matched.get(name)

    def _near(self, name: str) -> str | None:
        """Look up a name that may have one part fewer, or one more, in front."""
        wanted = self._rules.apply(name)
        for candidate in (wanted, wanted.partition(".")[2]):
            if candidate in self._names:
                return self._names[candidate]
        return self._inner.get(wanted)

    def _match(self, missing: list[str], loaded: dict[str, str]) -> None:
        mine = unique((plain_name(self._rules.apply(name)), name) for name in missing)
        theirs = unique((plain_name(loaded.get(name, name)), own) for name, own in self._names.items())
        for spelled in [spelled for spelled in mine if spelled in theirs]:
            self._matched[mine.pop(spelled)] = theirs.pop(spelled)
        for spelled, target in match_heads(mine, theirs, lambda _, __: True).names.items():
            self._matched[mine[spelled]] = theirs[target]
