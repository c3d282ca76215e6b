"""Each line of docs/checkpoint-files.md is a test, and each of these tests is a line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_each_line_of_the_page_is_a_test() -> None:
    page = (ROOT / "docs" / "checkpoint-files.md").read_text("utf-8")
    lines = [line for line in re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE) if line != "situation"]
    tested = [
        ast.literal_eval(decorator.args[0])
        for path in sorted((ROOT / "tests").glob("test_checkpoint_*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "situation"
    ]
    assert sorted(lines) == sorted(tested)
    assert len(set(lines)) == len(lines) > 30
