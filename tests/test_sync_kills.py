"""A subscriber that is killed at any moment leaves one version, or what the next one finds out to be none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent


def test_a_killed_subscriber_leaves_the_old_version_or_the_new_one() -> None:
    command = [sys.executable, str(ROOT / "fuzz" / "sync_kills.py"), "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 kills: the tensors were one version ")
