"""Printing: clean text, tables that survive a pipe, JSON, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deltafmt.errors import DeltafmtError

SCHEMA = 1

# A folder of a training run can hold thousands of files.
MOST_LINES = 50


def clean(text: str) -> str:
    """Return text with control characters and lone surrogates escaped: a name in a file must not control a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def can_print(text: str) -> bool:
    """Tell whether standard output can print these characters in its encoding."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def say(line: str = "") -> None:
    """Print a line to standard output."""
    print(clean(line))


def warn(line: str) -> None:
    """Print a line to standard error."""
    print(f"deltafmt: {clean(line)}", file=sys.stderr)


def warn_left_out(reasons: Mapping[str, str]) -> None:
    """Warn about the files and folders beside the weights that the delta does not carry: a line and a reason each."""
    for name, why in list(reasons.items())[:MOST_LINES]:
        warn(f"{name} does not travel with the delta: {why}")
    if len(reasons) > MOST_LINES:
        warn(f"and {len(reasons) - MOST_LINES:,} more files and folders do not travel; --json names them")


def say_json(obj: dict[str, Any]) -> None:
    """Print one JSON object; the schema's number is its first field."""
    import json

    print(json.dumps({"schema": SCHEMA, **obj}, indent=2, allow_nan=False))


def table(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """Print rows in columns; ``right`` has True for each column that is aligned to the right."""
    cleaned = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cleaned) for i in range(len(right))]
    for row in cleaned:
        cells = [
            cell.rjust(width) if align else cell.ljust(width)
            for cell, width, align in zip(row, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def checkpoint_bytes(path: str) -> int:
    """Return the bytes of a checkpoint's tensors; FP8 counts as the BF16 that it is read as."""
    from deltafmt.checkpoint.folder import Checkpoint
    from deltafmt.format.constants import CODE_DTYPES

    with Checkpoint(path) as checkpoint:
        codes = sum(tensor.nbytes for tensor in checkpoint.tensors.values() if tensor.dtype in CODE_DTYPES)
        return checkpoint.nbytes + codes


def delta_bytes(path: str) -> int:
    """Return the bytes of the tensors that a delta file unpacks to."""
    from deltafmt.container.reader import Container

    with Container(path) as container:
        return sum(entry.nbytes for entry in container.entries())


@contextlib.contextmanager
def progress_bar(title: str, total: Callable[[], int], wanted: bool) -> Iterator[Callable[[str, int], None] | None]:
    """Give a function that advances a progress bar; None if standard error is not a terminal.

    Args:
        title: what is done.
        total: gives the bytes of the whole work; called only where there is a bar. If it fails, the bar has no end: the
            work itself names the fault.
        wanted: False if there is to be no bar.
    """
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    try:
        size = total()
    except DeltafmtError:
        size = None
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(title, *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=size)
        yield lambda _, done: bar.advance(task, done)


@contextlib.contextmanager
def count_bar(title: str, wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows how many things of how many are done; None if standard error is not a terminal.

    Args:
        title: what is done.
        wanted: False if there is to be no bar.
    """
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(title, *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def stage_bar(wanted: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Give a function that shows what is done, and how much of how much; None if standard error is not a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, total: bar.update(task, description=clean(what), completed=done, total=total)
