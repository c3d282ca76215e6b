"""Attached files of Python code: which are written into a folder that a delta gives (spec, section 7.9)."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from typing import Final

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.container.reader import Container
from deltafmt.errors import Remedy, UsageError
from deltafmt.index.file_names import is_source

WRITE: Final = "write"
LEAVE: Final = "leave"
CODE: Final = (WRITE, LEAVE)


def code_of(container: Container) -> list[str]:
    """Return the names of the attached files of Python code."""
    return [name for name in container.attachments if is_source(name)]


def chosen_files(container: Container, code: str | None) -> list[str]:
    """Return the names of the attached files that are written.

    Raises:
        UsageError: one could be taken for a module, and ``code`` does not say what to do with it.
    """
    found = code_of(container)
    if code is None and (shadows := [name for name in found if _is_module(name)]):
        text = f"{container.name} holds code with names of modules that this Python has: {bounded(shadows, 3)}"
        raise UsageError(text, Remedy("code"))
    return [name for name in container.attachments if code != LEAVE or name not in found]


def _is_module(path: str) -> bool:
    """Tell whether a file, or the folder at the top that holds it, has the name of a module outside of this folder."""
    name = path.split("/", maxsplit=1)[0].partition(".")[0]
    here = os.getcwd()
    elsewhere = [folder for folder in sys.path if folder and os.path.abspath(folder) != here]
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, elsewhere) is not None
