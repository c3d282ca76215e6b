"""The one spelling of a method, ``NAME:key=value,key=value``: read from text, and written.

``deltadq:nm=2:16,bits=2`` is DeltaDQ with two options and its defaults; ``rtn`` alone has defaults only. Values may
contain ``:``, so a text is split at its first colon only where a name stands before it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError
from deltafmt.methods.declare import as_options, check_effect, options_of, unmet

if TYPE_CHECKING:
    from deltafmt.methods.base import Method

_HEAD = re.compile(r"[^:,=]*")


def spelling(method: Method) -> str:
    """Return the spelling of a method: its name, and the options that differ from their defaults."""
    pairs = [
        f"{key}={each.write(each.of(method))}"
        for key, each in options_of(type(method)).items()
        if each.of(method) != each.default
    ]
    return f"{method.name}:{','.join(pairs)}" if pairs else method.name


def parse_method(methods: Mapping[str, type[Method]], text: str, like: Method | None = None) -> Method:
    """Return the method of a spelling; see :func:`deltafmt.methods.parse`, which does this for all methods."""
    if like is not None and text not in methods and text in options_of(type(like)):
        raise UsageError(f"{text!r} is an option of {like.name}; write {text}=VALUE")
    kind, pairs = split(methods, text)
    if kind is not None:
        return make(kind, read_pairs(kind, pairs))
    if like is None:
        raise UsageError(f"no method is named; write NAME:{text}, where NAME is one of {', '.join(methods)}")
    return changed(like, read_pairs(type(like), pairs))


def split(methods: Mapping[str, type[Method]], text: str) -> tuple[type[Method] | None, str]:
    """Return the method that a spelling names and its pairs; None for pairs alone.

    Raises:
        UsageError: there is no such method, or the text is not of the form.
    """
    head = _HEAD.match(text)
    assert head is not None
    name, rest = head.group(), text[head.end() :]
    if rest.startswith("="):
        if name == "method":
            raise UsageError(f"a method is spelled NAME:key=value; write {_renewed(rest[1:])}")
        return None, text
    if rest.startswith(","):
        if name in methods:
            raise UsageError(f"options follow the name after a colon; write {name}:{rest[1:]}")
        raise UsageError(f"{name!r} is not of the form key=value")
    kind = find(methods, name)
    if rest == ":":
        raise UsageError(f"no option follows the colon; write {name}")
    return kind, rest[1:]


def find(methods: Mapping[str, type[Method]], name: str) -> type[Method]:
    """Return the class of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in methods:
        raise UsageError(f"unknown method {name!r}{_perhaps(name, methods)}; there are {', '.join(methods)}")
    return methods[name]


def read_pairs(method: type[Method], text: str) -> dict[str, tuple[Any, ...]]:
    """Return values of options by key for ``key=value,key=value``; none for an empty text.

    Raises:
        UsageError: a part is not of that form, names no option of the method or one twice, or has no such value.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for pair in text.split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not of the form key=value")
        if key == "method":
            raise UsageError(f"{pair!r} is no option: a method is spelled NAME:key=value")
        if key in found:
            raise UsageError(f"option {key!r} is given twice")
        found[key] = read_value(method, key, value)
    return found


def read_value(method: type[Method], key: str, text: str) -> tuple[Any, ...]:
    """Return the values of an option's fields for a text.

    Raises:
        UsageError: the method has no such option, or the text does not fit it.
    """
    known = options_of(method)
    if key not in known:
        hint = _perhaps(key, known)
        raise UsageError(f"method {method.name} has no option {key!r}{hint}; it has {', '.join(known)}")
    return known[key].read(text)


def changed(like: Method, given: Mapping[str, tuple[Any, ...]]) -> Method:
    """Return a method with other values of some options.

    Options that the method had and that have no effect beside the new ones have their defaults again: a ``scale_group``
    of groups is forgotten where ``mean=row`` is given.

    Args:
        like: the method.
        given: values of the fields of options, by key.

    Raises:
        UsageError: a value is out of range, or an option given has no effect.
    """
    kind = type(like)
    options = options_of(kind)
    kept = {key: each.of(like) for key, each in options.items() if key not in given and each.of(like) != each.default}
    while True:
        values = as_options(kind, _fields(kind, kept | dict(given)))
        idle = [key for key in kept if unmet(kind, key, values)]
        if not idle:
            return make(kind, given, kept)
        for key in idle:
            del kept[key]


def make(
    kind: type[Method], given: Mapping[str, tuple[Any, ...]], kept: Mapping[str, tuple[Any, ...]] | None = None
) -> Method:
    """Return a method with options.

    Args:
        kind: the class of the method.
        given: values of the fields of options that were given, by key.
        kept: the same for options that follow from elsewhere.

    Raises:
        UsageError: a value is out of range, or an option given has no effect.
    """
    made = kind(**_fields(kind, dict(kept or {}) | dict(given)))
    for key in given:
        check_effect(kind, key, made)
    return made


def _fields(kind: type[Method], values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    options = options_of(kind)
    return {
        name: value for key, several in values.items() for name, value in zip(options[key].fields, several, strict=True)
    }


def _renewed(text: str) -> str:
    """Return the spelling of what followed ``method=`` in former versions."""
    name, comma, pairs = text.partition(",")
    return f"{name}:{pairs}" if comma else name


def _perhaps(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, 1)
    return f", perhaps {near[0]}" if near else ""
