"""Adapters whose names are not the base's, where the base ties its head to its embedding or has other names now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Tensors, normal, nudge, read_file, read_folder, refused, write_folder
from deltafmt.errors import InvalidFileError, Remedy, UsageError
from deltafmt.methods import SVD
from lora_files import PREFIX, pair_of, write_adapter
from tiny_checkpoints import HIDDEN, VOCABULARY, language_model, renamed, tuned

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A type that transformers does not know, so that names alone decide.
TIED = json.dumps(
    {"architectures": ["TinyForCausalLM"], "model_type": "tiny", "tie_word_embeddings": True, "vocab_size": VOCABULARY}
).encode()


def tied_base(folder: Path, tensors: Tensors | None = None) -> Path:
    return write_folder(folder, tensors or language_model(head=False), files={"config.json": TIED})


def of_embedding(folder: Path, module: str, **config: Any) -> Path:
    """Write an adapter of the embedding and of one layer's matrix."""
    start = module.removesuffix("embed_tokens")
    a = {f"{module}.lora_embedding_A": normal(1, (4, VOCABULARY), scale=0.1)}
    b = {f"{module}.lora_embedding_B": normal(2, (HIDDEN, 4), scale=0.1)}
    return write_adapter(folder, a | b | pair_of(f"{start}layers.0.self_attn.q_proj", HIDDEN, HIDDEN), **config)


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("model.", {}),
        ("net.backbone.", {}),
        ("stack.", {"rename": ["stack.=model."]}),
        ("net.backbone.model.", {"strip_prefix": ["net.backbone."]}),
    ],
)
def test_a_tie_is_heeded_whatever_the_names(tmp_path: Path, start: str, options: dict[str, list[str]]) -> None:
    """An adapter of the embedding alone unties the head, also where the adapter calls the embedding otherwise."""
    base = tied_base(tmp_path / "base")
    adapter = of_embedding(tmp_path / "adapter", f"{start}embed_tokens")
    result = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt", **options)
    assert result.ranks == {4: 2}
    assert result.config == {"tie_word_embeddings": False}
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    found, before = read_folder(tmp_path / "out"), read_folder(base)
    assert found[HEAD] == before[EMBEDDING]
    assert not np.array_equal(found[EMBEDDING].floats(), before[EMBEDDING].floats())


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    base = tied_base(tmp_path / "base")
    tensors = {name: normal(3, (HIDDEN,)) for name in ("stack.norm.weight", "model.norm.weight")}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    with pytest.raises(InvalidFileError, match=r'two tensors are the base\'s tensor "model\.norm\.weight"'):
        deltafmt.import_lora(base, adapter, tmp_path / "d", rename=["stack.=model."])


def test_a_rule_for_no_name(tmp_path: Path) -> None:
    base, adapter = tied_base(tmp_path / "base"), of_embedding(tmp_path / "adapter", "model.embed_tokens")
    with pytest.raises(UsageError, match=r"rename 'x\.=model\.' matches no tensor of"):
        deltafmt.import_lora(base, adapter, tmp_path / "d", rename=["x.=model."])


def untied(prefix: str = "") -> Tensors:
    """Return a fine-tune whose head was untied from the embedding, and then trained."""
    base = language_model(head=False)
    return renamed(tuned(base) | {HEAD: nudge(base[EMBEDDING], 77, scale=0.003)}, lambda name: prefix + name)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_an_untied_head_is_exported_whole(tmp_path: Path, prefix: str) -> None:
    """The delta has it as a change of the embedding; PEFT would add factors of it to both ends."""
    base = tied_base(tmp_path / "base")
    ft = write_folder(tmp_path / "ft", untied(prefix))
    delta = tmp_path / "d.deltafmt"
    assert deltafmt.pack(base, ft, delta, method=SVD(rank=4)).kept == {}
    with pytest.raises(UsageError, match=rf'"{prefix}lm_head\.weight" is a delta of "model\.embed_tokens') as caught:
        deltafmt.export_lora(delta, tmp_path / "adapter")
    assert caught.value.remedy == Remedy("base", None)
    result = deltafmt.export_lora(delta, tmp_path / "adapter", base=base)
    assert "lm_head" in result.saved
    found, _ = read_file(tmp_path / "adapter" / "adapter_model.safetensors")
    deltafmt.unpack(base, delta, tmp_path / "out")
    wanted = read_folder(tmp_path / "out")
    assert found[f"{PREFIX}lm_head.weight"] == wanted[f"{prefix}lm_head.weight"]
    deltafmt.import_lora(base, tmp_path / "adapter", tmp_path / "back.deltafmt")
    deltafmt.unpack(base, tmp_path / "back.deltafmt", tmp_path / "back")
    back = read_folder(tmp_path / "back")
    assert back[HEAD] == wanted[f"{prefix}lm_head.weight"]
    near = np.abs(back[EMBEDDING].floats() - wanted[f"{prefix}{EMBEDDING}"].floats()).max()
    assert near < 0.01


def test_an_adapter_names_the_modules_of_the_base_that_is_given(tmp_path: Path, cli: Cli) -> None:
    """The base was saved again under other names since the delta was made of it."""
    tensors = language_model(head=False)
    a, b = write_folder(tmp_path / "base", tensors), write_folder(tmp_path / "ft", tuned(tensors))
    deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=SVD(rank=4))
    again = write_folder(tmp_path / "again", renamed(tensors, lambda name: f"wrapped.{name}"))
    deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "adapter", base=again)
    found, _ = read_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith(f"{PREFIX}wrapped.model.") for name in found)
    other = write_folder(tmp_path / "other", renamed(tensors, lambda name: f"x.{name.replace('model.', 'y.')}"))
    rules = ("--rename", "model.=x.y.")
    assert cli("export-lora", tmp_path / "d.deltafmt", "-o", tmp_path / "z", "--base", other, *rules).code == 0


def test_a_second_copy_has_no_place_in_an_adapter(tmp_path: Path, cli: Cli) -> None:
    tensors = language_model(head=False)
    ft = tuned(tensors)
    average = renamed(tuned(ft), lambda name: f"ema.{name}")
    a = write_folder(tmp_path / "base", tensors, files={"config.json": TIED})
    b = write_folder(tmp_path / "ft", ft | average)
    deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=SVD(rank=4))
    for more in ((), ("--base", a)):
        refused(cli("export-lora", tmp_path / "d.deltafmt", "-o", tmp_path / "z", *more), 2, '"ema.', "use unpack")
