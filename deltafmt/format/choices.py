"""The checks of an option that takes one of some words, or a list."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator

from deltafmt.errors import UsageError


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is none of an option's words, as in ``profile 'warm' is not one of hot, cold``.

    Raises:
        UsageError: names the option and the value.
    """
    if value not in choices:
        raise UsageError(f"{option} {value!r} is not one of {', '.join(choices)}")


def check_list(option: str, value: object) -> None:
    """Refuse what is no list of items, where one belongs.

    One text, or one path, is refused: its letters would be taken for the items. So is what can be gone through once
    only, such as a generator: the second reader would find nothing.

    Raises:
        UsageError: names the option and the value.
    """
    if isinstance(value, str | bytes | os.PathLike):
        raise UsageError(f"{option}: {os.fspath(value)!r} is one item, and a list of them is needed")
    if not isinstance(value, Iterable) or isinstance(value, Iterator):
        raise UsageError(f"{option}: a {type(value).__name__} is given, and a list is needed")
