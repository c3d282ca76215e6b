"""The main job on real models: packed and unpacked, a fine-tune still solves its problems."""

from __future__ import annotations

from pathlib import Path

import pytest
from solve import accuracy

import deltafmt
from deltafmt.methods import DeltaDQ

pytest.importorskip("transformers")


def solves(model: Path, home: Path, problems: int) -> float:
    return accuracy(model, home / "tokenizer.json", home / "eval.jsonl", problems)


@pytest.mark.filterwarnings("default")  # transformers' own
def test_the_pair_of_the_repository(nano: Path, tmp_path: Path) -> None:
    method = DeltaDQ(2, 2, 4, share=1)  # nothing to share where all is kept; sharing pads rows to 128
    result = deltafmt.pack(nano / "base", nano / "math", tmp_path / "d.deltafmt", method=method)
    deltafmt.unpack(nano / "base", tmp_path / "d.deltafmt", tmp_path / "out")
    assert result.ratio > 3.7
    assert solves(nano / "base", nano, 100) == 0
    assert solves(tmp_path / "out", nano, 300) >= solves(nano / "math", nano, 300) - 0.02


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("method", "ratio", "share"),
    [(DeltaDQ(4, 16, 4), 14, 0.98), (DeltaDQ(4, 16, 2), 26, 0.97), (DeltaDQ(2, 16, 2), 45, 0.9)],
)
def test_a_wider_model(models: Path, tmp_path: Path, method: DeltaDQ, ratio: float, share: float) -> None:
    home = models / "wordmath"
    result = deltafmt.pack(home / "base", home / "math", tmp_path / "d.deltafmt", method=method)
    deltafmt.unpack(home / "base", tmp_path / "d.deltafmt", tmp_path / "out")
    assert result.ratio >= ratio
    assert solves(tmp_path / "out", home, 100) >= share
