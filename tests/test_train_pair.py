"""The script that trains a pair for the benchmarks: its texts, and a run of its small mode."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pair_texts import TASKS, plain_text
from solve import accuracy

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.terms.floats import widen

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
train_pair = pytest.importorskip("train_pair")
TINY = train_pair.Size(32, 48, 1, 2, 1, 4, 24, 3, 3, 1e-3, 1e-3, 2, 4)
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_texts_follow_from_the_seed() -> None:
    assert plain_text(random.Random(1)) == plain_text(random.Random(1)) != plain_text(random.Random(2))


def test_the_answers_of_lists_are_right() -> None:
    for seed in range(200):
        question, answer = TASKS["lists"](random.Random(seed))
        items = question.partition("List: ")[2].partition(".")[0].split(", ")
        steps = question.partition(". First ")[2].removesuffix(".\nAnswer:").split(". Then ")
        *states, count = answer.strip().replace(" #### ", " ").split(". ")
        assert len(states) == len(steps)
        for step, state in zip(steps, states, strict=True):
            word = step.split()[-1]
            if step == "sort it":
                items = sorted(items)
            elif step == "turn it around":
                items = items[::-1]
            elif step.startswith("drop"):
                items.remove(word)
            else:
                items.append(word)
            assert state.partition(": ")[2].split(", ") == items
        assert int(count) == len(items)


def test_the_answers_of_table_are_right() -> None:
    for seed in range(200):
        question, answer = TASKS["table"](random.Random(seed))
        _, *lines, asked, _ = question.split("\n")
        rows = {name: rest for name, *rest in (line.split(" | ") for line in lines)}
        of_whom = asked.removesuffix("?").split()[-1]
        at = of_whom if of_whom in rows else next(name for name, row in rows.items() if row[0] == of_whom)
        for _ in range(asked.count("friend")):
            at = rows[at][2]
        assert answer.endswith(f"{at}. #### {rows[at]['home' in asked]}")


@pytest.mark.filterwarnings("default")  # transformers' own
def test_a_small_pair(tmp_path: Path) -> None:
    options = ["--small", "--device", "cpu", "--steps", "4", "--tune-steps", "3", "--tasks", "table"]
    command = [sys.executable, str(BENCHMARKS / "train_pair.py"), "--out", str(tmp_path), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "table: base solves 0.000" in result.stdout
    with Checkpoint(tmp_path / "base") as base, Checkpoint(tmp_path / "table") as finetuned:
        assert list(base.tensors) == list(finetuned.tensors)
        for name, tensor in finetuned.tensors.items():
            with tensor.row_range(0, tensor.rows) as raw, base.tensors[name].row_range(0, tensor.rows) as before:
                assert np.isfinite(widen(raw, tensor.dtype)).all()
                assert (raw != before).any() or len(tensor.shape) == 1, name  # every matrix has moved
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(finetuned.files)
    problems = tmp_path / "eval-table.jsonl"
    assert set(json.loads(problems.read_text("utf-8").splitlines()[0])) == {"question", "answer"}
    assert accuracy(tmp_path / "table", tmp_path / "tokenizer.json", problems, 10) <= 1


@pytest.mark.filterwarnings("default")
def test_the_same_seed_gives_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(folder: str, seed: int, tasks: list[str]) -> bytes:
        train_pair.run(tmp_path / folder, TINY, tasks, torch.device("cpu"), seed, math.inf)
        return b"".join((tmp_path / folder / name / "model.safetensors").read_bytes() for name in ("base", *tasks))

    first = run("a", 0, ["lists"])
    assert run("b", 0, ["lists"]) == first
    assert run("c", 1, ["lists"]) != first
    capsys.readouterr()
    assert run("a", 0, ["lists", "table"]).startswith(first)
    said = capsys.readouterr().out
    assert "\nlists:\n" not in f"\n{said}"  # what is there is kept
    assert "\ntable:\n" in f"\n{said}"


@pytest.mark.filterwarnings("default")
def test_a_training_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_pair.run(tmp_path, replace(TINY, base_steps=10**6), [], torch.device("cpu"), 0, 2 / 60)
    assert "stopped after" in capsys.readouterr().out
