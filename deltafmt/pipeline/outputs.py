"""Refusing an output that would overwrite an input."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import UsageError


def refuse_input_file(path: Path, sources: Sequence[Checkpoint]) -> None:
    """Refuse an output file that is a file of a checkpoint, or the checkpoint itself.

    Raises:
        UsageError: the output is an input.
    """
    for source in sources:
        inputs = [source.path, *(Path(name) for name, _, _ in source.identity()), *source.files.values()]
        if path.exists() and any(found.exists() and os.path.samefile(path, found) for found in inputs):
            raise UsageError(f"the output {path} is itself an input")


def refuse_input_folder(path: Path, sources: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse an output folder that is an input, or in which an input lies.

    Raises:
        UsageError: names the input.
    """
    for source in sources:
        found = Path(source).resolve()
        same = path.exists() and found.exists() and os.path.samefile(path, found)
        if same or path.resolve() in (found, *found.parents):
            raise UsageError(f"the output {path} is, or holds, the input {source}")
