"""The versions that a patch lies between: words, and mostly numbers that grow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from deltafmt.errors import InvalidFileError

WORD: Final = re.compile(r"[!-~]{1,200}")
NUMBER: Final = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True, slots=True)
class Versions:
    """What a patch says of the two versions that it lies between; None where it says nothing.

    Attributes:
        version: the version that it gives, as it is written there.
        base: the version that it was made on.
    """

    version: str | None = None
    base: str | None = None


def number(version: str | None) -> int | None:
    """Return the number that a version is; None if it is none."""
    return int(version) if version is not None and NUMBER.fullmatch(version) else None


def one_before(version: str | None) -> str | None:
    """Return the version before one that is a number; None if there is none, or none is known."""
    found = number(version)
    return None if not found else str(found - 1)


def is_later(versions: Versions) -> bool:
    """Tell whether a version can be made on its base: as numbers it is the greater one, as words another one."""
    after, before = number(versions.version), number(versions.base)
    if after is None or before is None:
        return versions.version is None or versions.version != versions.base
    return after > before


def read_versions(where: object, version: str | None, base: str | None) -> Versions:
    """Return the versions that a file says, which anybody may have written.

    Args:
        where: the file, in messages.
        version, base: what it says.

    Raises:
        InvalidFileError: one is not one word of at most 200 plain characters, or they contradict each other.
    """
    for each in (version, base):
        if each is not None and not WORD.fullmatch(each):
            raise InvalidFileError(f"{where}: version {each!r:.220} is not one word of at most 200 plain characters")
    if not is_later(Versions(version, base)):
        raise InvalidFileError(f"{where}: version {version} cannot be made on version {base}")
    return Versions(version, base)
