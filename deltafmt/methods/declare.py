"""How a method declares its options: once, beside the fields of its dataclass.

    bits: int = option(4, Option("width of a code in bits", "K", values="1 to 8"))

Everything else about an option follows from that line: how it is read from text and written back, what is refused, its
flag of ``deltafmt pack`` and its line in ``deltafmt methods NAME``. Options that several methods have are declared in
:mod:`deltafmt.methods.common`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError

if TYPE_CHECKING:
    from deltafmt.methods.base import Method

SWITCH = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True, slots=True)
class Need:
    """A condition without which an option has no effect.

    Attributes:
        text: completes the sentence "the option needs ...", such as ``mean=group``.
        met: True if options fulfil the condition. It gets an object with the fields of the method, and reads those.
    """

    text: str
    met: Callable[[Any], bool]


Needs = Mapping[str, tuple[Need, ...]]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method.

    The last four attributes follow from the field that the option stands beside; :func:`options_of` fills them in.

    Attributes:
        help: one line about the option, without its default.
        metavar: stands for the value, such as ``K``; empty for a switch, whose value is yes or no.
        values: the possible values in words, such as ``1 to 8``; not needed if there are ``choices``.
        choices: the possible values, if there are only a few.
        otherwise: the default in words where the value is None, such as ``mse below 4 bits, else minmax``.
        noun: the option's name in errors, such as ``scale rule``; the key if empty.
        right: True for a value that is in range.
        wrong: the predicate of the error for a value that is out of range, such as ``is not positive``.
        refused: values that other methods take, and why this one does not.
        key: the name of the option in a spelling; the name of the field if empty.
        fields: the fields that hold the value: one, or two for ``N:M``.
        type: ``int``, ``float``, ``str``, ``bool`` or ``nm``.
        default: values of the fields where the option is not given.
    """

    help: str
    metavar: str = ""
    values: str = ""
    choices: tuple[str, ...] = ()
    otherwise: str = ""
    noun: str = ""
    right: Callable[[Any], bool] | None = None
    wrong: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    key: str = ""
    fields: tuple[str, ...] = ()
    type: str = ""
    default: tuple[Any, ...] = ()

    @property
    def is_switch(self) -> bool:
        """True if the option is on or off."""
        return self.type == "bool"

    @property
    def possible(self) -> str:
        """The possible values in words."""
        return "yes or no" if self.is_switch else self.values or alternatives(self.choices)

    @property
    def default_text(self) -> str:
        """The default in words."""
        return self.otherwise if self.default[0] is None else self.write(self.default)

    def of(self, options: Any) -> tuple[Any, ...]:
        """Return the values of the option's fields."""
        return tuple(getattr(options, name) for name in self.fields)

    def read(self, text: str) -> tuple[Any, ...]:
        """Return values of the option's fields for a text.

        Raises:
            UsageError: the text is not of the option's type.
        """
        if self.type == "nm":
            return parse_nm(text)
        if self.type == "bool":
            if text not in SWITCH:
                raise UsageError(f"{self.key} is yes or no, not {text!r}")
            return (SWITCH[text],)
        if self.type == "int":
            if not _is_number(text.removeprefix("-")):
                raise UsageError(f"{self.key} is a number, not {text!r}")
            return (int(text),)
        if self.type == "float":
            try:
                if text.strip() != text or "_" in text or not text.isascii():
                    raise ValueError
                return (float(text),)
            except ValueError:
                raise UsageError(f"{self.key} is a number, not {text!r}") from None
        return (text,)

    def write(self, values: tuple[Any, ...]) -> str:
        """Return the text that :meth:`read` reads as these values."""
        if self.type == "nm":
            return ":".join(str(value) for value in values)
        (value,) = values
        if self.type == "bool":
            return "yes" if value else "no"
        return repr(float(value)).removesuffix(".0") if self.type == "float" else str(value)

    def check(self, options: Any) -> None:
        """Check the value by itself.

        Raises:
            UsageError: it is out of range.
        """
        value, noun = getattr(options, self.fields[0]), self.noun or self.key
        if value is None:
            return
        if self.choices and value not in self.choices:
            why = dict(self.refused).get(value, f"is not one of {', '.join(self.choices)}")
            raise UsageError(f"{noun} {value!r} {why}")
        if self.right is not None and not self.right(value):
            raise UsageError(f"{noun} {value} {self.wrong}")


def option(default: Any, about: Option, **changes: Any) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: the default of the field.
        about: the option.
        changes: attributes of the option that are different in this method.
    """
    return field(default=default, metadata={"option": replace(about, **changes)})


@functools.cache
def options_of(method: type[Method]) -> dict[str, Option]:
    """Return the options of a method by key, in the order of its fields."""
    own = {each.name: each for each in fields(method)}  # type: ignore[arg-type]
    found = {}
    for name, each in own.items():
        if "option" in each.metadata:
            about: Option = each.metadata["option"]
            names = about.fields or (name,)
            kind = about.type or str(each.type).removesuffix(" | None")
            default = tuple(own[one].default for one in names)
            key = about.key or name
            found[key] = replace(about, key=key, fields=names, type=kind, default=default)
    return found


def defaults_of(method: type[Method]) -> dict[str, Any]:
    """Return the defaults of a method's fields."""
    return {each.name: each.default for each in fields(method)}  # type: ignore[arg-type]


def values_of(group: type, method: object) -> dict[str, Any]:
    """Return the values that a method has for the fields of a group of options."""
    return {each.name: getattr(method, each.name) for each in fields(group)}


def check_options(method: Method) -> None:
    """Check every option of a method by itself.

    Raises:
        UsageError: a value is out of range.
    """
    for each in options_of(type(method)).values():
        each.check(method)


def check_effects(method: Method) -> None:
    """Refuse options that differ from their defaults and have no effect.

    Raises:
        UsageError: says what the option needs.
    """
    for key, each in options_of(type(method)).items():
        if each.of(method) != each.default:
            check_effect(type(method), key, method)


def check_effect(method: type[Method], key: str, options: Any) -> None:
    """Refuse an option that has no effect.

    Raises:
        UsageError: says what the option needs.
    """
    need = unmet(method, key, options)
    if need is not None:
        raise UsageError(f"{key} needs {need.text}")


def unmet(method: type[Method], key: str, options: Any) -> Need | None:
    """Return the need that keeps an option from having an effect, or None."""
    return next((need for need in method.needs.get(key, ()) if not need.met(options)), None)


def as_options(method: type[Method], values: Mapping[str, Any]) -> Any:
    """Return an object with the fields of a method, unchecked: the values given, and defaults."""
    return SimpleNamespace(**defaults_of(method) | dict(values))


def alternatives(words: tuple[str, ...]) -> str:
    """Return ``a, b or c``."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
