"""The commands of docs/lora.md print what the page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from conftest import Cli

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_what_the_commands_print(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (console,) = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "lora.md").read_text("utf-8"), re.DOTALL)
    commands = re.findall(r"\$ deltafmt (.*)\n([^$]*)", console)
    assert len(commands) == 4
    for command, shown in commands:
        result = cli(*shlex.split(command))
        assert (result.code, result.err) == (0, "")
        assert result.out == shown
