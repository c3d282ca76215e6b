"""The example of serving runs as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_deltas_and_the_base_in_one_batch() -> None:
    command = [sys.executable, str(EXAMPLES / "serve.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "base 0, math-4bit 4" in result.stdout
