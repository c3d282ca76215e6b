r"""The regular expressions of ``rank_pattern`` and ``alpha_pattern``, matched in time that grows with a name's length.

PEFT takes the first key for which ``re.match(rf"(.*\.)?({key})$", module)`` finds something. An adapter may name
each of thousands of modules by a key of its own, and Python's ``re`` may try the ways to match a hostile key without
end. Therefore keys of plain characters are looked up in a table, and other keys run on an automaton that reads each
character once. What such an automaton cannot say (look-ahead, references to groups) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Generic, TypeVar

from deltafmt.checkpoint.automaton import TOTAL_STEPS, Automaton
from deltafmt.errors import InvalidFileError, UnsupportedError

Value = TypeVar("Value")

MAX_KEY: Final = 4096

_ANY: Final = "."
_MANY: Final = None


class PatternTable(Generic[Value]):
    """Values by regular expression, in the order in which PEFT tries them.

    Args:
        where: the name of the map, for messages.
        items: the values by key.

    Raises:
        InvalidFileError: a key is not a regular expression.
        UnsupportedError: a key cannot be matched in bounded time.
    """

    def __init__(self, where: str, items: Mapping[str, Value]) -> None:
        self._where = where
        self._keys = list(items)
        self._values = list(items.values())
        # Keys without repetition, by length and the places of their dots, which stand for any character each.
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[tuple[int, Automaton]] = []
        self._steps = [TOTAL_STEPS]
        for number, key in enumerate(self._keys):
            self._add(number, key)

    def _add(self, number: int, key: str) -> None:
        where = f"{self._where} {key[:80]!r}"
        expression = rf"(.*\.)?({key})$"
        try:
            if len(key) > MAX_KEY:
                raise UnsupportedError(f"it is longer than {MAX_KEY} characters")
            characters = _characters(key)
            if characters is None:
                re.compile(expression)
                self._others.append((number, Automaton(expression, self._steps)))
                return
        except UnsupportedError as error:
            raise UnsupportedError(f"{where} is not read: {error}; name the modules in plain words") from error
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidFileError(f"{where} is not a regular expression") from error
        dots = tuple(place for place, char in enumerate(characters) if char is _MANY)
        text = "".join(char for char in characters if char is not _MANY)
        self._plain.setdefault((len(characters), dots), {}).setdefault(text, number)

    def get(self, name: str, default: Value) -> Value:
        """Return the value of the first key that matches a module's name.

        Raises:
            UnsupportedError: matching a key takes too many steps.
        """
        found = len(self._keys)
        for (length, dots), numbers in self._plain.items():
            start = len(name) - length
            if start < 0 or (start and name[start - 1] != "."):
                continue
            text, last = "", start
            for dot in dots:
                text += name[last : start + dot]
                last = start + dot + 1
            found = min(found, numbers.get(text + name[last:], found))
        for number, automaton in self._others:
            if number > found:
                break
            try:
                if automaton.matches(name):
                    found = number
                    break
            except UnsupportedError as error:
                raise UnsupportedError(f"{self._where} {self._keys[number][:80]!r} is not read: {error}") from error
        return self._values[found] if found < len(self._keys) else default


def _characters(key: str) -> list[str | None] | None:
    """Return the characters that a key of plain characters stands for, None for any; None if it has repetitions."""
    found: list[str | None] = []
    place = 0
    while place < len(key):
        char = key[place]
        if char == "\\" and place + 1 < len(key) and not key[place + 1].isalnum():
            place += 1
            found.append(key[place])
        elif char == _ANY:
            found.append(_MANY)
        elif char.isalnum() or char in "_-/: ":
            found.append(char)
        else:
            return None
        place += 1
    return found
