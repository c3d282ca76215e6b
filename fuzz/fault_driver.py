"""A process that imports deltafmt once, and forks a child for every trial of a command that goes wrong.

It is started with ``failing_calls.so`` preloaded, reads one trial a line (JSON) on standard input, and answers with a
line each: the exit code, what was printed, and the calls that were made on the watched folder.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import deltafmt.analysis
import deltafmt.tools.main
from deltafmt.container import writer

# Sections this small give a small file many of them, so that a run can stop between two.
SECTION = 4000
TIMEOUT = 60.0
MODES = {"off": 0, "count": 1, "once": 2, "from": 3, "kill": 4, "short": 5, "room": 6}


def main(library: str) -> None:
    """Run trials until standard input ends."""
    writer.SECTION_TARGET = SECTION
    for name in deltafmt.tools.main.COMMANDS:
        deltafmt.tools.main._module(name)
    faults = ctypes.CDLL(library)
    faults.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
    faults.faults_calls.restype = ctypes.c_long
    faults.faults_name.argtypes = [ctypes.c_long]
    faults.faults_name.restype = ctypes.c_char_p
    gc.collect()
    gc.freeze()  # so that a child that collects garbage copies no pages
    print("ready", flush=True)
    for line in sys.stdin:
        trial = json.loads(line)
        print(json.dumps(run(trial, faults)), flush=True)


def run(trial: dict[str, Any], faults: Any) -> dict[str, Any]:
    """Run one trial in a child; see ``fuzz/faults.py`` for what a trial says."""
    folder = Path(trial["notes"])
    for name in ("out", "err", "calls"):
        (folder / name).unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work(trial, faults, folder)
        finally:
            os._exit(code)
    killed = wait(child, trial.get("after"), trial.get("signal", signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    calls = folder / "calls"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - start,
        "killed": killed,
        "err": (folder / "err").read_text() if (folder / "err").exists() else "",
        "calls": json.loads(calls.read_text()) if calls.exists() else [],
    }


def wait(child: int, after: float | None, number: int) -> bool:
    """Wait until a child ends; send it a signal after some seconds and return True if it was still running then."""
    if after is not None:
        time.sleep(after)
        running = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        os.kill(child, number)
        if running and number == signal.SIGKILL:
            return True
    else:
        running = False
    end = time.monotonic() + TIMEOUT
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    return running


def work(trial: dict[str, Any], faults: Any, folder: Path) -> int:
    """Run the command in the child, with the fault that the trial names; note the calls if it ends by itself."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background starts without
    if trial.get("largest") is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial["largest"], resource.RLIM_INFINITY))
    mode = MODES[trial.get("mode", "off")]
    faults.faults_arm(trial["watch"].encode(), mode, trial.get("at", 0), trial.get("error", 0))
    code = deltafmt.tools.main.main(trial["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    found = [faults.faults_name(number).decode() for number in range(faults.faults_calls())]
    faults.faults_arm(b"/", 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    # Whole or not at all: a signal may end this process while it writes.
    (folder / "calls.new").write_text(json.dumps(found))
    (folder / "calls.new").rename(folder / "calls")
    return code


if __name__ == "__main__":
    main(sys.argv[1])
