"""Every command in the README and the pages prints what stands below it; ``docs/update_outputs.py`` rewrites that."""

from __future__ import annotations

import shutil
from pathlib import Path

import console_blocks
import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS_TRANSFORMERS = ("benchmarks/solve.py", "deltafmt evaluate")


@pytest.mark.parametrize("page", console_blocks.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    steps = console_blocks.steps(page.read_text("utf-8"))
    if any(name in step.command for step in steps for name in NEEDS_TRANSFORMERS):
        pytest.importorskip("transformers")
    if any(step.command.startswith("cc ") for step in steps) and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = console_blocks.Folder(tmp_path)
    for step in steps:
        printed = folder.run(step.command)
        shown = "\n".join(step.shown)
        assert console_blocks.matches(step.shown, printed), (
            f"$ {step.command}\n" + "\n".join(printed) + "\nnot\n" + shown
        )


def test_an_output_that_differs_is_seen() -> None:
    text = "```console\n$ one \\\n  two\na\n...\nb 3 s\n$ three\n```\n"
    first, second = console_blocks.steps(text)
    assert (first.command, first.shown, second.shown) == ("one \\\n  two", ["a", "...", "b 3 s"], [])
    assert console_blocks.matches(["a", "...", "b ... s"], ["a", "x", "y", "b 9 s"])
    assert not console_blocks.matches(["a", "...", "b 3 s"], ["a", "b 4 s"])
    assert not console_blocks.matches(["a"], ["a", "b"])
    assert not console_blocks.matches([], ["a"])
    assert console_blocks.rewritten(["a", "...", "z"], ["b", "c", "d"]) == ["b", "...", "d"]
