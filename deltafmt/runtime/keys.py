"""Keys of caches: a result is kept by all that it follows from, such as the index of a file without its seeds."""

from __future__ import annotations

from typing import Any


class Key:
    """Everything that something follows from; compared as a whole, and hashed once."""

    __slots__ = ("__weakref__", "_hash", "_value")

    def __init__(self, value: Any) -> None:
        self._value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._value == other._value
