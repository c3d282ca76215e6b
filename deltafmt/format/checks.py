"""Checks of the index's plain values; each error names the place of the wrong value, such as ``sections[2].offset``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c

# A place in the index, as parts that are joined only when an error names the place: ('tensors["', name, '"]').
Where = str | tuple[Any, ...]

Made = TypeVar("Made")


def fail(where: Where, what: str) -> NoReturn:
    """Raise an InvalidFileError that names a place in the index and says what is wrong there."""
    raise InvalidFileError(f"{_place(where)}: {what}")


def _place(where: object) -> str:
    return "".join(map(_place, where)) if isinstance(where, tuple) else str(where)


def check_fields(obj: Any, where: Where, keys: tuple[str, ...]) -> list[Any]:
    """Return the values of a map, after checking that it has exactly these keys in this order."""
    if type(obj) is not dict or tuple(obj) != keys:
        found = ", ".join(map(repr, obj)) if type(obj) is dict else type(obj).__name__
        fail(where, f"expected the keys {', '.join(keys)}, found {found or 'none'}")
    return list(obj.values())


def check_uint(value: Any, where: Where, limit: int = 2**63 - 1) -> int:
    """Return a value, after checking that it is an integer from 0 to ``limit``."""
    if type(value) is not int or not 0 <= value <= limit:
        fail(where, f"{value!r} is not an integer from 0 to {limit}")
    return value


def check_bytes(value: Any, where: Where, length: int) -> bytes:
    """Return a value, after checking that it is a byte string of ``length`` bytes."""
    if type(value) is not bytes or len(value) != length:
        fail(where, f"expected {length} bytes")
    return value


def check_shape(value: Any, where: Where) -> tuple[int, ...]:
    """Return a value as a shape, after checking it against the limits of dimensions and elements."""
    if type(value) is not list or len(value) > c.MAX_RANK:
        fail(where, f"a shape is a list of at most {c.MAX_RANK} sizes")
    for size in value:
        check_uint(size, where)
    shape = tuple(value)
    if not c.is_bounded(shape):
        fail(where, f"{value} has more than {c.MAX_ELEMENTS} elements")
    return shape


def check_name(value: Any, where: Where) -> str:
    """Return a value, after checking that it is a string of 1 to MAX_NAME_BYTES bytes."""
    if type(value) is not str:
        fail(where, f"{value!r} is not a name")
    if not is_name(value):
        fail(where, f"a name has 1 to {c.MAX_NAME_BYTES} bytes")
    return value


def is_name(name: str) -> bool:
    """Tell whether a string has the length of a name."""
    # A character takes 4 bytes at most.
    short = 0 < len(name) <= c.MAX_NAME_BYTES // 4
    return short or 1 <= len(name.encode("utf-8", "surrogatepass")) <= c.MAX_NAME_BYTES


def check_whole(dtype: str, shape: tuple[int, ...], where: Where) -> None:
    """Refuse a tensor whose elements, of fewer than 8 bits, do not fill its last byte."""
    if not c.is_whole(dtype, shape):
        fail(where, f"{dtype} {list(shape)} does not take whole bytes")


def check_dtype(value: Any, where: Where) -> str:
    """Return a value, after checking that it names a dtype of the format."""
    if type(value) is not str or value not in c.DTYPE_BITS:
        fail(where, f"unknown dtype {value!r}")
    return value


def parse_fields(cls: type[Made], obj: Any, where: Where, keys_of: Mapping[str, str] = MappingProxyType({})) -> Made:
    """Return an instance of ``cls``, a dataclass, made from a map with exactly its fields (and its ``kind``, if any).

    A field is a string or an integer, as the class annotates it. The class checks its values itself and raises
    UsageError, which is turned into an InvalidFileError here.

    Args:
        cls: the dataclass.
        obj: the map.
        where: the map's place in the index.
        keys_of: the map's keys by field name, for fields whose key has another name.

    Raises:
        InvalidFileError: the map is not one of the class; the message names the place and the value.
    """
    found = {keys_of.get(field.name, field.name): field for field in fields(cls)}  # type: ignore[arg-type]
    keys = tuple(sorted((*found, "kind") if hasattr(cls, "kind") else found))
    values = dict(zip(keys, check_fields(obj, where, keys), strict=True))
    values.pop("kind", None)
    for key, value in values.items():
        wanted = str(found[key].type)
        if type(value) is not (str if wanted == "str" else int):
            fail((where, ".", key), f"{value!r} is not {'a string' if wanted == 'str' else 'an integer'}")
    try:
        return cls(**{found[key].name: value for key, value in values.items()})
    except UsageError as error:
        fail(where, str(error))
