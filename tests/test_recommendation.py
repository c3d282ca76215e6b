"""What ``analyze`` recommends to try first."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Cli, Pair, normal, nudge, write_pair
from deltafmt.analysis import analyze, tables
from deltafmt.analysis.recommendation import SETTINGS, kind_of, median_columns

WEIGHT = "model.layers.0.up.weight"


@pytest.mark.parametrize(
    ("norm", "columns", "kind"),
    [
        (0.0, 4096, "same"),
        (0.01, 4096, "small"),
        (0.01, 256, "narrow"),
        (0.0382, 576, "middle"),
        (0.35, 384, "large"),
        (None, 384, "large"),
    ],
)
def test_kinds(norm: float | None, columns: int, kind: str) -> None:
    assert kind_of(norm, columns) == kind


def test_the_columns_of_half_of_all_elements() -> None:
    assert median_columns([(64, 100), (128, 50), (4096, 149)]) == 128
    assert median_columns([(64, 100), (128, 50), (4096, 151)]) == 4096
    assert median_columns([(7, 1)]) == 7


def pair_of(folder: Path, scale: float) -> Pair:
    """Return a pair of one wide matrix with values of about 1, whose delta is so large."""
    base = normal(0, (32, 512), dtype="F32")
    return write_pair(folder, {WEIGHT: base}, {WEIGHT: nudge(base, 1, scale=scale) if scale else base})


@pytest.mark.parametrize(("scale", "kind"), [(0.0, "same"), (0.01, "small"), (0.04, "middle"), (0.5, "large")])
def test_a_report(tmp_path: Path, scale: float, kind: str) -> None:
    pair = pair_of(tmp_path, scale)
    report = analyze(pair.base, pair.finetuned)
    found = report.recommendation
    assert found is not None
    assert (found.kind, found.columns) == (kind, 512)
    assert found.relative_norm == pytest.approx(scale, rel=0.05)
    table = tables.recommendation_table(report)
    assert [row[0] for row in table.rows[1:]] == [setting.options for setting in SETTINGS[kind]]
    assert "deltafmt evaluate" in table.note


def test_nothing_to_recommend(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"bias": normal(0, (4,))}, {"bias": normal(1, (4,))})
    report = analyze(pair.base, pair.finetuned)
    assert report.recommendation is None
    assert len(tables.recommendation_table(report).rows) == 1


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    pair = pair_of(tmp_path, 0.01)
    printed = cli("analyze", pair.base, pair.finetuned).out
    assert printed.index("By depth") < printed.index("What to try first")
    obj = cli("analyze", pair.base, pair.finetuned, "--json").json()["recommendation"]
    assert obj["kind"] == "small"
    assert [setting["options"] for setting in obj["settings"]] == [setting.options for setting in SETTINGS["small"]]


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_are_options_of_pack(tmp_path: Path, cli: Cli, kind: str) -> None:
    pair = pair_of(tmp_path, 0.1)
    for setting in SETTINGS[kind]:
        options = setting.options.replace("FILE", str(tmp_path / "text")).split()
        if "--calibration" in options:
            continue
        result = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "x.deltafmt", "--force", *options)
        assert result.code == 0 or "no plan fits" in result.err, setting
