"""The base that a delta is applied to: under other names, in another layout; and the messages that name it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Tensors, read_folder, refused, write_folder
from deltafmt.checkpoint.base_name import base_name
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import UsageError, WrongBaseError
from tiny_checkpoints import FINE, experts, fused, language_model, renamed, stacked, tuned

situation = pytest.mark.situation


def packed(tmp_path: Path, base: Tensors, finetuned: Tensors) -> tuple[Path, Tensors]:
    """Pack a pair; return the delta and what it unpacks to with its own base."""
    a, b = write_folder(tmp_path / "meta-llama", base), write_folder(tmp_path / "ft", finetuned)
    deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=FINE)
    deltafmt.unpack(a, tmp_path / "d.deltafmt", tmp_path / "own")
    return tmp_path / "d.deltafmt", read_folder(tmp_path / "own")


BASES = {
    "a prefix": lambda base: renamed(base, lambda name: f"language_model.{name}"),
    "fused": fused,
    "fused, and a prefix": lambda base: renamed(fused(base), lambda name: f"base_model.model.{name}"),
}


@situation(
    "a base that was saved again under other names or in another layout, for `unpack`, `verify` and `export-lora`"
)
@pytest.mark.parametrize("how", BASES)
def test_a_base_in_another_form(tmp_path: Path, cli: Cli, how: str) -> None:
    base = language_model()
    delta, own = packed(tmp_path, base, tuned(base))
    other = write_folder(tmp_path / "other", BASES[how](base))
    assert deltafmt.verify(delta, other).base_tensors == deltafmt.verify(delta, tmp_path / "meta-llama").base_tensors
    assert deltafmt.unpack(other, delta, tmp_path / "out").names
    assert read_folder(tmp_path / "out") == own
    done = cli("unpack", other, delta, "-o", tmp_path / "said")
    assert done.code == 0
    assert "names: " in done.out
    assert cli("verify", delta, "--base", other, "--json").json()["names"]
    assert cli("verify", delta, "--base", tmp_path / "meta-llama", "--json").json()["names"] == []


@pytest.mark.parametrize("before", ["single", "stacked"])
def test_a_base_of_experts_in_another_form(tmp_path: Path, before: str) -> None:
    base = experts()
    forms = {"single": base, "stacked": stacked(base)}
    other = forms.pop("stacked" if before == "single" else "single")
    for finetuned in ("single", "stacked"):
        ft = tuned(base) if finetuned == "single" else stacked(tuned(base))
        delta, own = packed(tmp_path / finetuned, forms[before], ft)
        deltafmt.unpack(write_folder(tmp_path / finetuned / "other", other), delta, tmp_path / finetuned / "out")
        assert read_folder(tmp_path / finetuned / "out") == own


def test_a_base_in_another_form_with_other_bytes(tmp_path: Path) -> None:
    base = language_model()
    delta, _ = packed(tmp_path, base, tuned(base))
    other = write_folder(tmp_path / "other", language_model("language_model.", seed=400))
    with pytest.raises(WrongBaseError, match=r'differs .*; the delta names its base "meta-llama"'):
        deltafmt.unpack(other, delta, tmp_path / "out")
    result = deltafmt.unpack(other, delta, tmp_path / "out", force_base=True)
    assert result.mismatched


@pytest.mark.parametrize("option", [("--rename", "=talker."), ("--strip-prefix", "talker.")])
def test_rules_say_where_the_base_is(tmp_path: Path, cli: Cli, option: tuple[str, str]) -> None:
    base = language_model()
    delta, own = packed(tmp_path, base, tuned(base))
    both = write_folder(tmp_path / "both", language_model("thinker.", seed=400) | language_model("talker."))
    refused(cli("unpack", both, delta, "-o", tmp_path / "out"), 4, "it has no tensor", "--rename", "meta-llama")
    assert cli("verify", delta, "--base", both, *option).code == 0
    assert cli("unpack", both, delta, "-o", tmp_path / "out", *option).code == 0
    assert read_folder(tmp_path / "out") == own
    with pytest.raises(UsageError, match="not of the form FROM=TO"):
        deltafmt.verify(delta, both, rename=["x"])


def test_a_part_that_the_base_lacks(tmp_path: Path) -> None:
    base = experts()
    delta, _ = packed(tmp_path, base, stacked(tuned(base)))
    lacking = {name: tensor for name, tensor in base.items() if ".experts.2." not in name}
    with pytest.raises(WrongBaseError, match=r"it has no tensor .*experts"):
        deltafmt.unpack(write_folder(tmp_path / "lacking", lacking), delta, tmp_path / "out")


# The name of the base


@situation("a wrong base: the message says how the delta names its base")
def test_a_delta_names_its_base(tmp_path: Path, cli: Cli) -> None:
    base = language_model()
    delta, _ = packed(tmp_path, base, tuned(base))
    assert cli("inspect", delta, "--json").json()["metadata"]["base"] == "meta-llama"
    wrong = write_folder(tmp_path / "wrong", language_model(seed=400))
    for command in (
        ("unpack", wrong, delta, "-o", tmp_path / "out"),
        ("verify", delta, "--base", wrong),
        ("analyze", wrong, tmp_path / "ft", "--delta", delta),
    ):
        refused(cli(*command), 4, "wrong base", 'the delta names its base "meta-llama"')
    done = cli("pack", tmp_path / "meta-llama", tmp_path / "ft", "-o", tmp_path / "e", "--base-name", "mine", "--json")
    assert done.json()["base_name"] == "mine"
    refused(cli("verify", tmp_path / "e", "--base", wrong), 4, 'names its base "mine"')
    none = cli("pack", tmp_path / "meta-llama", tmp_path / "ft", "-o", tmp_path / "f", "--base-name", "", "--json")
    assert none.json()["base_name"] is None
    assert "names its base" not in refused(cli("verify", tmp_path / "f", "--base", wrong), 4, "differs")


@pytest.mark.parametrize(
    ("folder", "configured", "expected"),
    [
        ("base", None, "base"),
        ("base", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("base", "/home/somebody/secret/llama", "base"),
        ("base", "./llama", "base"),
        ("base", 7, "base"),
        ("hub/models--Qwen--Qwen3-8B/snapshots/0123abcd", None, "Qwen/Qwen3-8B"),
        ("hub/models--gpt2/snapshots/0123abcd", None, "gpt2"),
        # A name of bytes that are no UTF-8.
        ("hub/models--a\udcff--b/snapshots/0123abcd", None, "a?/b"),
        ("b\udcff", None, "b?"),
    ],
)
def test_the_name_of_a_base(tmp_path: Path, folder: str, configured: object, expected: str) -> None:
    config = {} if configured is None else {"config.json": json.dumps({"_name_or_path": configured}).encode()}
    written = write_folder(tmp_path / folder, language_model(), files=config)
    with Checkpoint(written) as checkpoint:
        assert base_name(checkpoint) == expected
    with Checkpoint(written / "model.safetensors") as checkpoint:
        wanted = expected if "hub" in folder else f"{Path(folder).name}/model.safetensors".replace("\udcff", "?")
        assert base_name(checkpoint) == wanted


# diff and analyze


@situation("`diff` and `analyze` compare the tensors that belong together")
def test_diff_and_analyze(tmp_path: Path, cli: Cli) -> None:
    base = language_model()
    a = write_folder(tmp_path / "a", base)
    b = write_folder(tmp_path / "b", renamed(fused(tuned(base)), lambda name: f"_orig_mod.{name}"))
    done = cli("diff", a, b)
    assert "only in" not in done.out
    assert "names: _orig_mod.* comes from * of the base" in done.out
    assert cli("diff", a, b, "--json").json()["names"]
    same = write_folder(tmp_path / "same", renamed(base, lambda name: f"_orig_mod.{name}"))
    assert cli("diff", a, same, "--exit-code").code == 0
    report = cli("analyze", a, b, "--json").json()
    assert report["skipped"] == {}
    assert report["names"]
    two = write_folder(tmp_path / "two", language_model("thinker.") | language_model("talker.", seed=400))
    assert "only in" in cli("diff", two, b).out
    assert "only in B" not in cli("diff", two, a, "--rename", "=thinker.").out
    assert "only in B" not in cli("diff", two, a, "--strip-prefix", "thinker.").out
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(a, b, delta, method=FINE)
    refused(cli("diff", delta, delta, "--rename", "a=b"), 2, "rules of names are for two checkpoints")
    assert cli("analyze", a, b, "--delta", delta, "--json").code == 0
