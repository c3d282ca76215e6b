"""Adapters whose names differ from the base's."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, normal, read_file, refused, write_folder
from deltafmt.methods import SVD
from lora_files import PREFIX, pair_of, write_adapter
from tiny_checkpoints import fused, language_model, renamed, tuned

LAYERS = 2


def base(folder: Path, prefix: str = "") -> Path:
    names = [f"{prefix}model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("q", "o")]
    return write_folder(folder, {name: normal(i, (48, 24)) for i, name in enumerate(names)})


def adapter(folder: Path, start: str = "model.", inside: str = "") -> Path:
    pairs = [pair_of(f"{start}layers.{i}.{inside}q", 48, 24, seed=10 + i) for i in range(LAYERS)]
    return write_adapter(folder, {name: tensor for pair in pairs for name, tensor in pair.items()})


@pytest.mark.situation("`import-lora`: the adapter's names differ from the base's by a prefix or a wrapper")
@pytest.mark.parametrize(
    ("of_base", "of_adapter", "inside"),
    [
        ("", "_orig_mod.model.", ""),
        ("", "model.", "_checkpoint_wrapped_module."),
        ("language_model.", "model.", ""),
        ("", "model.language_model.", ""),
        ("base.net.", "model.", ""),
    ],
)
def test_a_prefix_or_a_wrapper(tmp_path: Path, of_base: str, of_adapter: str, inside: str) -> None:
    a, b = base(tmp_path / "base", of_base), adapter(tmp_path / "adapter", of_adapter, inside)
    result = deltafmt.import_lora(a, b, tmp_path / "d.deltafmt")
    assert result.ranks == {4: LAYERS}
    assert sum(change.tensors for change in result.names) == (LAYERS if result.names else 0)
    with deltafmt.open(tmp_path / "d.deltafmt") as delta:
        changed = [name for name in delta if delta[name].action == "add"]
        assert delta.metadata["base"] == "base"
    assert changed == [f"{of_base}model.layers.{i}.q.weight" for i in range(LAYERS)]


def test_rules(tmp_path: Path, cli: Cli) -> None:
    a, b = base(tmp_path / "base"), adapter(tmp_path / "adapter", "stack.", "attention.")
    command = ("import-lora", a, b, "-o", tmp_path / "d.deltafmt")
    inner = adapter(tmp_path / "inner", "model.language_model.")
    said = "names: model.language_model.* comes from model.* of the base (2 tensors)"
    assert said in cli("import-lora", a, inner, "-o", tmp_path / "w.deltafmt").out
    refused(cli(*command, "--rename", "nothing.=stack."), 2, "rename 'nothing.=stack.' matches no tensor of")
    refused(cli(*command), 4, "matches nothing", "--rename", "--strip-prefix")
    assert cli(*command, "--rename", "stack.layers.*.attention.q.*=model.layers.*.q.*").code == 0
    assert cli(*command, "--force", "--strip-prefix", "stack.", "--rename", "*.attention.*=*.*").code == 0


@pytest.mark.situation("`export-lora` of a delta whose names differ from its base's")
@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.language_model."])
def test_an_exported_adapter_names_the_modules_of_the_base(tmp_path: Path, cli: Cli, prefix: str) -> None:
    """Also of tensors that the delta stores whole, for which it records no base."""
    tensors = language_model(head=False)
    ft = renamed(tuned(tensors), lambda name: prefix + name.removeprefix("model."))
    a, b = write_folder(tmp_path / "base", tensors), write_folder(tmp_path / "ft", ft)
    deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=SVD(rank=4))
    assert cli("export-lora", tmp_path / "d.deltafmt", "-o", tmp_path / "adapter", "--base", a).code == 0
    found, _ = read_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0].removesuffix(".weight") for name in found}
    assert modules == {name.removesuffix(".weight") for name in tensors}
    deltafmt.import_lora(a, tmp_path / "adapter", tmp_path / "back.deltafmt")


@pytest.mark.situation("`export-lora` of a delta whose layout differs from its base's")
def test_a_fused_tensor_is_no_adapters(tmp_path: Path, cli: Cli) -> None:
    tensors = language_model()
    a, b = write_folder(tmp_path / "base", tensors), write_folder(tmp_path / "ft", fused(tuned(tensors)))
    deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=SVD(rank=4))
    refused(cli("export-lora", tmp_path / "d.deltafmt", "-o", tmp_path / "adapter", "--base", a), 2, "another layout")
