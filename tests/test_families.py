"""Every family of transformers: saved, packed, verified, unpacked and loaded again, it computes what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.methods import RTN
from lora_models import FAMILIES, new_family, outputs, same, shake


def loaded(model: Any, folder: Path) -> Any:
    """Return a model as its class loads it from a folder, which must hold every weight and no other."""
    found, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return found.eval()


@pytest.mark.sampled
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_survives(tmp_path: Path, name: str) -> None:
    model = new_family(name).eval()
    model.save_pretrained(tmp_path / "base")
    shake(model, 1, 0.01)
    model.save_pretrained(tmp_path / "ft")
    # As transformers loads it itself: some families do not save all that they compute with.
    expected = outputs(loaded(model, tmp_path / "ft"), name)
    # Of a narrow delta nothing is dropped: 8 bits for every element.
    for kind, method, rules in (("exact", None, [("*", None)]), ("rtn", RTN(8), [])):
        out = tmp_path / f"{kind}.deltafmt"
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", out, method=method, rules=rules)
        deltafmt.verify(out, tmp_path / "base")
        deltafmt.unpack(tmp_path / "base", out, tmp_path / kind)
        found = outputs(loaded(model, tmp_path / kind), name)
        if kind == "exact":
            assert torch.equal(found, expected)
        else:
            assert same(found, expected) or torch.allclose(found, expected, rtol=0.05, atol=0.02)
