"""The console blocks of the pages: find them, run them as a reader would, and compare or rewrite what they print.

A block is fenced as ``console``. A line that begins with ``$`` is a command; a backslash at its end continues it. What
follows is its output, standard error included. The blocks of one page run in order, in one new folder that links to the
repository's ``examples``, ``benchmarks`` and ``docs``.

In an output, ``...`` stands for what may differ or is left out: within a line for any text, as a line for any number of
lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("examples", "benchmarks", "docs")
ANY = "..."
FENCE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TIMEOUT = 300


@dataclass(frozen=True)
class Step:
    """One command of a page and the output that stands below it.

    Attributes:
        command: what a shell is given.
        shown: the lines of the output.
        start, stop: where the output stands in the page's text.
    """

    command: str
    shown: list[str]
    start: int
    stop: int


def pages() -> list[Path]:
    """Return the README and every page that has a console block."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if FENCE.search(page.read_text("utf-8"))]


def steps(text: str) -> list[Step]:
    """Return the commands of a page, in order."""
    return [step for block in FENCE.finditer(text) for step in _steps_of(block[1], block.start(1))]


def _steps_of(block: str, at: int) -> Iterator[Step]:
    lines = block.splitlines(keepends=True)
    i = 0
    while i < len(lines):
        if not lines[i].startswith("$ "):
            raise ValueError(f"{lines[i]!r} stands before the first command of its block")
        command = lines[i][2:]
        while command.endswith("\\\n"):
            i += 1
            command += lines[i]
        i += 1
        first = i
        while i < len(lines) and not lines[i].startswith("$ "):
            i += 1
        start, stop = (at + sum(map(len, lines[:end])) for end in (first, i))
        yield Step(command.strip(), block[start - at : stop - at].splitlines(), start, stop)


class Folder:
    """The folder in which the commands of one page run; ``deltafmt`` and ``python`` are those of this interpreter."""

    def __init__(self, path: Path) -> None:
        self.path = path / "work"
        self.path.mkdir()
        for name in SHARED:
            (self.path / name).symlink_to(ROOT / name)
        programs = path / "bin"
        programs.mkdir()
        for name, arguments in (("deltafmt", ' -m deltafmt "$@"'), ("python", ' "$@"')):
            program = programs / name
            program.write_text(f"#!/bin/sh\nexec '{sys.executable}'{arguments}\n", "utf-8")
            program.chmod(0o755)
        # Only deltafmt is on the path, not the repository's root: transformers would take kernels/ for another package.
        library = path / "lib"
        library.mkdir()
        (library / "deltafmt").symlink_to(ROOT / "deltafmt")
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(library),
            "PYTHONWARNINGS": "ignore",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "LC_ALL": "C.UTF-8",
        }

    def run(self, command: str) -> list[str]:
        """Run a command; return the lines that it prints."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.path,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            check=False,
        )
        return [line.rstrip() for line in done.stdout.splitlines()]


def line_matches(shown: str, printed: str) -> bool:
    """Tell whether a line of a page stands for a line that was printed."""
    return re.fullmatch(".*".join(map(re.escape, shown.split(ANY))), printed) is not None


def matches(shown: list[str], printed: list[str]) -> bool:
    """Tell whether an output as shown stands for what was printed."""
    if not shown:
        return not printed
    if shown[0] == ANY:
        return any(matches(shown[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    return bool(printed) and line_matches(shown[0], printed[0]) and matches(shown[1:], printed[1:])


def rewritten(shown: list[str], printed: list[str]) -> list[str]:
    """Return an output to show for what was printed, with the parts left out that were left out before."""
    if matches(shown, printed):
        return shown
    if ANY not in shown:
        old = dict(enumerate(shown))
        return [old[i] if i in old and line_matches(old[i], line) else line for i, line in enumerate(printed)]
    head, tail = shown.index(ANY), len(shown) - 1 - shown[::-1].index(ANY)
    last = len(shown) - 1 - tail
    return [*printed[:head], ANY, *(printed[len(printed) - last :] if last else [])]
