"""The check of an option that takes one of some words."""

from __future__ import annotations

from collections.abc import Collection

from deltafmt.errors import UsageError


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is none of an option's words, as in ``profile 'warm' is not one of hot, cold``.

    Raises:
        UsageError: names the option and the value.
    """
    if value not in choices:
        raise UsageError(f"{option} {value!r} is not one of {', '.join(choices)}")
