"""The base that a checkpoint's model card names: ``base_model`` in the head of its ``README.md``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deltafmt.pipeline.many_outputs import own_name
from deltafmt.regular_file import open_regular

# Bytes of a model card that are read: its head stands at the beginning.
_LARGEST_HEAD: Final = 1 << 16

_KEY: Final = re.compile(r"base_model:\s*(.*)")
_ITEM: Final = re.compile(r"\s*-\s+(.*)")


def named_base(folder: Path) -> str | None:
    """Return the one model that a folder's model card names as its base; None if it names none, or several.

    The head is YAML. A name, a list in brackets and a list with dashes are understood; whatever else names nothing.
    """
    text = ""
    with contextlib.suppress(OSError), open_regular(folder / "README.md") as file:
        text = file.read(_LARGEST_HEAD).decode(errors="replace")
    head, *lines = text.splitlines() or [""]
    if head.strip() != "---":
        return None
    names: list[str] = []
    listed = False
    for line in lines:
        if line.strip() == "---":
            break
        key, item = _KEY.match(line), _ITEM.match(line)
        if key:
            names += filter(None, map(_plain, key[1].strip("[] ").split(",")))
            listed = not names
        elif listed and item:
            names.append(_plain(item[1]))
        elif line[:1].strip():  # another key
            listed = False
    return names[0] if len(names) == 1 else None


def _plain(text: str) -> str:
    """Return a scalar of YAML without its quotes, and without a comment behind it."""
    return text.partition(" #")[0].strip().strip("'\"")


def named_bases(paths: Sequence[Path]) -> dict[int, int]:
    """Return which checkpoint is the base of another, as model cards say, both by their numbers.

    A model ``ORGANIZATION/NAME`` is the checkpoint whose folder is called NAME, or that lies in the cache of the hub
    below ``models--ORGANIZATION--NAME``, if there is one such checkpoint. A base that names a base itself is passed
    over: the last one counts.
    """
    direct: dict[int, int] = {}
    for number, path in enumerate(paths):
        name = named_base(path)
        found = [] if name is None else [at for at, other in enumerate(paths) if at != number and _is(other, name)]
        if len(found) == 1:
            direct[number] = found[0]
    roots = {}
    for number in direct:
        seen, at = {number}, number
        while at in direct and direct[at] not in seen:
            at = direct[at]
            seen.add(at)
        if at not in direct:  # otherwise they name one another
            roots[number] = at
    return roots


def _is(path: Path, name: str) -> bool:
    """Tell whether a checkpoint is the model of a name."""
    own = name.rstrip("/").rpartition("/")[2].casefold()
    cached = f"models--{name.replace('/', '--')}".casefold()
    parts = [part.casefold() for part in Path(os.path.abspath(path)).parts]
    return own_name(path).casefold() == own or cached in parts
