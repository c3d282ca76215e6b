"""The script that compares methods at equal sizes: a small run, what it writes, and how it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from ladders import DROPPED, FRACTIONS, LADDERS, TARGET
from points import first_true, method_of

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint


def test_every_rung_is_a_setting() -> None:
    for ladder in LADDERS:
        settings = [f"{ladder.method}:{options}" for options in ladder.rungs]
        methods = [method_of(setting) for setting in settings]
        assert ladder.method == TARGET or methods
        assert len(set(methods)) == len(methods)
    for _, setting_of in DROPPED:
        assert len({method_of(setting_of(part)) for part in FRACTIONS}) == len(FRACTIONS)


def test_the_first_that_holds() -> None:
    for count in range(9):
        for first in range(count + 1):
            assert first_true(count, lambda i: i >= first) == first  # noqa: B023


@pytest.mark.filterwarnings("default")  # transformers' own
def test_a_small_run_goes_on(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    accuracy = pytest.importorskip("accuracy")
    for name in accuracy.ONE_THREAD:
        monkeypatch.setenv(name, "1")  # and back, after the test
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    few = ["--limit", "8", "--ratios", "4", "24", "--workers", "1", "--out", str(tmp_path), "--device", "cpu"]

    def run(*methods: str) -> str:
        monkeypatch.setattr(sys, "argv", ["accuracy.py", str(nano), *few, "--methods", *methods])
        accuracy.main()
        return capsys.readouterr().out

    assert "deltadq" not in run("rtn")
    (records,) = tmp_path.glob("*.jsonl")
    before = records.read_text("utf-8")
    second = run("rtn", "deltadq")
    assert records.read_text("utf-8").startswith(before)
    assert "s  deltadq" in second
    assert "s  rtn" not in second  # not measured again

    (result,) = tmp_path.glob("*.json")
    points = {(each["label"], each["column"]): each for each in json.loads(result.read_text("utf-8"))["points"]}
    assert set(points) == {(label, ratio) for label in ("rtn", "deltadq") for ratio in (4.0, 24.0)}
    assert "smaller" in points["rtn", 24.0]["reason"]
    with Checkpoint(nano / "math") as finetuned:
        weights = finetuned.file_bytes
    for (_, ratio), point in points.items():
        if "reason" not in point:
            size = deltafmt.pack(
                nano / "base", nano / "math", tmp_path / "d.deltafmt", method=method_of(point["setting"]), force=True
            ).size
            assert point["size"] == size <= weights / ratio
            assert point["times"] == pytest.approx(weights / size)
            assert point["likelihood"] < 0 < point["layer_error"]
            assert point["output_error"] > 0
            assert 0 <= point["solves"] <= 1
    (chart,) = tmp_path.glob("*.svg")
    assert ET.parse(chart).getroot().tag.endswith("svg")
    (page,) = tmp_path.glob("*.md")
    assert f"| rtn | {points['rtn', 4.0]['solves']:.3f} | - |" in page.read_text("utf-8")
