"""An interrupted pack: what it leaves, what the next run makes of it, and that nothing is lost.

Processes are killed by a driver that imports deltafmt once and forks a child for every trial. Sections are made small
there, so that a small pair has many of them; a child counts what is written and ends itself by a signal at a chosen
moment, in the middle of a write.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Pair
from deltafmt.errors import UsageError
from many_sections import make_pair, pack_afresh

DRIVER = """
import json, os, signal, sys
from deltafmt.container import partial, writer
from deltafmt.tools.main import main
import deltafmt.pipeline.pack, deltafmt.tools.pack_cmd  # here once, and not in every child

writer.SECTION_TARGET = 1500
count = 0

def arm(trial):
    real_write, real_append = partial.PartialFile.write, partial.PartialFile._append
    def strike(file, data, whole):
        global count
        count += 1
        if count == trial["moment"]:
            file.write(data[: len(data) // 2])
            if trial["flush"]:
                file.flush()
            os.kill(os.getpid(), trial["signal"])
        whole()
    def write(self, data):
        strike(self._file, data, lambda: real_write(self, data))
    def append(self, record):
        strike(self._journal, b"half a record", lambda: real_append(self, record))
    partial.PartialFile.write = write
    partial.PartialFile._append = append

found = []
for trial in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(trial[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background starts without
        arm(trial)
        code = main(trial["arguments"])
        if trial.get("count"):
            with open(trial["count"], "w") as file:
                file.write(str(count))
        os._exit(code)
    found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(found))
"""


@dataclass
class Trial:
    """One run of the command line that is to be ended at a moment; moment 0 lets it finish."""

    folder: Path
    arguments: list[str]
    moment: int = 0
    signal: int = signal.SIGKILL
    flush: bool = True
    code: int = 0
    writes: int = 0

    @property
    def out(self) -> str:
        """Standard output."""
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        """Standard error."""
        return (self.folder / "stderr").read_text()

    @property
    def delta(self) -> Path:
        """The output file."""
        return self.folder / "d.deltafmt"

    def left(self) -> list[str]:
        """Return what lies beside the output, this test's own files aside."""
        own = {"stdout", "stderr", "count", self.delta.name}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in own)


def _run(trials: Sequence[Trial]) -> None:
    """Run trials one after the other and note their exit codes and numbers of writes."""
    told = [
        {
            "arguments": trial.arguments,
            "moment": trial.moment,
            "signal": int(trial.signal),
            "flush": trial.flush,
            "out": str(trial.folder / "stdout"),
            "err": str(trial.folder / "stderr"),
            "count": str(trial.folder / "count"),
        }
        for trial in trials
    ]
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for trial, code in zip(trials, json.loads(done.stdout), strict=True):
        trial.code = code
        if code == 0:
            trial.writes = int((trial.folder / "count").read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give a pair whose delta has many small sections."""
    return make_pair(tmp_path_factory.mktemp("pair"))


Make = Callable[..., Trial]


@pytest.fixture
def make(tmp_path: Path, pair: Pair) -> Make:
    """Give a function that prepares a pack in a folder of its own."""

    def build(name: str, *more: str, **options: Any) -> Trial:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        arguments = ["pack", str(pair.base), str(pair.finetuned), "-o", str(folder / "d.deltafmt"), "--json", *more]
        return Trial(folder, arguments, **options)

    return build


def _whole(make: Make, *more: str) -> tuple[bytes, dict[str, Any], int]:
    """Run without interruption: the file, the report, the number of writes."""
    trial = make("whole", *more)
    _run([trial])
    assert trial.code == 0
    assert trial.left() == []
    return trial.delta.read_bytes(), json.loads(trial.out), trial.writes


@pytest.mark.parametrize("options", [(), ("--profile", "cold", "--index", "rank", "--nm", "3:11")], ids=["hot", "cold"])
def test_a_killed_pack_is_taken_up_where_it_stopped(make: Make, options: tuple[str, ...]) -> None:
    expected, report, writes = _whole(make, *options)
    assert writes > 40
    rng = random.Random(20240917)
    moments = sorted({1, 2, 3, writes, *rng.sample(range(1, writes + 1), 4 if options else 12)})
    killed = [make(str(moment), *options, moment=moment, flush=rng.random() < 0.5) for moment in moments]
    _run(killed)
    for trial in killed:
        assert trial.code == -signal.SIGKILL
        assert not trial.delta.exists()
    again = [make(str(moment), *options) for moment in moments]
    _run(again)
    resumed = []
    for trial in again:
        assert (trial.code, trial.err) == (0, "")
        assert trial.delta.read_bytes() == expected
        assert trial.left() == []
        found = json.loads(trial.out)
        resumed.append(found.pop("resumed_tensors"))
        assert found == {**{key: report[key] for key in found}, "file": str(trial.delta)}
    assert resumed == sorted(resumed)  # the later the kill, the more is left to use
    assert resumed[0] == 0
    assert resumed[-1] > 20


def test_a_pack_that_is_killed_again_and_again_arrives(make: Make) -> None:
    expected, _, writes = _whole(make)
    killed = [make("one", moment=writes // 4) for _ in range(3)]
    last = make("one")
    _run([*killed, last])
    assert [trial.code for trial in killed] == [-signal.SIGKILL] * 3
    assert last.code == 0
    assert last.delta.read_bytes() == expected
    assert json.loads(last.out)["resumed_tensors"] > 0
    assert last.left() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_gives_130_and_the_next_run_goes_on(make: Make, how: signal.Signals) -> None:
    expected, _, writes = _whole(make)
    moments = [1, 2, writes // 3, writes * 2 // 3, writes]
    trials = [make(str(moment), moment=moment, signal=how) for moment in moments]
    _run(trials)
    for trial in trials:
        assert trial.code == 130
        assert not trial.delta.exists()
        assert trial.err.startswith("deltafmt: interrupted")
        assert trial.err.count("\n") == 1
        assert json.loads(trial.out)["exit_code"] == 130
        assert set(trial.left()) <= {".d.deltafmt.partial", ".d.deltafmt.partial.journal"}
    assert trials[0].left() == []  # nothing worth keeping yet
    again = [make(str(moment)) for moment in moments]
    _run(again)
    assert [trial.code for trial in again] == [0] * len(again)
    assert {trial.delta.read_bytes() for trial in again} == {expected}
    assert json.loads(again[-1].out)["resumed_tensors"] > 20
    assert [trial.left() for trial in again] == [[]] * len(again)


def test_the_old_output_survives_a_killed_replacement(make: Make) -> None:
    expected, _, writes = _whole(make)
    rng = random.Random(5)
    trials = [make(str(i), "--force", moment=rng.randint(1, writes)) for i in range(5)]
    trials += [make("int", "--force", moment=writes // 2, signal=signal.SIGINT)]
    for trial in trials:
        trial.delta.write_bytes(b"the old one")
    _run(trials)
    for trial in trials:
        assert trial.code in (-signal.SIGKILL, 130)
        assert trial.delta.read_bytes() == b"the old one"
    again = [make(trial.folder.name, "--force") for trial in trials]
    _run(again)
    for trial in again:
        assert trial.delta.read_bytes() == expected
        assert trial.left() == []


def test_a_real_process_that_is_killed_at_any_time_leaves_nothing_wrong(tmp_path: Path, pair: Pair) -> None:
    """``python -m deltafmt`` as users run it, ended from outside: at whatever point, the next run is right."""
    command = [sys.executable, "-m", "deltafmt", "pack", str(pair.base), str(pair.finetuned), "--force", "-o"]
    expected = tmp_path / "expected.deltafmt"
    subprocess.run([*command, str(expected)], check=True, capture_output=True)
    out = tmp_path / "d.deltafmt"
    rng = random.Random(11)
    for _ in range(3):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.1, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists() or out.read_bytes() == expected.read_bytes()
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.deltafmt", "expected.deltafmt"]


# Two at once


def test_a_second_pack_to_one_output_is_refused(tmp_path: Path, pair: Pair) -> None:
    out = tmp_path / "d.deltafmt"
    refused: list[str] = []

    def meanwhile(*_: object) -> None:
        if not refused:
            with pytest.raises(UsageError, match="another process is writing") as caught:
                deltafmt.pack(pair.base, pair.finetuned, out)
            refused.append(str(caught.value))

    deltafmt.pack(pair.base, pair.finetuned, out, progress=meanwhile)
    assert refused == [f"another process is writing {out}"]
    assert out.read_bytes() == pack_afresh(tmp_path, pair)


def test_two_unpacks_at_once_leave_one_whole_folder(tmp_path: Path, pair: Pair) -> None:
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, delta)
    deltafmt.unpack(pair.base, delta, tmp_path / "expected")
    outcomes: list[str] = []

    def meanwhile(*_: object) -> None:
        if not outcomes:
            outcomes.append("started")
            try:
                deltafmt.unpack(pair.base, delta, tmp_path / "out")
                outcomes.append("done")
            except deltafmt.errors.DeltafmtError:
                outcomes.append("refused")

    try:
        deltafmt.unpack(pair.base, delta, tmp_path / "out", progress=meanwhile)
        outcomes.append("done")
    except deltafmt.errors.DeltafmtError:
        outcomes.append("refused")
    assert sorted(outcomes) == ["done", "refused", "started"]
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.deltafmt", "expected", "out"]


# An unpack that fails


def test_an_interrupted_unpack_leaves_nothing(tmp_path: Path, pair: Pair) -> None:
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, delta)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deltafmt.unpack(pair.base, delta, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["d.deltafmt"]
    old = tmp_path / "out"
    old.mkdir()
    (old / "precious.txt").write_text("kept")
    (old / "model.safetensors").write_text("an earlier output")
    with pytest.raises(KeyboardInterrupt):
        deltafmt.unpack(pair.base, delta, old, force=True, progress=stop)
    assert sorted(path.name for path in old.iterdir()) == ["model.safetensors", "precious.txt"]
    deltafmt.unpack(pair.base, delta, old, force=True)
    assert not (old / "precious.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.deltafmt", "out"]
