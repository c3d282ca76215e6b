"""What MkDocs fills in when it builds the site: the command line from its parser, and the specification's text.

A page asks for it with a line ``<!-- made: NAME -->``; the page in the repository stays short.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH = "82"


def commands() -> list[str]:
    """Return the names of the commands, in the order of ``deltafmt --help``."""
    from deltafmt.tools.main import COMMANDS

    return list(COMMANDS)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of one command, as ``deltafmt COMMAND`` builds it."""
    from deltafmt.tools.main import build_parser

    for action in build_parser(command)._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: argparse.ArgumentParser = action.choices[command]
            return found
    raise LookupError(command)


def help_of(command: str | None) -> str:
    """Return what ``--help`` prints, narrow enough for the page and without colours."""
    from deltafmt.tools.main import build_parser

    parser = build_parser(None) if command is None else parser_of(command)
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS=WIDTH, NO_COLOR="1")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return parser.format_help().strip()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def command_line() -> str:
    """Return the help of ``deltafmt`` and of every command."""
    parts = [f"## deltafmt\n\n```text\n{help_of(None)}\n```"]
    parts += [f"## deltafmt {name}\n\n```text\n{help_of(name)}\n```" for name in commands()]
    return "\n\n".join(parts)


def specification() -> str:
    """Return the specification without its title, which the page has."""
    text = (ROOT / "spec" / "deltafmt-v1.md").read_text("utf-8")
    return text.split("\n", 1)[1]


MADE: dict[str, Callable[[], str]] = {"command line": command_line, "specification": specification}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the lines that ask for text; MkDocs calls this for every page."""
    return re.sub(r"<!-- made: (.*?) -->", lambda found: MADE[found[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take out the roles that docstrings put in front of names, such as ``:mod:``; MkDocs calls this for every page."""
    return re.sub(r":(?:attr|class|data|exc|func|meth|mod):(?=<code)", "", html)
