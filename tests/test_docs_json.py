"""docs/json.md lists the fields that the commands print with --json: all of them, and no others."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import NANO, Cli
from deltafmt.tools.main import COMMANDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "json.md"

Pattern = tuple[str, ...]

# Each section of the page names the runs that together print every field: ``<!-- run: verify OUT --json -->``.
RUN = re.compile(r"^<!-- run: (.*) -->$", re.MULTILINE)
CALIBRATED = {"calibration_tokens", "uncalibrated", "sequential", "notes"}


def sections() -> dict[str, str]:
    return dict(section.split("\n", 1) for section in PAGE.read_text("utf-8").split("\n## ")[1:])


def documented() -> dict[str, list[Pattern]]:
    fields = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
    return {title: [segments(field) for field in fields.findall(body)] for title, body in sections().items()}


RUNS = {title: RUN.findall(body) for title, body in sections().items() if title != "Every command"}


def segments(field: str) -> Pattern:
    return tuple(part for name in field.split(".") for part in re.split(r"(?=\[\])", name))


def leaves(value: Any, at: Pattern = ()) -> Iterator[Pattern]:
    children = (
        value.items()
        if isinstance(value, dict)
        else (("[]", one) for one in value or ())
        if isinstance(value, list)
        else ()
    )
    empty = True
    for key, child in children:
        empty = False
        yield from leaves(child, (*at, key))
    if empty:
        yield at


def covers(pattern: Pattern, leaf: Pattern) -> bool:
    """Tell whether a field of the page stands for a value; a leaf may be a list, a map or a null that ends early."""
    if "*" in pattern:
        pattern, leaf = pattern[:-1], leaf[: len(pattern) - 1]
    return len(leaf) <= len(pattern) and all(p in ("NAME", part) for p, part in zip(pattern, leaf, strict=False))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def show(cli: Cli, folder: Path, make_tied_pair: tuple[Path, Path]) -> Callable[[str], Any]:
    names = {
        "BASE": NANO / "base",
        "MATH": NANO / "math",
        "OTHER": NANO / "math" / "model.safetensors",
        "TEXT": NANO / "eval.jsonl",
        "TOKENIZER": NANO / "tokenizer.json",
        "OUT": folder / "out.deltafmt",
        "SMALL": make_tied_pair[0],
        "LARGE": make_tied_pair[1],
    }

    def run(command: str) -> Any:
        result = cli(*(str(names.get(word, word)) for word in shlex.split(command)))
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


@pytest.fixture
def make_tied_pair(folder: Path) -> tuple[Path, Path]:
    """A fine-tune with a tied tensor, an unchanged one, and without one that the base has."""
    from conftest import normal, nudge, write_folder

    old = {name: normal(number, (64, 64)) for number, name in enumerate(("embed", "same", "gone"))}
    new = nudge(old["embed"], 9)
    finetuned = {"embed": new, "lm_head": new, "same": old["same"]}
    return write_folder(folder / "small", {**old, "lm_head": old["embed"]}), write_folder(folder / "large", finetuned)


def test_every_command_has_a_section() -> None:
    assert all(RUNS.values())
    assert {title.split()[0] for title in documented()} - {"Every"} == set(COMMANDS)


@pytest.mark.parametrize("title", RUNS)
def test_fields(title: str, show: Callable[[str], Any]) -> None:
    pages = documented()
    known = [*pages["Every command"], *pages[title]]
    command = title.split(maxsplit=1)[0]
    found = {leaf for line in RUNS[title] for out in [show(line)] if line.startswith(command) for leaf in leaves(out)}
    for leaf in found:
        assert any(covers(pattern, leaf) for pattern in known), leaf
    for pattern in pages[title]:
        assert pattern[0] in CALIBRATED or any(len(leaf) > 0 and covers(pattern, leaf) for leaf in found), pattern


def test_fields_of_a_calibrated_pack(show: Callable[[str], Any]) -> None:
    pytest.importorskip("transformers")
    text = f"--calibration {NANO / 'eval.jsonl'} --tokenizer {NANO / 'tokenizer.json'} --calibration-tokens 1000"
    out = show(f"pack BASE MATH -o OUT --method gptq --bits 2 {text} --include '*.layers.0.mlp.down_proj*' --json")
    known = [*documented()["Every command"], *documented()["pack"]]
    assert CALIBRATED - {"notes"} <= set(out)
    for leaf in leaves(out):
        assert any(covers(pattern, leaf) for pattern in known), leaf


def test_fields_of_an_error(cli: Cli) -> None:
    out = json.loads(cli("verify", "missing.deltafmt", "--json").out)
    assert {(key,) for key in out} == set(documented()["Every command"])
