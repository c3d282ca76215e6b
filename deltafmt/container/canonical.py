"""Canonical msgpack: the one encoding that an index may have (spec/deltafmt-v1.md, section 7.1)."""

from __future__ import annotations

from typing import Any

import msgpack

from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import MAX_TENSORS


def encode(obj: Any) -> bytes:
    """Encode maps (sorted string keys), lists, strings, bytes, integers, booleans and None.

    Raises:
        InvalidFileError: the object holds anything else, an integer beyond 64 bits or a string that is not Unicode.
    """
    try:
        return pack(_sorted(obj))
    except (ValueError, OverflowError) as error:
        if isinstance(error, InvalidFileError):
            raise
        raise InvalidFileError(f"the index cannot be encoded: {_first_line(error)}") from error


def pack(obj: Any) -> bytes:
    """Encode an object whose maps are already in canonical order."""
    return bytes(msgpack.packb(obj, use_bin_type=True))


def decode(data: bytes | memoryview, what: str) -> Any:
    """Decode ``data`` and refuse it unless encoding what it means gives the same bytes.

    That settles duplicate keys, integers and lengths that are not minimal, and trailing bytes, at the speed of the
    msgpack library. What it leaves open is settled where the decoded values are used: the order of keys by
    :func:`check_names` and by structures that demand their keys in order, floats and extensions by structures that
    demand the types of their values.

    Raises:
        InvalidFileError: not msgpack, or not in canonical form.
    """
    try:
        obj = msgpack.unpackb(
            data, raw=False, strict_map_key=True, use_list=True, max_map_len=MAX_TENSORS, max_array_len=MAX_TENSORS
        )
        again = pack(obj)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise InvalidFileError(f"{what} is not valid msgpack: {_first_line(error)}") from error
    if again != data:
        raise InvalidFileError(f"{what} is not in canonical form")
    return obj


def check_names(obj: Any, what: str) -> dict[str, Any]:
    """Return a map whose keys are free, after checking that they are sorted strings.

    Raises:
        InvalidFileError: it is no map, or its keys are anything else.
    """
    if type(obj) is not dict or not all(type(key) is str for key in obj):
        raise InvalidFileError(f"{what}: expected a map with strings for keys")
    if list(obj) != sorted(obj):
        raise InvalidFileError(f"{what}: the keys are not sorted")
    return obj


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


_LEAVES = frozenset((int, str, bytes, bool, type(None)))


def _sorted(obj: Any) -> Any:
    if isinstance(obj, dict):
        if not all(type(key) is str for key in obj):
            raise InvalidFileError("a key that is not a string cannot stand in an index")
        return {key: _sorted(obj[key]) for key in sorted(obj)}
    if isinstance(obj, list | tuple):
        return [_sorted(value) for value in obj]
    if type(obj) not in _LEAVES:
        raise InvalidFileError(f"a {type(obj).__name__} cannot stand in an index")
    return obj
