"""Pairs whose sides spell or lay out the same tensors differently, from pack to the unpacked folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Tensors, normal, nudge, raw, read_folder, refused, write_folder
from deltafmt.errors import UsageError, WrongBaseError
from tiny_checkpoints import (
    FINE,
    by_head,
    experts,
    fused,
    language_model,
    renamed,
    stacked,
    tuned,
    vision_tower,
)

Rename = Callable[[str], str]

situation = pytest.mark.situation


def check(
    tmp_path: Path, base: Tensors, finetuned: Tensors, *, compressed: int | None = None, **options: object
) -> None:
    """Pack, verify and unpack; every matrix must be a delta, and every tensor come back under its own name."""
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", finetuned)
    delta = tmp_path / "d.deltafmt"
    result = deltafmt.pack(a, b, delta, method=FINE, **options)
    matrices = sum(len(tensor.shape) > 1 for tensor in finetuned.values())
    assert result.actions.get("add", 0) == (matrices if compressed is None else compressed), result.kept
    assert deltafmt.verify(delta, a).base_tensors
    deltafmt.unpack(a, delta, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in finetuned.items()
    }
    for name, tensor in finetuned.items():
        assert np.abs(found[name].floats() - tensor.floats()).max() < 0.003, name
    before = read_folder(a)
    (tmp_path / "cold").mkdir()
    deltafmt.repack(delta, tmp_path / "cold" / "d.deltafmt", profile="cold")
    deltafmt.unpack(a, tmp_path / "cold" / "d.deltafmt", tmp_path / "cold" / "out")
    assert read_folder(tmp_path / "cold" / "out") == found
    assert read_folder(a) == before


def in_layer(wrapper: str) -> Rename:
    return lambda name: name.replace(".layers.1.", f".layers.1.{wrapper}.")


PREFIXES = {
    "compiled": "_orig_mod.",
    "distributed": "module.",
    "FSDP": "_fsdp_wrapped_module.",
    "PEFT": "base_model.model.",
    "several": "module._orig_mod.base_model.model.",
    "multimodal": "language_model.",
    "any other": "backbone.net.",
}


@situation("one side's names begin with a wrapper's or a model's prefix: `_orig_mod.`, `module.`, `base_model.model.`")
@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=list(PREFIXES))
def test_a_prefix_on_one_side(tmp_path: Path, prefix: str, side: str) -> None:
    base = language_model()
    with_prefix = renamed(base if side == "base" else tuned(base), lambda name: prefix + name)
    check(tmp_path, *((with_prefix, tuned(base)) if side == "base" else (base, with_prefix)))


@situation("wrappers stand in the middle of names, also several at once, and only in some layers")
@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module"]
)
def test_wrappers_in_the_middle(tmp_path: Path, wrapper: str) -> None:
    base = language_model()
    check(tmp_path, base, renamed(tuned(base), in_layer(wrapper)))


def test_wrappers_on_both_sides(tmp_path: Path) -> None:
    base = language_model()
    check(
        tmp_path,
        renamed(base, lambda name: f"module.{name}"),
        renamed(tuned(base), lambda name: f"_orig_mod.{in_layer('_orig_mod')(name)}"),
    )


@situation("the inner model alone against the model with a head, either way round")
@pytest.mark.parametrize("inner", ["base", "finetuned"])
def test_the_inner_model_alone(tmp_path: Path, inner: str) -> None:
    base = language_model()
    ft = tuned(base)

    def cut(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}

    if inner == "finetuned":
        check(tmp_path, base, cut(ft))
        with deltafmt.open(tmp_path / "d.deltafmt") as delta:
            assert delta.container.removed == ("lm_head.weight",)
    else:
        matrices = sum(len(tensor.shape) > 1 for tensor in ft.values())
        check(tmp_path, cut(base), ft, compressed=matrices - 1)


def _qwen(name: str) -> str:
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return f"model.{name}" if name.startswith("visual.") else name


def _llava(name: str) -> str:
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


FAMILIES: dict[str, tuple[Tensors, Rename]] = {
    "Qwen2.5-VL": (language_model() | vision_tower("visual."), _qwen),
    "LLaVA": (language_model("language_model.") | vision_tower(), _llava),
}


@situation("a family that transformers 5 saves under other names: Qwen2.5-VL, LLaVA")
@pytest.mark.parametrize("new", ["base", "finetuned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_renamed_family(tmp_path: Path, family: str, new: str) -> None:
    base, rename = FAMILIES[family]
    ft = tuned(base)
    check(tmp_path, *((renamed(base, rename), ft) if new == "base" else (base, renamed(ft, rename))))


@situation("a text model that was tuned from the language model inside a multimodal one")
def test_a_text_model_of_a_multimodal_one(tmp_path: Path) -> None:
    text = language_model()
    base = renamed(text, lambda name: f"language_model.{name}") | vision_tower()
    a = write_folder(
        tmp_path / "a",
        base,
        files={"config.json": b'{"model_type": "mistral3", "text_config": {"model_type": "mistral"}}'},
    )
    b = write_folder(tmp_path / "b", tuned(text), files={"config.json": b'{"model_type": "mistral"}'})
    result = deltafmt.pack(a, b, tmp_path / "typed.deltafmt", method=FINE)
    assert (result.architecture, len(result.removed)) == ("", 2)
    assert [str(change) for change in result.names] == [
        f"* comes from language_model.* of the base ({result.actions['add']} tensors)"
    ]
    check(tmp_path, base, tuned(text))


@situation("names without layer numbers, and a prefix on one side")
def test_a_model_without_numbers(tmp_path: Path) -> None:
    base = {name: t for name, t in language_model().items() if "layers.0" in name and len(t.shape) > 1}
    base = renamed(base, lambda name: "net." + name.rpartition("layers.0.")[2])
    check(tmp_path, base, renamed(tuned(base), lambda name: name.removeprefix("net.")))


@situation("experts as one tensor for all on one side, and one tensor each on the other (Qwen-MoE, Mixtral)")
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_stacked_experts(tmp_path: Path, side: str) -> None:
    base = experts()
    ft = tuned(base)
    check(tmp_path, *((stacked(base), ft) if side == "base" else (base, stacked(ft))))


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_stacked_experts_of_mixtral(tmp_path: Path, side: str) -> None:
    words = ("w1", "w3", "w2")
    base = experts(words, "block_sparse_moe")
    ft = tuned(base)

    def new(tensors: Tensors) -> Tensors:
        return renamed(stacked(tensors, words), lambda name: name.replace("block_sparse_moe", "mlp"))

    check(tmp_path, *((new(base), ft) if side == "base" else (base, new(ft))))


def test_experts_stacked_on_both_sides(tmp_path: Path) -> None:
    base = experts()
    check(tmp_path, stacked(base), stacked(tuned(base)))


@situation("q, k and v, or gate and up, in one matrix on one side and apart on the other (Phi-3)")
@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_fused_projections(tmp_path: Path, side: str, prefix: str) -> None:
    base = language_model()
    ft = tuned(base)
    pair = (fused(base), ft) if side == "base" else (base, fused(ft))
    check(tmp_path, renamed(pair[0], lambda name: prefix + name), pair[1])


@situation("fused or stacked in another order than row after row: the tensor is stored whole, never as a wrong delta")
@pytest.mark.parametrize("how", ["heads alternate", "v first"])
def test_fused_in_another_order(tmp_path: Path, how: str) -> None:
    base = language_model()
    ft = by_head(fused(tuned(base))) if how == "heads alternate" else fused(tuned(base), "vqk")
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", ft)
    result = deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=FINE)
    assert set(result.kept.values()) == {"its values have nothing to do with the base's"}
    assert set(result.kept) == {name for name in ft if "qkv" in name}
    deltafmt.unpack(a, tmp_path / "d.deltafmt", tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert all(found[name] == ft[name] for name in result.kept)


# Where nothing is found, or too much


def two_towers() -> Tensors:
    return language_model("thinker.") | language_model("talker.", seed=400)


@situation("two parts of the base fit equally well: refused, and `--rename` decides")
def test_two_towers(tmp_path: Path, cli: Cli) -> None:
    text = language_model()
    a, b = write_folder(tmp_path / "base", two_towers()), write_folder(tmp_path / "ft", tuned(text))
    err = refused(
        cli("pack", a, b, "-o", tmp_path / "d"), 4, "'=talker.' and '=thinker.'", "--rename", "--strip-prefix"
    )
    assert "architecture" not in err
    for number, rule in enumerate(
        (["--rename", "=thinker."], ["--rename", "*=thinker.*"], ["--strip-prefix", "thinker."])
    ):
        out = tmp_path / f"{number}.deltafmt"
        assert cli("pack", a, b, "-o", out, "--method", "rtn:bits=8", *rule).code == 0
        done = cli("inspect", out, "--json").json()
        assert done["names"] == [{"name": "*", "base": ["thinker.*"], "tensors": 16}]
        assert done["removed"] == sorted(name for name in two_towers() if name.startswith("talker."))
    wrong = cli("pack", a, b, "-o", tmp_path / "w", "--rename", "nothing.=thinker.")
    refused(wrong, 2, "rename 'nothing.=thinker.' matches no tensor")
    refused(cli("pack", a, b, "-o", tmp_path / "w", "--strip-prefix", "no."), 2, "begins with the prefix 'no.'")


@situation("the same shapes under names that no rule explains: refused, with both sides' names and `--rename`")
def test_names_that_nothing_explains(tmp_path: Path, cli: Cli) -> None:
    base = language_model()
    ft = renamed(tuned(base), lambda name: "".join(chr(ord(c) + 1) if c.isalpha() else c for c in name))
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", ft)
    refused(
        cli("pack", a, b, "-o", tmp_path / "d"), 4, "same shapes under other names", "npefm.", '"model.', "--rename"
    )


def test_another_model_under_a_prefix(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "base", language_model())
    b = write_folder(tmp_path / "ft", language_model("zzz.", seed=400))
    with pytest.raises(WrongBaseError, match=r"values of tensor .* have nothing to do with") as caught:
        deltafmt.pack(a, b, tmp_path / "d")
    assert caught.value.remedy is not None
    assert caught.value.remedy.option == "rename"


@pytest.mark.parametrize("rule", ["model.", "a=b=c", "a.*=b", ""])
def test_what_is_no_rule(rule: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^rename "):
        deltafmt.pack(tmp_path, tmp_path, tmp_path / "d", rename=[rule])


def test_new_tensors_beside_a_prefix_are_stored_whole(tmp_path: Path) -> None:
    """A new head has no counterpart, and does not spoil the match of the layers."""
    base = language_model(head=False)
    ft = renamed(tuned(base), lambda name: f"transformer.{name}") | {
        "score.weight": tuned(language_model())["lm_head.weight"]
    }
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", ft)
    result = deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=FINE)
    assert result.kept == {"score.weight": "not in the base"}


# Types of model


def typed(kind: str) -> dict[str, bytes]:
    return {"config.json": json.dumps({"model_type": kind}).encode()}


@situation("another `model_type` with the same tensors: refused, and `--allow-architecture` packs it and records it")
def test_another_type_of_model(tmp_path: Path, cli: Cli) -> None:
    base = language_model()
    a = write_folder(tmp_path / "base", base, files=typed("Yi"))
    b = write_folder(tmp_path / "ft", tuned(base), files=typed("llama"))
    out = tmp_path / "d.deltafmt"
    refused(cli("pack", a, b, "-o", out), 4, "'Yi' model", "'llama' model", "--allow-architecture")
    done = cli("pack", a, b, "-o", out, "--allow-architecture", "--method", "rtn:bits=8", "--json").json()
    assert done["architecture"] == "Yi to llama"
    assert cli("inspect", out, "--json").json()["metadata"]["architecture"] == "Yi to llama"
    refused(cli("analyze", a, b), 4, "--allow-architecture")
    assert cli("analyze", a, b, "--allow-architecture", "--json").code == 0


def test_another_type_needs_the_same_tensors_all_the_same(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "base", {"x.0.weight": tuned(language_model())["lm_head.weight"]}, files=typed("a"))
    b = write_folder(tmp_path / "ft", language_model(head=False), files=typed("b"))
    with pytest.raises(WrongBaseError, match="different architecture: tensor"):
        deltafmt.pack(a, b, tmp_path / "d", allow_architecture=True)


@situation("a second copy of the layers in the fine-tune: a moving average, a frozen reference")
@pytest.mark.parametrize("first", ["", "model_"])
def test_a_second_copy_of_the_layers(tmp_path: Path, first: str) -> None:
    base = language_model()
    ft = tuned(base)
    average = renamed(tuned(ft), lambda name: f"ema.{name}")
    check(tmp_path, base, renamed(ft, lambda name: f"{first}.{name}" if first else name) | average)


def test_new_layers_are_stored_whole(tmp_path: Path) -> None:
    base = language_model()
    new = {name.replace("layers.1.", "layers.2."): t for name, t in language_model(seed=300).items() if ".1." in name}
    ft = tuned(base) | new
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", ft)
    result = deltafmt.pack(a, b, tmp_path / "d.deltafmt", method=FINE)
    assert set(result.kept) == {name for name, tensor in new.items() if len(tensor.shape) > 1}
    assert result.names == []


def test_a_rule_that_explains_most_names_is_told(tmp_path: Path, cli: Cli) -> None:
    base = language_model()
    ft = renamed(tuned(base), lambda name: "net." + name.replace("layers.1.mlp.down_proj", "layers.1.other"))
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", ft)
    command = ("pack", a, b, "-o", tmp_path / "d", "--method", "rtn:bits=8")
    refused(cli(*command), 4, "by the rule 'net.='", '"net.model.layers.1.other.weight"', "down_proj", "--rename")
    done = cli(*command, "--rename", "net.=", "--json").json()
    assert done["kept_exactly"] == {"net.model.layers.1.other.weight": "not in the base"}


@situation(
    "some layers on both sides have no counterpart, such as experts that are stacked with rows and columns exchanged"
)
@pytest.mark.parametrize("most", [False, True])
def test_layers_without_a_counterpart(tmp_path: Path, cli: Cli, most: bool) -> None:
    base = experts()
    ft = {
        name: raw(tensor.floats().reshape(tensor.shape).swapaxes(1, 2), tensor.dtype) if ".experts." in name else tensor
        for name, tensor in stacked(tuned(base)).items()
    }
    if not most:
        large = normal(1, (4000, 64), scale=0.05)
        base, ft = {**base, "large": large}, {**ft, "large": nudge(large, 2, scale=0.003)}
    a, b = write_folder(tmp_path / "base", base), write_folder(tmp_path / "ft", ft)
    done = cli("pack", a, b, "-o", tmp_path / "d", "--method", "rtn:bits=8")
    if most:
        refused(done, 4, "experts are stacked in one tensor on one side", ".experts.down_proj", ".experts.0.down_proj")
        return
    assert done.code == 0
    assert "warning: 4 tensors of the fine-tune's layers and 18 of the base's have no counterpart" in done.out
    assert "--rename FROM=TO" in done.out
    found = cli("pack", a, b, "-o", tmp_path / "e", "--json").json()["unmatched"]
    assert found["finetuned"] == sorted(name for name in ft if ".experts." in name)
    assert len(found["base"]) == 18
    deltafmt.unpack(a, tmp_path / "d", tmp_path / "out")
    assert all(read_folder(tmp_path / "out")[name] == ft[name] for name in found["finetuned"])
