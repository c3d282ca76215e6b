"""Make every command that writes something fail in every way, and check that nothing is lost, half-written or wrong.

    python fuzz/faults.py                     all of it, some minutes
    python fuzz/faults.py calls --sample 20   every 20th trial of one part
    python fuzz/faults.py kills --kills 50

The parts are ``calls`` (every call on the output fails once, and the disk from then on), ``inputs`` (every call on the
inputs fails once), ``room`` (the disk or the limit of a file's size is reached), ``kills`` (signals at random moments)
and ``bits`` (every bit of a delta file is flipped). fuzz/README.md says what must hold. Linux alone, with a
C compiler.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bit_flips
from fault_cases import CASES, Case, Snapshot, make_inputs, snapshot

HERE = Path(__file__).resolve().parent
# What a call answers, once: the disk is full, it is broken, a signal came, the file system cannot do this.
ONCE = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EINVAL)
# What every call answers from one moment on.
LASTING = (errno.ENOSPC, errno.EIO)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PARTS = ("calls", "inputs", "room", "kills", "bits")


def build_library(folder: Path) -> Path:
    """Compile failing_calls.c."""
    library = folder / "failing_calls.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *flags, "-o", library, HERE / "failing_calls.c", "-ldl"], check=True)
    return library


class Driver:
    """A running fault_driver.py with folders of its own."""

    def __init__(self, folder: Path, library: Path, inputs: Path) -> None:
        self.inputs, self.out, self.notes = inputs, folder / "out", folder / "notes"
        self.notes.mkdir(parents=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-P", HERE / "fault_driver.py", library]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the driver of the trials has ended")
        return line

    def run(self, arguments: Sequence[str], **trial: Any) -> dict[str, Any]:
        """Run one trial and return what fault_driver.py says of it."""
        assert self._process.stdin is not None
        trial = {"arguments": list(arguments), "watch": str(self.out), "notes": str(self.notes), **trial}
        self._process.stdin.write(json.dumps(trial) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._answer())
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with self._process:  # which closes both pipes and waits
            self._process.stdin.close()


@dataclass
class Report:
    """What was tried, and what went wrong."""

    trials: dict[str, int] = field(default_factory=dict)
    hit: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def count(self, name: str, *, hit: bool) -> None:
        """Count a trial; ``hit`` if the fault happened before the command was done."""
        self.trials[name] = self.trials.get(name, 0) + 1
        self.hit[name] = self.hit.get(name, 0) + hit


@dataclass
class Bench:
    """A case with its clean run: what stands there before and after, which calls it makes, how long it takes."""

    driver: Driver
    case: Case
    force: bool
    report: Report
    old: Snapshot = None
    new: Snapshot = None
    calls: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        driver = self.driver
        self.arguments = self.case.spelled(driver.inputs, driver.out, force=self.force)
        self.path = driver.out / self.case.output
        self.reset()
        self.old = snapshot(self.path)
        clean = driver.run(self.arguments, mode="count")
        self.new, self.calls, self.seconds = snapshot(self.path), clean["calls"], clean["seconds"]
        assert clean["code"] == 0, clean
        assert self.new is not None, "the command writes nothing"
        assert self.new != self.old, "the old output is the new one"
        assert self.leftovers() == [], self.leftovers()
        self.reset()
        self.reads = driver.run(self.arguments, mode="count", watch=str(driver.inputs))["calls"]
        self.check_synced()

    @property
    def name(self) -> str:
        """The name of the case in the report."""
        return self.case.name + (" --force" if self.force and not self.case.stands else "")

    def reset(self) -> None:
        """Put the old output, if any, in place, and nothing else."""
        self.case.prepare(self.driver.inputs, self.driver.out, force=self.force)

    def leftovers(self) -> list[str]:
        """Return what lies beside the output."""
        return sorted(path.name for path in self.driver.out.iterdir() if path.name != self.case.output)

    def check_synced(self) -> None:
        """Check that files are synced before the output gets its name, and its folder after that."""
        moves = [at for at, call in enumerate(self.calls) if call.startswith("rename")]
        before, after = self.calls[: moves[0]], self.calls[moves[-1] :]
        last_write = max((at for at, call in enumerate(before) if call in ("write", "pwrite")), default=0)
        if "fsync" not in before[last_write:] or "fsync" not in after:
            self.report.wrong.append(f"{self.name}: the output is renamed before it is on disk: {self.calls}")

    def trial(self, what: str, **fault: Any) -> None:
        """Run the command with a fault, check what is left, and run it again without."""
        self.reset()
        found = self.driver.run(self.arguments, **fault)
        self.report.count(self.name, hit=found["code"] != 0)
        for problem in self.problems(found, fault):
            self.report.wrong.append(f"{self.name}: {what}: {problem}")

    def problems(self, found: dict[str, Any], fault: dict[str, Any]) -> Iterator[str]:
        """Give what is wrong after a trial."""
        left = snapshot(self.path)
        if left not in (self.old, self.new):
            yield f"what stands under the output's name is neither old nor new: {sorted(left or ['nothing'])}"
        code, lines = found["code"], found["err"].splitlines()
        if code == 0 and left != self.new:
            yield "the exit code is 0 and the output is not written"
        ended = code == -fault.get("signal", signal.SIGKILL) and (fault.get("mode") == "kill" or "after" in fault)
        allowed = (130,) if "after" in fault else (3, 5) if "watch" in fault else (5,)
        if code != 0 and not ended and (code not in allowed or not lines or not lines[-1].startswith("deltafmt: ")):
            yield f"exit code {code}: {' | '.join(lines)[-300:]}"
        # A signal that comes while Python itself tidies up a lock is lost: Python says so, and the command goes on.
        lost = "after" in fault and code == 0 and "xception ignored in" in found["err"]
        if ("Traceback" in found["err"] or "internal error" in found["err"]) and not lost:
            yield f"an internal error: {' | '.join(lines)[-300:]}"
        visible = [name for name in self.leftovers() if not name.startswith(".")]
        if visible:
            yield f"left behind: {visible}"
        if left == self.new and not self.force and not self.case.stands:
            return  # done, whatever was said; the same command would refuse to replace it
        again = self.driver.run(self.arguments)
        if again["code"] != 0 or snapshot(self.path) != self.new:
            yield f"the next run ends with {again['code']} ({again['err'].strip()[-300:]}) or gives another output"
        elif self.leftovers():
            yield f"the next run leaves behind {self.leftovers()}"

    def fail_calls(self, sample: int, rng: random.Random) -> None:
        """Let every call on the output fail once, and all from every call on; end the process at every call."""
        for number, call in chosen(list(enumerate(self.calls, 1)), sample, rng):
            what = f"call {number}, {call}"
            for code in ONCE:
                self.trial(f"{what}, {errno.errorcode[code]}", mode="once", at=number, error=code)
            for code in LASTING:
                self.trial(f"{what} and on, {errno.errorcode[code]}", mode="from", at=number, error=code)
            if call in ("write", "pwrite", "read", "pread"):
                self.trial(f"{what}, half of it", mode="short", at=number)
            self.trial(f"{what}, killed", mode="kill", at=number)

    def fail_inputs(self, sample: int, rng: random.Random) -> None:
        """Let every call on the inputs fail once."""
        watch = str(self.driver.inputs)
        for number, call in chosen(list(enumerate(self.reads, 1)), sample, rng):
            for code in (errno.EIO, errno.EINTR):
                what = f"input call {number}, {call}, {errno.errorcode[code]}"
                self.trial(what, mode="once", at=number, error=code, watch=watch)
            if call in ("read", "pread"):
                self.trial(f"input call {number}, {call}, half of it", mode="short", at=number, watch=watch)

    def fill_disk(self, sample: int, rng: random.Random) -> None:
        """Give the output less room than it needs: on the disk, and by the limit of a file's size."""
        size = sum(path.stat().st_size for path in self.driver.out.rglob("*") if path.is_file()) or 40_000
        for at in chosen(sorted(rng.randrange(2 * size) for _ in range(40)), sample, rng):
            self.trial(f"room for {at} bytes", mode="room", at=at)
            self.trial(f"files of at most {at} bytes", largest=at)


