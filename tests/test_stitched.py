"""Tensors made of parts of other tensors: the same bytes as the parts put together, in pieces of any size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import plain, safetensors_bytes, write_folder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.stitched import Run, stitch, stitch_parts
from deltafmt.index.entries import BasePart
from tiny_checkpoints import FINE, experts, stacked, tuned


@given(st.data())
def test_any_runs(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    arrays = {
        f"t{i}": np.arange(100 * i, 100 * i + rows * columns, dtype="<u2").reshape(rows, columns)
        for i, rows in enumerate(sizes)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        raws = {name: plain(array.view(np.float16)) for name, array in arrays.items()}
        path.write_bytes(safetensors_bytes(raws))
        with Checkpoint(path) as checkpoint:
            runs, expected = [], []
            for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=5)):
                first = data.draw(st.integers(0, len(arrays[name]) - 1))
                last = data.draw(st.integers(first + 1, len(arrays[name])))
                runs.append(Run(checkpoint.tensors[name], first * columns, (last - first) * columns))
                expected.append(arrays[name][first:last])
            whole = np.concatenate(expected)
            tensor = stitch("made", whole.shape, runs)
            start = data.draw(st.integers(0, len(whole)))
            stop = data.draw(st.integers(start, len(whole)))
            with tensor.row_range(start, stop) as rows:
                assert np.array_equal(rows, whole[start:stop])
            assert b"".join(map(bytes, tensor.pieces())) == whole.tobytes()
            head = f"deltafmt tensor v1\nF16\n{whole.shape[0]},{whole.shape[1]}\n".encode()
            assert tensor.fingerprint() == blake3(head + whole.tobytes()).digest()
            assert tensor.equals(stitch("again", whole.shape, runs))
            again = stitch_parts("again", "F16", whole.shape, tensor.parts(), checkpoint.tensors)
            assert again is not None
            assert again.fingerprint() == tensor.fingerprint()


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {"x": plain(np.zeros((4, 4), np.float32))})
    with Checkpoint(folder) as checkpoint:
        for part in (BasePart("y", 0, 4), BasePart("x", 13, 4), BasePart("x", 2**60, 4)):
            assert stitch_parts("made", "F32", (4,), [part], checkpoint.tensors) is None
        assert stitch_parts("made", "BF16", (4,), [BasePart("x", 0, 4)], checkpoint.tensors) is None
        assert stitch_parts("x", "F32", (4, 4), [BasePart("x", 0, 16)], checkpoint.tensors) is checkpoint.tensors["x"]


INTERRUPTED = """
import os, signal, sys
from deltafmt.container import partial, writer
import deltafmt
from deltafmt.methods import RTN
writer.SECTION_TARGET = 1500
record = partial.PartialFile.record
def strike(self, *args):
    record(self, *args)
    if len(self.sections) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] == "kill":
    partial.PartialFile.record = strike
result = deltafmt.pack(*sys.argv[1:4], method=RTN(8))
print(result.resumed)
"""


def test_an_interrupted_pack_with_parts_goes_on(tmp_path: Path) -> None:
    base = experts()
    a, b = write_folder(tmp_path / "a", base), write_folder(tmp_path / "b", stacked(tuned(base)))

    def run(out: str, how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", INTERRUPTED, str(a), str(b), str(tmp_path / out), how]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    assert run("d", "kill").returncode == -signal.SIGKILL
    done = run("d", "go on")
    assert int(done.stdout) >= 3, done.stderr
    assert run("e", "afresh").stdout.strip() == "0"
    assert (tmp_path / "d").read_bytes() == (tmp_path / "e").read_bytes()
    with deltafmt.open(tmp_path / "d") as delta:
        assert delta.container.features == 1
    assert deltafmt.verify(tmp_path / "d", a).base_tensors


@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_a_plan_for_a_target_counts_the_parts(tmp_path: Path, profile: str) -> None:
    base = experts()
    a, b = write_folder(tmp_path / "a", base), write_folder(tmp_path / "b", stacked(tuned(base)))
    plan = deltafmt.plan_for_target(a, b, target_ratio=2, profile=profile)
    made = deltafmt.pack(a, b, tmp_path / "d", target_ratio=2, profile=profile)
    assert made.size == plan.size if profile == "hot" else made.size <= plan.size
    assert deltafmt.pack(a, b, tmp_path / "e", method=FINE).actions["add"] == len(stacked(base))
