"""Options about names that differ between two sides, for every command that compares them, and what is said of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.tools import console

MENTIONED = 6


def add_name_arguments(parser: argparse.ArgumentParser, side: str, base: str = "the base") -> None:
    """Add ``--rename`` and ``--strip-prefix``.

    Args:
        parser: the command's parser.
        side: what is compared with the base, as in "the fine-tune".
        base: the other side.
    """
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="FROM=TO",
        help=f"FROM in names of {side} is TO in {base}",
    )
    parser.add_argument(
        "--strip-prefix",
        action="append",
        default=[],
        metavar="PREFIX",
        help="remove PREFIX from names, on both sides",
    )


def add_architecture_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-architecture``."""
    parser.add_argument(
        "--allow-architecture", action="store_true", help="accept another model_type if the tensors fit"
    )


def name_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was given, as the Python functions take it."""
    return {"rename": options.rename, "strip_prefix": options.strip_prefix}


def say_names(changes: Sequence[NameChange]) -> None:
    """Say what differs between the names of the two sides."""
    for change in changes[:MENTIONED]:
        console.say(f"names: {change}")
    if len(changes) > MENTIONED:
        console.say(f"names: and {len(changes) - MENTIONED:,} more that differ; --json lists them")


def names_obj(changes: Sequence[NameChange]) -> list[dict[str, Any]]:
    """Return the same for JSON."""
    return [change.to_obj() for change in changes]
