"""Options that say how much a delta file may ask for, for every command that reads one (docs/security.md)."""

from __future__ import annotations

import argparse

from deltafmt.errors import UsageError
from deltafmt.format.limits import Limits
from deltafmt.tools.byte_sizes import parse_size

_HELP = {
    "memory": ("SIZE", "refuse a delta file that takes more memory, such as 2GB"),
    "elements": ("N", "refuse a delta file whose terms take more products and sums"),
    "output": ("SIZE", "refuse a delta file that decodes to more bytes, such as 50GB"),
}


def add_limit_arguments(parser: argparse.ArgumentParser, *, computes: bool = False) -> None:
    """Add ``--max-memory`` and ``--max-output``.

    Args:
        parser: the command's parser.
        computes: True for a command that decodes terms; it has ``--max-elements`` too.
    """
    group = parser.add_argument_group(
        "limits", "The defaults follow the sizes of the files; real models stay below them."
    )
    for name, (metavar, text) in _HELP.items():
        if computes or name != "elements":
            group.add_argument(f"--max-{name}", metavar=metavar, help=text)


def limits_of(options: argparse.Namespace) -> Limits:
    """Return the limits that were given.

    Raises:
        UsageError: one is not a size, or not a number.
    """
    memory, output, elements = options.max_memory, options.max_output, getattr(options, "max_elements", None)
    if elements is not None and not (elements.isascii() and elements.isdigit() and int(elements)):
        raise UsageError(f"--max-elements {elements!r} is not a whole number from 1 on")
    return Limits(
        max_memory=None if memory is None else parse_size(memory),
        max_elements=None if elements is None else int(elements),
        max_output=None if output is None else parse_size(output),
    )
