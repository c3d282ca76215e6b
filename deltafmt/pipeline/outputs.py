"""Outputs: those that would overwrite an input are refused, and what an interrupt leaves is kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import UsageError
from deltafmt.output import check_path
from deltafmt.regular_file import open_regular

# The end of the message about an interrupt that lost nothing.
GOES_ON: Final = "; the same command goes on where it stopped"


def is_delta_file(path: Path) -> bool:
    """Tell whether a file is a delta file, by its ending or its first bytes."""
    with open_regular(path) as file:
        head = file.read(8)
    return path.suffix == ".deltafmt" or head[1:4] == b"DLT"


def refuse_input_file(path: Path, sources: Sequence[Checkpoint]) -> None:
    """Refuse an output file that is a file of a checkpoint, or the checkpoint itself.

    Raises:
        UsageError: the output is an input.
        StorageError: no file can have its path.
    """
    check_path(path)
    for source in sources:
        inputs = [source.path, *(Path(name) for name, _, _ in source.identity())]
        if path.exists() and any(found.exists() and os.path.samefile(path, found) for found in inputs):
            raise UsageError(f"the output {path} is itself an input")
        # An earlier delta file may lie in the folder of a checkpoint; its other files are the checkpoint's.
        inside = source.path.is_dir() and path.resolve().is_relative_to(source.path.resolve())
        if inside and path.is_file() and not is_delta_file(path):
            raise UsageError(f"the output {path} is itself an input")


def refuse_input_folder(path: Path, sources: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse an output folder that is an input, or in which an input lies.

    Raises:
        UsageError: names the input.
        StorageError: no file can have the output's path.
    """
    check_path(path)
    for source in sources:
        found = Path(source).resolve()
        same = path.exists() and found.exists() and os.path.samefile(path, found)
        if same or path.resolve() in (found, *found.parents):
            raise UsageError(f"the output {path} is, or holds, the input {source}")


def refuse_inside(path: Path, source: Path) -> None:
    """Refuse an output in a folder that is an input: it would replace a file of it, or stand among them as one.

    Raises:
        UsageError: names the folder.
    """
    if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"the output {path} lies in the input {source}")


@contextlib.contextmanager
def kept_if_interrupted(keep: Callable[[], bool], drop: Callable[[], None]) -> Iterator[None]:
    """Keep what a block has made if it is interrupted, and drop it after any other error.

    Args:
        keep: returns True if the next run can go on with what is there.
        drop: removes it.

    Raises:
        KeyboardInterrupt: says whether the next run can go on.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted{GOES_ON if keep() else ''}") from interrupt
    except BaseException:
        drop()
        raise
