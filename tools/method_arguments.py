"""The arguments of ``deltafmt pack`` that name a method: ``--method``, shorthands like ``--bits``, and ``--rule``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError

if TYPE_CHECKING:
    from deltafmt.methods import Method

DEFAULT = "deltadq"
PREFIX = "method_option_"
DESCRIPTION = f"""\
"deltafmt methods" lists the methods, "deltafmt methods NAME" lists all options
of a method. They can also be given as --nm N:M, --bits K, --share V, --rank R,
--index KIND, --scale-group G and so on, but must not contradict --method:
"--method rtn:bits=3 --bits 4" is refused. The default method is {DEFAULT}.
"""


class _Once(argparse.Action):
    """Store a value; the last of several would otherwise win without a word."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"{option} is given twice")
        setattr(namespace, self.dest, values)


def add_method_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--method``."""
    group = parser.add_argument_group("method", DESCRIPTION)
    group.add_argument(
        "--method", metavar="METHOD", action=_Once, help="NAME or NAME:key=value,..., such as rtn:bits=3"
    )


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of any method; whether the method has it is seen when it is made."""
    from deltafmt.methods import METHODS
    from deltafmt.methods.declare import Option, options_of

    known: dict[str, Option] = {}
    for method in METHODS.values():
        for key, each in options_of(method).items():
            known.setdefault(key, each)
    hidden = argparse.SUPPRESS
    for key, each in known.items():
        if each.is_switch:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(_flag(key), dest=PREFIX + key, action=switch, default=hidden, help=hidden)
        else:
            dest = PREFIX + key
            parser.add_argument(_flag(key), dest=dest, metavar=each.metavar, action=_Once, default=hidden, help=hidden)


def given_texts(options: argparse.Namespace) -> dict[str, str]:
    """Return the texts of the options of methods that were given as flags, by key."""
    given = {key.removeprefix(PREFIX): value for key, value in vars(options).items() if key.startswith(PREFIX)}
    return {key: value if isinstance(value, str) else ("no", "yes")[value] for key, value in given.items()}


def given_arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments given that say how everything is packed, as the user knows them."""
    method = [] if options.method is None else [f"--method {options.method}"]
    return method + [_flag(key) for key in given_texts(options)]


def read_method(options: argparse.Namespace) -> Method:
    """Return the method that ``--method`` and the flags describe.

    Raises:
        UsageError: there is no such method or option, a value is out of range or has no effect, or a flag contradicts
            what ``--method`` spells.
    """
    from deltafmt.methods import METHODS
    from deltafmt.methods.declare import options_of
    from deltafmt.methods.spelling import make, read_pairs, read_value, split

    text = DEFAULT if options.method is None else options.method
    try:
        kind, pairs = split(METHODS, text)
        if kind is None:
            raise UsageError(f"--method {text} names no method; write NAME:{text}, such as {DEFAULT}:{text}")
        given = read_pairs(kind, pairs)
        for key, flag in given_texts(options).items():
            value = read_value(kind, key, flag)
            if given.setdefault(key, value) != value:
                spelled = options_of(kind)[key].write(given[key])
                raise UsageError(f"{_flag(key)} {flag} and {key}={spelled} of --method contradict each other")
        return make(kind, given)
    except UsageError as error:
        raise UsageError(f"{error} ({hint(text)})") from error


def read_rule(text: str, method: Method) -> Method | None:
    """Return the method of a rule, None for ``whole``.

    Args:
        text: ``whole``, the spelling of a method, or ``key=value,...`` for options of the command's method.
        method: the command's method.

    Raises:
        UsageError: the text is none of these.
    """
    return None if text == "whole" else read_spelling("rule", text, method)


def read_spelling(what: str, text: str, like: Method | None = None) -> Method:
    """Return the method of a spelling; errors begin with what it is, such as ``candidate``.

    Raises:
        UsageError: as :func:`deltafmt.methods.parse`.
    """
    from deltafmt.methods import parse

    try:
        return parse(text, like)
    except UsageError as error:
        raise UsageError(f"{what} {text!r}: {error} ({hint(text)})") from error


def hint(text: str) -> str:
    """Return which command says more about a spelling."""
    from deltafmt.methods import METHODS

    name = text.partition(":")[0]
    return f"see deltafmt methods {name}" if name in METHODS else "see deltafmt methods"


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
