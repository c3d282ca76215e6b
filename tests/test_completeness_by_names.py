"""Tests of fine-tunes that are not whole and whose names or layouts are not the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Raw, Tensors, raw, read_folder, refused, write_folder
from deltafmt.errors import InvalidFileError, UsageError
from tiny_checkpoints import FINE, experts, language_model, renamed, stacked, tuned, vision_tower

LACKING = "model.layers.1.mlp.down_proj.weight"


def compiled(tensors: Tensors) -> Tensors:
    """Return tensors as a compiled model saves them."""
    return renamed(tensors, lambda name: f"_orig_mod.{name}")


def without(tensors: Tensors, *ends: str) -> Tensors:
    """Return tensors but for those whose names end so."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def test_what_is_lacking_is_named_as_the_base_names_it(tmp_path: Path, cli: Cli) -> None:
    base = language_model()
    a = write_folder(tmp_path / "base", base)
    b = write_folder(tmp_path / "ft", without(compiled(tuned(base)), LACKING))
    refused(cli("pack", a, b, "-o", tmp_path / "d"), 3, f"lacks 1 tensor of the base's {len(base)}: {LACKING}")
    result = deltafmt.pack(a, b, tmp_path / "d", method=FINE, missing="removed")
    assert result.removed == [LACKING]
    assert [(change.name, change.base) for change in result.names] == [("_orig_mod.*", ("*",))]
    # The base's tensors would stand beside names of another kind.
    refused(cli("pack", a, b, "-o", tmp_path / "e", "--missing", "same"), 2, LACKING, '"_orig_mod.', "names are others")


def test_nothing_is_taken_from_the_base_where_nothing_is_lacking(tmp_path: Path) -> None:
    base = language_model()
    a = write_folder(tmp_path / "base", base)
    b = write_folder(tmp_path / "ft", compiled(tuned(base)))
    assert deltafmt.pack(a, b, tmp_path / "d", method=FINE, missing="same").taken == []


@pytest.mark.parametrize(("word", "shape", "count"), [("down_proj", (0,), 2), ("embed", (0, 64), 1)])
def test_empty_matrices_under_other_names(tmp_path: Path, word: str, shape: tuple[int, ...], count: int) -> None:
    """A save without gathering, of a compiled model: the message is about the emptiness, not about the names."""
    base = language_model()
    ft = compiled(tuned(base))
    emptied = {name: Raw(tensor.dtype, shape, b"") for name, tensor in ft.items() if word in name}
    a = write_folder(tmp_path / "base", base)
    b = write_folder(tmp_path / "ft", ft | emptied)
    with pytest.raises(InvalidFileError, match="no elements"):
        deltafmt.pack(a, b, tmp_path / "d", method=FINE)
    result = deltafmt.pack(a, b, tmp_path / "d", method=FINE, missing="removed")
    assert len(result.removed) == count
    deltafmt.unpack(a, tmp_path / "d", tmp_path / "out")
    assert read_folder(tmp_path / "out").keys() == ft.keys() - emptied.keys()


def test_a_module_saved_alone_is_whole_or_refused(tmp_path: Path) -> None:
    base = language_model()
    inner = {name.removeprefix("model."): t for name, t in tuned(base).items() if name != "lm_head.weight"}
    a = write_folder(tmp_path / "base", base)
    whole = write_folder(tmp_path / "whole", inner)
    assert deltafmt.pack(a, whole, tmp_path / "d", method=FINE).removed == ["lm_head.weight"]
    part = write_folder(tmp_path / "part", without(inner, "layers.1.mlp.down_proj.weight"))
    with pytest.raises(InvalidFileError, match=f"lacks 1 tensor .*: {LACKING}"):
        deltafmt.pack(a, part, tmp_path / "e", method=FINE)


@pytest.mark.parametrize("whole", [True, False])
def test_a_text_model_inside_by_its_type(tmp_path: Path, whole: bool) -> None:
    """The text model's names are not one module's names: its head stands beside the module of the layers."""
    text = language_model()
    base = renamed(text, lambda name: name.replace("model.", "model.language_model.")) | vision_tower("model.visual.")
    inside = {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}
    a = write_folder(tmp_path / "a", base, files={"config.json": json.dumps(inside).encode()})
    ft = tuned(text) if whole else without(tuned(text), "layers.1.mlp.down_proj.weight")
    b = write_folder(tmp_path / "b", ft, files={"config.json": b'{"model_type": "mistral"}'})
    if whole:
        result = deltafmt.pack(a, b, tmp_path / "d", method=FINE)
        assert result.removed == sorted(name for name in base if name.startswith("model.visual."))
        return
    lacking = LACKING.replace("model.", "model.language_model.", 1)
    with pytest.raises(InvalidFileError, match=f"lacks 1 tensor .*: {lacking}"):
        deltafmt.pack(a, b, tmp_path / "d", method=FINE)


def test_an_unknown_layout_hides_no_gap(tmp_path: Path) -> None:
    """What is left on both sides must have as many elements, or something is lacking."""
    base = experts()
    ft = {
        name: raw(tensor.floats().reshape(tensor.shape).swapaxes(1, 2), tensor.dtype) if ".experts." in name else tensor
        for name, tensor in stacked(tuned(base)).items()
    }
    gap = next(name for name in ft if ".experts." in name)
    large = language_model()["model.embed_tokens.weight"]
    rows = {f"large.{number}": large for number in range(40)}
    a = write_folder(tmp_path / "base", base | rows)
    assert deltafmt.pack(a, write_folder(tmp_path / "ft", ft | rows), tmp_path / "d", method=FINE).kept
    cut = write_folder(tmp_path / "cut", without(ft, gap) | rows)
    with pytest.raises(InvalidFileError, match=r"lacks .*experts"):
        deltafmt.pack(a, cut, tmp_path / "e", method=FINE)


def test_a_name_of_both_kinds_is_no_option(tmp_path: Path) -> None:
    base = language_model()
    a = write_folder(tmp_path / "base", base)
    b = write_folder(tmp_path / "ft", without(compiled(tuned(base)), LACKING))
    with pytest.raises(UsageError, match="save the fine-tune with the base's names"):
        deltafmt.plan_for_target(a, b, target_ratio=3, missing="same")
