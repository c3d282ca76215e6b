"""Checks of the index's plain values; each names the place where a value is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c

# A place in the index, in parts that are only put together when something is wrong there.
Where = str | tuple[Any, ...]

Made = TypeVar("Made")


def fail(where: Where, what: str) -> NoReturn:
    """Raise InvalidFileError naming the place in the index."""
    raise InvalidFileError(f"{_place(where)}: {what}")


def _place(where: object) -> str:
    return "".join(map(_place, where)) if isinstance(where, tuple) else str(where)


def check_fields(obj: Any, where: Where, keys: tuple[str, ...]) -> list[Any]:
    """Return the values of a map that has exactly these keys, in order."""
    if type(obj) is not dict or tuple(obj) != keys:
        found = ", ".join(map(repr, obj)) if type(obj) is dict else type(obj).__name__
        fail(where, f"expected the keys {', '.join(keys)}, found {found or 'none'}")
    return list(obj.values())


def check_uint(value: Any, where: Where, limit: int = 2**63 - 1) -> int:
    """Return an integer from 0 to ``limit``."""
    if type(value) is not int or not 0 <= value <= limit:
        fail(where, f"{value!r} is not an integer from 0 to {limit}")
    return value


def check_bytes(value: Any, where: Where, length: int) -> bytes:
    """Return a byte string of a given length."""
    if type(value) is not bytes or len(value) != length:
        fail(where, f"expected {length} bytes")
    return value


def check_shape(value: Any, where: Where) -> tuple[int, ...]:
    """Return a shape within the limits of rank and size."""
    if type(value) is not list or len(value) > c.MAX_RANK:
        fail(where, f"a shape is a list of at most {c.MAX_RANK} sizes")
    for size in value:
        check_uint(size, where)
    shape = tuple(value)
    if not c.is_bounded(shape):
        fail(where, f"{value} has more than {c.MAX_ELEMENTS} elements")
    return shape


def check_dtype(value: Any, where: Where) -> str:
    """Return the name of a known dtype."""
    if type(value) is not str or value not in c.DTYPE_BITS:
        fail(where, f"unknown dtype {value!r}")
    return value


def parse_fields(cls: type[Made], obj: Any, where: Where, keys_of: Mapping[str, str] = MappingProxyType({})) -> Made:
    """Return a layout of the plain values of a map, which are its fields by name and, if it has one, its kind.

    A class's fields are strings and integers; what else they must be, the class checks.

    Args:
        cls: a dataclass.
        obj: the map.
        where: its place in the index.
        keys_of: the map's key for a field, where that is not the field's name.

    Raises:
        InvalidFileError: names the place and the value.
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
