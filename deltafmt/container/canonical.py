"""Canonical msgpack: the one encoding that an index may have (spec/deltafmt-v1.md, section 7.1)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import msgpack

from deltafmt.container.decoded_size import check_decoded_size
from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import MAX_TENSORS


def encode(obj: Any) -> bytes:
    """Encode maps with string keys, lists, strings, bytes, integers, booleans and None; the keys are sorted.

    Raises:
        InvalidFileError: the object holds another type, an integer beyond 64 bits, or a string that is not Unicode.
    """
    try:
        return pack(_sorted(obj))
    except (ValueError, OverflowError) as error:
        if isinstance(error, InvalidFileError):
            raise
        raise InvalidFileError(f"the index cannot be encoded: {_first_line(error)}") from error


def encode_ordered(obj: Any) -> bytes:
    """Encode what :func:`encode` takes, if the keys of every map are known to be in sorted order already.

    Raises:
        InvalidFileError: an integer is beyond 64 bits, or a string is not Unicode.
    """
    try:
        return pack(obj)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidFileError(f"the index cannot be encoded: {_first_line(error)}") from error


def pack(obj: Any) -> bytes:
    """Encode an object whose maps are already in canonical order."""
    return bytes(msgpack.packb(obj, use_bin_type=True))


def decode(data: bytes | memoryview, what: str, max_memory: int | None = None) -> Any:
    """Decode ``data``, encode the result again, and refuse the data unless both encodings are the same bytes.

    This comparison finds duplicate keys, integers and lengths that are not minimal, and trailing bytes, at the speed
    of the msgpack library. It does not find unsorted keys, floats and extensions; the callers do: :func:`check_names`
    checks the order of free keys, and every structure of the index checks its own keys and the types of its values.

    Args:
        data: the encoded bytes.
        what: the name of the data in messages, such as "the index".
        max_memory: refuse data that would take more bytes of memory, before it is decoded; None for the default, which
            any index of a real model meets.

    Raises:
        InvalidFileError: the data is not msgpack, or not in canonical form, or takes too much memory.
    """
    check_decoded_size(data, what, max_memory)
    # Every member takes a byte at least, so that a number alone makes no long list.
    most = min(MAX_TENSORS, len(data))
    try:
        obj = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=True, max_map_len=most, max_array_len=most)
        again = pack(obj)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise InvalidFileError(f"{what} is not valid msgpack: {_first_line(error)}") from error
    if again != data:
        raise InvalidFileError(f"{what} is not in canonical form")
    return obj


def check_names(obj: Any, what: str) -> dict[str, Any]:
    """Return a map with free keys (such as tensor names), after checking that the keys are strings in sorted order.

    Raises:
        InvalidFileError: the object is not a map, a key is not a string, or the keys are not sorted.
    """
    if type(obj) is not dict or not all(type(key) is str for key in obj):
        raise InvalidFileError(f"{what}: expected a map with strings for keys")
    if list(obj) != sorted(obj):
        raise InvalidFileError(f"{what}: the keys are not sorted")
    return obj


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


_LEAVES = frozenset((int, str, bytes, bool, type(None)))
_STRINGS = frozenset((str,))
_KEY = itemgetter(0)


def _sorted(obj: Any) -> Any:
    kind = type(obj)
    if kind in _LEAVES:
        return obj
    if kind is dict:
        if not _STRINGS.issuperset(map(type, obj)):
            raise InvalidFileError("a key that is not a string cannot stand in an index")
        return {
            key: value if type(value) in _LEAVES else _sorted(value) for key, value in sorted(obj.items(), key=_KEY)
        }
    if kind is list or kind is tuple:
        return obj if _LEAVES.issuperset(map(type, obj)) else [_sorted(value) for value in obj]
    raise InvalidFileError(f"a {kind.__name__} cannot stand in an index")
