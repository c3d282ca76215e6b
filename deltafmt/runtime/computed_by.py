"""Caches of keys and values know which deltas computed them, so that no other deltas continue them.

A caller may keep a cache from one call to the next (a chat, a shared prompt). If another fine-tune continues it, the
text is neither's: the first tokens' keys and values are those of the fine-tune before. Each cache is therefore marked
by the call that fills it. A copy of a cache keeps its mark; a cache that was reset is free for others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltafmt.errors import UsageError

# The arguments and the outputs of transformers' models that are caches.
_NAMES = ("past_key_values", "cache_params")
_MARK = "_deltafmt_computed_by"


@dataclass(frozen=True, slots=True)
class ComputedBy:
    """Which deltas a call serves.

    Attributes:
        identity: the files and weights, row by row; once, if all rows use the same.
        text: the names as a message gives them.
    """

    identity: tuple[Hashable, ...]
    text: str

    @classmethod
    def of(cls, rows: Iterable[Hashable], text: str) -> ComputedBy:
        """Return the mark of a call, given what each row uses."""
        identity = tuple(rows)
        return cls(identity[:1] if len(set(identity)) == 1 else identity, text)


BASE_ALONE = ComputedBy.of(((),), "the base")


def check_caches(given: Mapping[str, Any], by: ComputedBy, where: str) -> None:
    """Mark the caches that a call is given, or refuse one that other deltas have filled.

    Args:
        given: the arguments of the call by name.
        by: which deltas it serves.
        where: the model's class, for the message.

    Raises:
        UsageError: names both.
    """
    for name in _NAMES:
        cache = given.get(name)
        if cache is None or not hasattr(cache, "__dict__"):
            continue
        seen: ComputedBy | None = getattr(cache, _MARK, None)
        if seen is not None and seen.identity != by.identity and not _is_empty(cache):
            before = "an earlier version of " if seen.text == by.text else ""
            raise UsageError(
                f"{where} is given {name} filled by {before}{seen.text}, and serves {by.text}; begin with a new cache, "
                "or serve what filled it"
            )
        if seen is not by:
            setattr(cache, _MARK, by)


def mark_caches(output: Any, by: ComputedBy) -> None:
    """Mark the caches that a call has made."""
    for name in _NAMES:
        cache = getattr(output, name, None)
        if hasattr(cache, "__dict__") and not hasattr(cache, _MARK):
            setattr(cache, _MARK, by)
    if type(output) is tuple:
        for one in output:
            if hasattr(one, "get_seq_length") and not hasattr(one, _MARK):
                setattr(one, _MARK, by)


def _is_empty(cache: Any) -> bool:
    """Tell whether a cache holds no token; one of which that cannot be told holds some."""
    for name in ("get_seq_length", "has_previous_state"):
        try:
            return not getattr(cache, name)()
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            continue
    return False
