"""A sample of what ``fuzz/faults.py`` tries: calls that fail, disks that are full, kills, and flipped bits."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import bit_flips
import fault_cases
import faults
import pytest

from deltafmt.checkpoint import exchange, folder_writer

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="preloading needs Linux and a C compiler"
)

# Commands that take a while; ``make faults`` tries them as much as the others.
SLOW = "pack cold", "pack to a target", "export-lora", "analyze"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Driver]:
    folder = tmp_path_factory.mktemp("faults")
    inputs = folder / "inputs"
    inputs.mkdir()
    fault_cases.make_inputs(inputs)
    found = faults.Driver(folder / "driver", faults.build_library(folder), inputs)
    yield found
    found.close()


@linux
@pytest.mark.parametrize("number", range(len(fault_cases.CASES)))
def test_a_command_that_fails_leaves_the_old_or_the_new_output(driver: faults.Driver, number: int) -> None:
    """Of each command: its renames, some other calls, a full disk, and signals at random moments."""
    rng, report = random.Random(number), faults.Report()
    bench = faults.Bench(driver, fault_cases.CASES[number], number % 2 == 0, report)
    for at, call in enumerate(bench.calls, 1):
        if call.startswith("rename"):
            bench.trial(f"killed at {call}", mode="kill", at=at)
    at = rng.randrange(1, len(bench.calls) + 1)
    bench.trial(f"call {at} and on", mode="from", at=at, error=errno.ENOSPC)
    if bench.case.name not in SLOW:
        bench.trial(f"call {at}", mode="once", at=at, error=rng.choice(faults.ONCE))
        bench.trial("the disk is full", mode="room", at=rng.randrange(20_000))
        at = rng.randrange(1, len(bench.reads) + 1)
        bench.trial(f"input call {at}", mode="once", at=at, error=errno.EIO, watch=str(driver.inputs))
        kill = signal.SIGKILL if number % 3 else signal.SIGHUP
        bench.trial("a signal", after=rng.uniform(0.2, 0.9) * bench.seconds, signal=int(kill))
    assert report.wrong == []
    assert report.hit[bench.name] >= 1


@linux
def test_a_fault_that_is_not_noticed_is_reported(driver: faults.Driver) -> None:
    """The checks themselves: an output that is neither old nor new, a line that is missing, something left behind."""
    report = faults.Report()
    bench = faults.Bench(driver, fault_cases.CASES[0], False, report)
    bench.path.write_bytes(b"half")
    (driver.out / "visible").touch()
    found = {"code": 1, "err": "Traceback (most recent call last):", "killed": False}
    problems = list(bench.problems(found, {"mode": "once"}))
    assert [problem.split(":")[0] for problem in problems] == [
        "what stands under the output's name is neither old nor new", "exit code 1", "an internal error", "left behind",
        "the next run ends with 2 (deltafmt",
    ]  # fmt: skip


@pytest.mark.parametrize("what", bit_flips.FILES_MADE)
def test_every_flipped_bit_is_refused(tmp_path: Path, what: str) -> None:
    data = bit_flips.FILES_MADE[what](tmp_path)
    assert not bit_flips.refused(data)
    assert bit_flips.missed(data, list(range(3, 8 * len(data), 499))) == []


def test_another_reader_is_asked_by_its_command_line(tmp_path: Path) -> None:
    """A reader that refuses what does not start with the magic misses all flips behind it."""
    reader = tmp_path / "reader"
    reader.write_text('#!/bin/sh\nhead -c 4 "$2" | grep -q DLT || exit 3\n')
    reader.chmod(0o755)
    data = bit_flips.make_file(tmp_path)
    assert bit_flips.missed(data, [9, 17, 800], str(reader)) == [800]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    done = exchange.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / ("b" if done else "a") / "a").exists()
    if done:
        with pytest.raises(FileNotFoundError):
            exchange.exchange(tmp_path / "a", tmp_path / "missing")


def test_a_system_without_exchange_renames_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(*_: object, **__: object) -> None:
        raise OSError(errno.ENOENT, "no such library")

    monkeypatch.setattr(exchange.ctypes, "CDLL", no_library)
    assert not exchange.exchange(tmp_path, tmp_path)
    folder = tmp_path / "m"
    for size in (1, 2):
        writer = folder_writer.CheckpointWriter(folder, [folder_writer.TensorSpec("w", "U8", (size,))], force=True)
        writer.write("w", 0, bytes(size))
        writer.commit()
        assert (folder / "model.safetensors").read_bytes()[-size:] == bytes(size)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
