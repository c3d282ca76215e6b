"""What small files that ask for much cost: the memory and the time of every command, each in a process of its own.

    python fuzz/costs.py [--only TEXT]

The files are those of fuzz/hostile.py, all below 64 KiB and all valid. Each command must take at most 256 MB above what
it has at the start and 2 seconds of one processor, or refuse the file by the name of a limit or of what is wrong.
Times are of this machine: the exit code is 1 if memory is over the limit, and a time that is over it is marked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import FILES, make_base

import deltafmt
from deltafmt.container.reader import Container
from deltafmt.errors import DeltafmtError
from deltafmt.pipeline import summary

MEMORY = 256 * 10**6
SECONDS = 2.0
Work = Callable[[Path, Path, Path], object]


def load(file: Path, base: Path, out: Path) -> object:  # noqa: ARG001 - as the others
    """Load a file to the CPU."""
    import deltafmt.torch

    return deltafmt.torch.load(file, "cpu")


def inspect(file: Path, base: Path, out: Path) -> object:  # noqa: ARG001 - as the others
    """Give all that ``inspect`` prints."""
    with Container(file) as container:
        for entry in container.entries():
            summary.describe_entry(entry)
        return json.dumps(summary.summary_obj(container))


def unpack(file: Path, base: Path, out: Path) -> object:
    """Unpack onto the base, whatever its fingerprint."""
    return deltafmt.unpack(base, file, out / "m", force_base=True, threads=1)


def restore(file: Path, base: Path, out: Path) -> object:  # noqa: ARG001 - as the others
    """Verify with the base: what is restored is restored in memory."""
    return deltafmt.verify(file, base, threads=1)


def apply(file: Path, base: Path, out: Path) -> object:
    """Apply a chain of one link."""
    return deltafmt.apply(base, [file], out / "m", threads=1)


def repack(profile: str) -> Work:
    """Return a repack to a profile."""
    return lambda file, _, out: deltafmt.repack(file, out / "o.deltafmt", profile=profile)


COMMANDS: dict[str, Work] = {
    "open": lambda file, *_: deltafmt.open(file).close(),
    "inspect": inspect,
    "verify": lambda file, *_: deltafmt.verify(file, threads=1),
    "diff": lambda file, *_: deltafmt.diff(file, file),
    "verify base": restore,
    "unpack": unpack,
    "apply": apply,
    "load": load,
    "export-lora": lambda file, _, out: deltafmt.export_lora(file, out / "a"),
    "repack hot": repack("hot"),
    "repack cold": repack("cold"),
}


def measure(work: Work, file: Path, base: Path) -> dict[str, Any]:
    """Run a command in a child, and return the memory and time that it took, and why it refused the file, if it did."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as out:
        child = os.fork()
        if child == 0:
            os.close(reader)
            answer = measured(work, file, base, Path(out))
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
    return json.loads(data) if data else {"refused": "the process was ended", "memory": 1 << 60, "seconds": 0.0}


def measured(work: Work, file: Path, base: Path, out: Path) -> dict[str, Any]:
    """Run a command in this process."""
    # "5" sets the peak of the memory to what it is now.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    refused = ""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            work(file, base, out)
    except DeltafmtError as error:
        refused = str(error)
    return {"refused": refused, "memory": resident("VmHWM") - before, "seconds": time.process_time() - start}


def resident(field: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not say how much memory is taken")


def main() -> int:
    """Measure every command on every file and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="files whose name has this in it")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.RLIM_INFINITY))
    import torch  # once, before the children start

    import deltafmt.torch  # noqa: F401

    torch.set_num_threads(1)
    wrong = 0
    print(f"{'file':24} {'bytes':>7}  {'command':12} {'MB':>7} {'CPU s':>6}  ends")
    with tempfile.TemporaryDirectory() as temporary:
        base, digest = make_base(Path(temporary))
        for name, write in FILES.items():
            if options.only not in name:
                continue
            file = write(Path(temporary) / "d.deltafmt", digest)
            for command, work in COMMANDS.items():
                found = measure(work, file, base)
                over, slow = found["memory"] > MEMORY, found["seconds"] > SECONDS
                wrong += over
                mark = " OVER" * over + " SLOW" * slow
                end = found["refused"].partition(": ")[2] or found["refused"] or "done"
                size = file.stat().st_size
                figures = f"{found['memory'] / 1e6:7.1f} {found['seconds']:6.2f}"
                print(f"{name:24} {size:7,}  {command:12} {figures}  {end[:100]}{mark}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
