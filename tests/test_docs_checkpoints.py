"""Every situation of docs/checkpoints.md has a test, and every test of a situation a line there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "checkpoints.md"


def situations() -> Iterator[str]:
    """Give the first cell of every row of the tables of situations."""
    for table in PAGE.read_text("utf-8").split("| situation | what happens |\n|---|---|\n")[1:]:
        for line in table.split("\n\n")[0].splitlines():
            row = re.fullmatch(r"\| (.+?) \| .+ \|", line)
            assert row is not None, line
            yield row[1]


def in_tests() -> Iterator[str]:
    """Give the text of every ``@situation(...)`` of the tests."""
    for path in TESTS.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("situation", "pytest.mark.situation"):
                yield ast.literal_eval(node.args[0])


def test_every_line_is_a_test() -> None:
    lines = list(situations())
    assert len(lines) == len(set(lines))
    assert set(lines) == set(in_tests())
