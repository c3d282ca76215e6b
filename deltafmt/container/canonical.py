"""Canonical msgpack: the one encoding that an index may have (spec/deltafmt-v1.md, section 7.1)."""

from __future__ import annotations

from typing import Any

import msgpack

from deltafmt.errors import InvalidFileError
from deltafmt.layout.constants import MAX_NESTING


def encode(obj: Any) -> bytes:
    """Encode maps (sorted string keys), lists, strings, bytes, integers, booleans and None.

    Raises:
        InvalidFileError: the object holds anything else, or is nested too deeply.
    """
    return pack(_sorted(obj, 0))


def pack(obj: Any) -> bytes:
    """Encode an object whose maps are already in canonical order."""
    return bytes(msgpack.packb(obj, use_bin_type=True))


def decode(data: bytes | memoryview, what: str) -> Any:
    """Decode ``data`` and refuse it unless it is the canonical encoding of what it means.

    Raises:
        InvalidFileError: not msgpack, not canonical, an extension type, a float or too deeply nested.
    """
    try:
        obj = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=True)
        _check(obj, what, 0)
        again = pack(obj)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        if isinstance(error, InvalidFileError):
            raise
        raise InvalidFileError(f"{what} is not valid msgpack: {_first_line(error)}") from error
    # Duplicate keys, non-minimal integers and trailing bytes all end here.
    if again != data:
        raise InvalidFileError(f"{what} is not in canonical form")
    return obj


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check(obj: Any, what: str, depth: int) -> None:
    if depth > MAX_NESTING:
        raise InvalidFileError(f"{what} is nested more than {MAX_NESTING} deep")
    kind = type(obj)
    if kind is dict:
        keys = list(obj)
        if keys != sorted(keys) or not all(type(key) is str for key in keys):
            raise InvalidFileError(f"{what} has a map whose keys are not sorted strings")
        for value in obj.values():
            if type(value) not in _LEAVES:
                _check(value, what, depth + 1)
    elif kind is list:
        for value in obj:
            if type(value) not in _LEAVES:
                _check(value, what, depth + 1)
    elif kind not in _LEAVES:
        raise InvalidFileError(f"{what} holds a {kind.__name__}, which an index may not")


_LEAVES = frozenset((int, str, bytes, bool, type(None)))


def _sorted(obj: Any, depth: int) -> Any:
    if depth > MAX_NESTING:
        raise InvalidFileError(f"nested more than {MAX_NESTING} deep")
    if isinstance(obj, dict):
        return {key: _sorted(obj[key], depth + 1) for key in sorted(obj)}
    if isinstance(obj, list | tuple):
        return [_sorted(value, depth + 1) for value in obj]
    if type(obj) not in _LEAVES:
        raise InvalidFileError(f"a {type(obj).__name__} cannot stand in an index")
    return obj