def chosen(items: list[Any], sample: int, rng: random.Random) -> list[Any]:
    """Return one of so many items, at random places."""
    return items if sample == 1 else [item for item in items if rng.randrange(sample) == 0]


def kill(benches: list[Bench], kills: int, rng: random.Random) -> None:
    """Send signals at random moments until so many runs were ended by one."""
    done = 0
    while done < kills:
        bench = rng.choice(benches)
        number = rng.choice(SIGNALS)
        before = bench.report.hit.get(bench.name, 0)
        after = rng.uniform(0, 1.1 * bench.seconds)
        bench.trial(f"{signal.Signals(number).name} after {after * 1000:.1f} ms", after=after, signal=int(number))
        done += bench.report.hit[bench.name] - before


def run_part(part: str, drivers: list[Driver], options: argparse.Namespace) -> Report:
    """Run one part, the cases spread over the drivers."""
    report = Report()

    def work(index: int) -> None:
        rng = random.Random(options.seed + index)
        mine = [
            Bench(drivers[index], case, force, report)
            for case in CASES[index :: len(drivers)]
            for force in ((False,) if case.stands else (False, True))
            if options.case in (None, case.name)
        ]
        if part == "kills":
            kill(mine, -(-options.kills // len(drivers)), rng)
            return
        for bench in mine:
            {"calls": bench.fail_calls, "inputs": bench.fail_inputs, "room": bench.fill_disk}[part](options.sample, rng)

    with ThreadPoolExecutor(len(drivers)) as pool:
        list(pool.map(work, range(len(drivers))))
    return report


def say(part: str, report: Report, seconds: float) -> None:
    """Print what a part found."""
    print(f"{part}: {sum(report.trials.values()):,} trials, {seconds:.0f} s")
    for name, trials in report.trials.items():
        print(f"  {name:28} {trials:6,} trials, {report.hit[name]:6,} ended the command")
    for line in report.wrong:
        print(f"  WRONG {line}")
    if not report.wrong:
        print("  the old or the new output each time, and the next run gives the new one")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="of the trials, one of N")
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="runs that end by a signal")
    parser.add_argument("--case", choices=[each.name for each in CASES], help="of the commands, one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="drivers at once")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random")
    parser.add_argument("--reader", metavar="PROGRAM", help="for bits: another reader, run as PROGRAM verify FILE")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if set(parts) - set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    wrong = 0
    # In memory, where it can be: a sync of a disk takes longer than a run.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as temporary:
        folder = Path(temporary)
        drivers: list[Driver] = []
        if set(parts) - {"bits"}:
            library, inputs = build_library(folder), folder / "inputs"
            inputs.mkdir()
            make_inputs(inputs)
            jobs = 1 if options.case else options.jobs
            drivers = [Driver(folder / f"driver-{number}", library, inputs) for number in range(jobs)]
        for part in parts:
            start = time.monotonic()
            if part == "bits":
                wrong += bit_flips.run(folder, options.sample, options.jobs, options.reader)
                continue
            report = run_part(part, drivers, options)
            say(part, report, time.monotonic() - start)
            wrong += len(report.wrong)
        for driver in drivers:
            driver.close()
    print(f"{wrong} wrong" if wrong else "nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
