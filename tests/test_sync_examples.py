"""The examples of weight sync run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent


def output_of(*command: str) -> str:
    """Return what a script prints."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_follows_another_through_a_kill_of_each() -> None:
    lines = output_of("examples/follow.py", "12").splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["the follower was killed", "the trainer was killed"]
    counts = re.fullmatch(
        r"(\d+) versions were published, (\d+) were seen by the follower, (\d+) of them are equal", lines[2]
    )
    assert counts is not None
    assert int(counts[1]) >= 12
    assert int(counts[2]) == int(counts[3]) > 8


def test_ranks_follow_through_torch_distributed() -> None:
    pytest.importorskip("torch.distributed")
    assert output_of("docs/examples/sync_distributed.py") == "version 5 is the same on 3 ranks\n"
