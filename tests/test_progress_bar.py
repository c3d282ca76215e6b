"""Progress bars: shown on a terminal, and not in the way of an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deltafmt
from conftest import Pair
from pairs import pack_pair

pty = pytest.importorskip("pty")


def on_a_terminal(*arguments: str | Path) -> tuple[int, str, str]:
    """Run a command whose standard error is a terminal; return its code, its output, and what the terminal got."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "deltafmt", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as running:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux ends the output of a terminal that nobody holds any more with an error
            pass
        finally:
            os.close(ours)
        out, _ = running.communicate()
    return running.returncode, out, shown.decode()


def test_verify_reports_every_tensor_once(tmp_path: Path, small: Pair) -> None:
    seen: list[tuple[str, int]] = []
    delta = pack_pair(small, tmp_path / "d.deltafmt")
    deltafmt.verify(delta, progress=lambda name, size: seen.append((name, size)))
    assert sorted(seen) == sorted((name, len(tensor.data)) for name, tensor in small.b.items())


def test_verify_on_a_terminal(tmp_path: Path, small: Pair) -> None:
    delta = pack_pair(small, tmp_path / "d.deltafmt")
    code, out, shown = on_a_terminal("verify", delta)
    assert (code, "file intact" in out) == (0, True)
    assert "verifying" in shown
    code, _, shown = on_a_terminal("verify", delta, "--json")
    assert (code, shown) == (0, "")


def test_a_damaged_index_is_named_as_without_a_terminal(tmp_path: Path, small: Pair) -> None:
    delta = pack_pair(small, tmp_path / "d.deltafmt")
    content = bytearray(delta.read_bytes())
    content[-20] ^= 1
    delta.write_bytes(content)
    with pytest.raises(deltafmt.errors.InvalidFileError) as caught:
        deltafmt.verify(delta)
    code, out, shown = on_a_terminal("verify", delta)
    assert (code, out) == (3, "")
    assert str(caught.value) in shown.replace("\r\n", " ")
