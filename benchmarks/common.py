"""What the benchmarks share: timing, child processes with their peak memory, tables and JSON results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Whole processes are measured as users run them: with bytecode that an earlier run has written.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

RESULTS = Path(__file__).parent / "results"
WORKER_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure beside what it should reach.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: its unit.
        target: what it should be, at least or at most; None for a figure without a target, such as a floor.
        at_most: whether the target is an upper bound.
        note: anything else to say.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def row(self) -> list[str]:
        """Return the cells of a table's row."""
        target = "" if self.target is None else f"{'<=' if self.at_most else '>='} {number(self.target)}"
        verdict = {True: "reached", False: "MISSED", None: ""}[self.reached]
        return [self.name, number(self.value), self.unit, target, verdict, self.note]


def number(value: float) -> str:
    """Return a number with about four digits."""
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def report(
    name: str,
    figures: Sequence[Figure],
    rows: Sequence[Sequence[str]] | None = None,
    folder: Path = RESULTS,
    **more: Any,
) -> None:
    """Print the figures as a table, or other rows in their place, and write ``benchmarks/results/NAME.json``."""
    print()
    print(machine())
    table(rows or [["figure", "measured", "", "target", "", ""], *(figure.row() for figure in figures)])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    measured = [asdict(figure) | {"reached": figure.reached} for figure in figures]
    path.write_text(json.dumps({"machine": machine(), **more, "figures": measured}, indent=2) + "\n", "utf-8")
    print(f"written to {os.path.relpath(path)}")


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; the second column is aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i == 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def machine() -> str:
    """Return processor, processors in use and versions in one line."""
    import numpy as np

    from deltafmt import core

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return (
        f"{model}, {WORKER_THREADS} processors, {platform.system()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, loops: {core.describe()}"
    )


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of some calls."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@dataclass(frozen=True, slots=True)
class Child:
    """A child process that is done: its time, its peak resident memory and what it printed."""

    seconds: float
    peak_bytes: int
    output: str


# A process starts with its parent's peak as its own, so the command is started from a small process, not from this one.
LAUNCHER = """
import os, sys, time
os.set_inheritable(int(sys.argv[1]), False)
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ), 0)
taken = time.perf_counter() - start
os.write(int(sys.argv[1]), f"{taken} {usage.ru_maxrss}".encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_child(*command: str | os.PathLike[str]) -> Child:
    """Run a program, given by its path, to its end.

    Raises:
        SystemExit: it failed.
    """
    words = [os.fspath(word) for word in command]
    reader, writer = os.pipe()
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(writer)]
    try:
        done = subprocess.run([*launcher, *words], pass_fds=(writer,), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
        taken, peak = os.read(reader, 100).decode().split()
    finally:
        os.close(reader)
        os.close(writer)
    unit = 1 if sys.platform == "darwin" else 1024
    return Child(float(taken), int(peak) * unit, done.stdout)


def deltafmt_child(*arguments: str | os.PathLike[str]) -> Child:
    """Run ``python -m deltafmt`` with arguments."""
    return run_child(sys.executable, "-m", "deltafmt", *arguments)
