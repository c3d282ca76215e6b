"""The options of methods: declared beside the fields of a method's dataclass, read from text by the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError

if TYPE_CHECKING:
    from deltafmt.methods.base import Method

Parse = Callable[[str], dict[str, Any]]

_SWITCH = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method.

    Attributes:
        key: its name in a rule; on the command line with hyphens for underscores.
        help: what it does, with its default in parentheses.
        metavar: stands for its value; empty for a switch, which takes yes or no in a rule.
        parse: gives values of the method's fields by name for the option's text.
    """

    key: str
    help: str
    metavar: str
    parse: Parse

    @property
    def is_switch(self) -> bool:
        """Whether the option is on or off."""
        return not self.metavar


def option(default: Any, text: str, metavar: str = "", *, key: str = "", parse: Parse | None = None) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: of the field.
        text: what it does, with its default in parentheses.
        metavar: stands for its value; none for a bool.
        key: the option's name where it is not the field's.
        parse: gives fields by name for a text; by default the text becomes what the field's annotation says.
    """
    return field(default=default, metadata={"option": (text, metavar, key, parse)})


def options_of(method: type[Method]) -> dict[str, Option]:
    """Return a method's options by key, in the order of its fields."""
    found = {}
    for each in fields(method):  # type: ignore[arg-type]
        if "option" in each.metadata:
            help_text, metavar, key, parse = each.metadata["option"]
            key = key or each.name
            found[key] = Option(key, help_text, metavar, parse or _parser(key, each.name, str(each.type)))
    return found


def parse_options(method: type[Method], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return values of a method's fields for the texts of its options.

    Raises:
        UsageError: the method has no such option, or a text does not fit.
    """
    known = options_of(method)
    values = {}
    for key, text in texts.items():
        if key not in known:
            raise UsageError(f"method {method.name} has no option {key!r}; it has {', '.join(known)}")
        values.update(known[key].parse(text))
    return values


def make_method(
    methods: Mapping[str, type[Method]], name: str, texts: Mapping[str, str], like: Method | None = None
) -> Method:
    """Return the method of a name, with options as texts.

    Args:
        methods: by name.
        name: of the method.
        texts: option texts by key; the others have their defaults.
        like: gives the options that are left out, if it is of this method.

    Raises:
        UsageError: there is no such method or option, or a value is out of range.
    """
    if name not in methods:
        raise UsageError(f"unknown method {name!r}; --method help lists them")
    kind = methods[name]
    values = parse_options(kind, texts)
    return replace(like, **values) if isinstance(like, kind) else kind(**values)  # type: ignore[type-var]


def split_pairs(text: str) -> dict[str, str]:
    """Return the pairs of ``key=value,key=value``.

    Raises:
        UsageError: a part is not of that form.
    """
    pairs = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is neither 'exact' nor key=value")
        pairs[key] = value
    return pairs


def parse_nm(text: str) -> tuple[int, int]:
    """Return N and M of ``N:M``.

    Raises:
        UsageError: not of that form.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(map(_is_number, parts)):
        raise UsageError(f"{text!r} is not of the form N:M, such as 4:16")
    return int(parts[0]), int(parts[1])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _parser(key: str, name: str, annotation: str) -> Parse:
    """Return the parser of an option whose text is the value of one field."""
    kind = annotation.removesuffix(" | None")

    def parse(text: str) -> dict[str, Any]:
        if kind == "str":
            return {name: text}
        if kind == "bool":
            if text not in _SWITCH:
                raise UsageError(f"{key} is yes or no, not {text!r}")
            return {name: _SWITCH[text]}
        if kind == "int":
            if not _is_number(text.removeprefix("-")):
                raise UsageError(f"{key} is a number, not {text!r}")
            return {name: int(text)}
        try:
            return {name: float(text)}
        except ValueError:
            raise UsageError(f"{key} is a number, not {text!r}") from None

    return parse
