"""The examples of serving run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_deltas_and_the_base_in_one_batch() -> None:
    command = [sys.executable, str(EXAMPLES / "serve.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "base 0, math-4bit 4" in result.stdout


def test_three_deltas_for_three_clients() -> None:
    command = [sys.executable, str(EXAMPLES / "stream.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    streamed, _, ended = result.stdout.partition("\n\n")
    names = ["dropout-4bit", "dropout-3bit", "rounded-6bit"]
    assert [line.split(":")[0] for line in ended.splitlines()] == [f"{name} right" for name in names]
    for name, line in zip(names, ended.splitlines(), strict=True):
        pieces = [literal_eval(one.partition(": ")[2]) for one in streamed.splitlines() if one.startswith(f"{name}: ")]
        assert len(pieces) > 5
        assert "".join(pieces).strip() == literal_eval(line.partition(": ")[2])
