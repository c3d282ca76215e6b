"""Deltas of low rank as LoRA adapters: round trips, bands in one pair of factors, and what is no adapter's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import (
    Cli,
    Raw,
    Tensors,
    normal,
    nudge,
    raw,
    read_file,
    read_folder,
    refused,
    safetensors_bytes,
    write_folder,
)
from deltafmt.errors import NonFiniteError, Remedy, UsageError, WrongBaseError
from deltafmt.methods import RTN, SVD, DeltaCoMe
from deltafmt.pipeline.lora_peft import rank_patterns
from lora_files import BASE_FILES, PREFIX, Files, base_tensors, pair_of, product, small_files, write_adapter
from strategies import examples


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return small_files(tmp_path)


@pytest.fixture
def delta(files: Files, tmp_path: Path) -> Path:
    return deltafmt.import_lora(files.base, files.adapter, tmp_path / "d.deltafmt").path


def read_adapter(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    tensors, _ = read_file(folder / "adapter_model.safetensors")
    assert all(name.startswith(PREFIX) for name in tensors)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, config


def test_an_adapter_comes_back(files: Files, delta: Path, tmp_path: Path) -> None:
    result = deltafmt.export_lora(delta, tmp_path / "out")
    tensors, config = read_adapter(tmp_path / "out")
    assert (result.rank, result.modules, result.saved) == (4, 2, [])
    assert result.nbytes == sum(len(tensor.data) for tensor in tensors.values())
    assert tensors.keys() == files.factors.keys()
    for name, tensor in tensors.items():
        scaling = 2 if "lora_B" in name else 1
        old = files.factors[name]
        assert tensor == Raw(old.dtype, old.shape, raw(old.floats() * scaling, "BF16").data)
    assert config["target_modules"] == ["model.layers.0.q", "model.layers.10.q"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["bias"]) == (4, 4, {}, "none")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_2_SEQ_LM", None)
    assert config["base_model_name_or_path"] == "somebody/tiny"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "vocab.json"}


@examples(30)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(("BF16", "F16", "F32"))), min_size=1, max_size=4),
    st.sampled_from(("q", "embed_tokens", "c_attn")),
    st.integers(1, 24),
)
def test_a_second_round_changes_nothing(modules: list[tuple[int, str]], last: str, alpha: int) -> None:
    """What was exported and imported again is the same file: same factors, same patterns, same product."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors, factors, ranks = {}, {}, {}
        for number, (rank, dtype) in enumerate(modules):
            module = f"h.{number}.{last}"
            ranks[module] = rank
            rows, columns = (20, 30) if last == "q" else (30, 20)
            tensors[f"{module}.weight"] = normal(number, (rows, columns))
            pair = pair_of(module, 20, 30, rank, dtype)
            if last == "embed_tokens":
                pair = {key.replace("lora_", "lora_embedding_").removesuffix(".weight"): t for key, t in pair.items()}
            factors.update(pair)
        base = write_folder(folder / "base", tensors, files={"config.json": b'{"model_type": "gpt2"}'})
        adapter = write_adapter(folder / "a", factors, rank_pattern=ranks, lora_alpha=alpha, fan_in_fan_out=True)
        first = deltafmt.import_lora(base, adapter, folder / "1.deltafmt", threads=1)
        deltafmt.export_lora(first.path, folder / "b")
        written, config = read_adapter(folder / "b")
        assert written.keys() == factors.keys()
        assert config["r"] == max(ranks.values())
        assert config["fan_in_fan_out"] is (last == "c_attn")
        again = deltafmt.import_lora(base, folder / "b", folder / "2.deltafmt", threads=1)
        assert again.content_id == first.content_id


def tuned(folder: Path, files: dict[str, bytes] | None = None) -> tuple[Path, Path]:
    """Write a base and a fine-tune whose matrices in layers differ."""
    a = base_tensors()
    b = {name: nudge(tensor, 7) if ".weight" in name and "layers" in name else tensor for name, tensor in a.items()}
    found = BASE_FILES if files is None else files
    return write_folder(folder / "base", a, files=found), write_folder(folder / "tuned", b, files=found)


@pytest.mark.parametrize(
    "method", [SVD(rank=5), SVD(rank=3, bits=4), SVD(rank=2, value_dtype="F16"), DeltaCoMe("2@8+3@3", scale_group=8)]
)
def test_packed_vectors_become_factors(tmp_path: Path, method: Any) -> None:
    base, finetuned = tuned(tmp_path)
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(base, finetuned, delta, method=method)
    result = deltafmt.export_lora(delta, tmp_path / "out", base=base)
    tensors, config = read_adapter(tmp_path / "out")
    coded = getattr(method, "bits", None) or isinstance(method, DeltaCoMe)
    assert {tensor.dtype for tensor in tensors.values()} == {"F32" if coded else method.value_dtype}
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    with deltafmt.open(delta) as opened:
        names = [name for name in opened if opened[name].terms]
        for name in names:
            a, b = (tensors[f"{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
            assert a.shape[0] == sum(term.layout.rank for term in opened[name].terms)
            bands = len(opened[name].terms)
            found, wanted = product(a, b, 1), opened.delta(name)
            # Bands are added one to another, factors vector by vector.
            np.testing.assert_allclose(found, wanted, rtol=0, atol=0 if bands == 1 else 1e-6)
    assert result.modules == len(names) == 3


def test_other_dtypes(delta: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("export-lora", delta, "-o", tmp_path / "wide", "--dtype", "f32", "--task-type", "SEQ_CLS").code == 0
    wide, config = read_adapter(tmp_path / "wide")
    kept, _ = read_adapter(deltafmt.export_lora(delta, tmp_path / "kept").path)
    for name, tensor in wide.items():
        assert (tensor.dtype, tensor.shape) == ("F32", kept[name].shape)
        assert np.array_equal(tensor.floats(), kept[name].floats())
    assert config["task_type"] == "SEQ_CLS"
    refused(cli("export-lora", delta, "-o", tmp_path / "x", "--dtype", "f8"), 2, "'F8'")


def test_values_beyond_a_dtype(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"q.weight": normal(1, (48, 24))})
    big = {**pair_of("q", 48, 24), "q.lora_B.weight": raw(np.full((48, 4), 1e5), "BF16")}
    deltafmt.import_lora(base, write_adapter(tmp_path / "a", big), tmp_path / "d.deltafmt")
    with pytest.raises(NonFiniteError, match=r'"q\.weight".*F16'):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", dtype="F16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_whole_tensors_come_back(tmp_path: Path) -> None:
    """Heads are named, and biases of modules with and without factors are where PEFT looks for them."""
    tensors = base_tensors() | {
        "model.layers.0.k.weight": normal(8, (24, 24)),
        "model.layers.0.k.bias": normal(9, (24,)),
    }
    base = write_folder(tmp_path / "base", tensors)
    whole = {
        "lm_head.weight": normal(50, (40, 24)),
        "model.norm.weight": normal(51, (24,)),
        "model.layers.0.k.bias": normal(52, (24,)),
        "model.layers.0.q.base_layer.bias": normal(53, (48,)),
    }
    adapter = write_adapter(tmp_path / "a", {**pair_of("model.layers.0.q", 48, 24), **whole}, bias="all")
    deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt")
    result = deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out")
    written, config = read_adapter(tmp_path / "out")
    assert {name: tensor for name, tensor in written.items() if ".lora_" not in name} == whole
    assert config["modules_to_save"] == result.saved == ["lm_head", "model.norm"]
    assert config["bias"] == "all"
    again = deltafmt.import_lora(base, tmp_path / "out", tmp_path / "2.deltafmt")
    assert sorted(again.replaced) == sorted(name.replace(".base_layer", "") for name in whole)


def test_a_module_kept_whole_takes_the_rest_from_the_base(tmp_path: Path) -> None:
    tensors = {"q.weight": normal(1, (48, 24)), "norm.weight": normal(2, (24,)), "norm.bias": normal(3, (24,))}
    base = write_folder(tmp_path / "base", tensors)
    new = {**pair_of("q", 48, 24), "norm.weight": normal(4, (24,))}
    deltafmt.import_lora(base, write_adapter(tmp_path / "a", new), tmp_path / "d.deltafmt")
    with pytest.raises(UsageError, match=r'"norm\.bias" is written whole') as caught:
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out")
    assert caught.value.remedy == Remedy("base", None)
    deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", base=base)
    written, _ = read_adapter(tmp_path / "out")
    assert (written["norm.weight"], written["norm.bias"]) == (new["norm.weight"], tensors["norm.bias"])
    other = write_folder(tmp_path / "other", {**tensors, "norm.bias": normal(5, (24,))})
    with pytest.raises(WrongBaseError, match=r"norm\.bias"):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out2", base=other)


def test_an_adapter_names_no_wrong_base(files: Files, delta: Path, tmp_path: Path, cli: Cli) -> None:
    """A base of the same shapes is told by its bytes."""
    other = {name: nudge(tensor, 5) for name, tensor in base_tensors().items()}
    wrong = write_folder(tmp_path / "wrong", other, files=BASE_FILES)
    refused(cli("export-lora", delta, "-o", tmp_path / "out", "--base", wrong), 4, f"wrong base {wrong}: tensor")
    assert not (tmp_path / "out").exists()
    assert cli("export-lora", delta, "-o", tmp_path / "out", "--base", files.base).code == 0


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True, "vocab_size": 40}, True),
        ({"tie_word_embeddings": True, "vocab_size": 41}, False),  # an embedding of something else than tokens
        ({"tie_word_embeddings": False, "vocab_size": 40}, False),
        ({"vocab_size": 40}, False),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_embedding_of_a_tied_base_is_stored_whole_with_its_head(
    tmp_path: Path, cli: Cli, config: dict[str, Any], *, tied: bool, whole: bool
) -> None:
    name = "model.embed_tokens.weight"
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    tuned = {key: nudge(tensor, 5) if len(tensor.shape) == 2 else tensor for key, tensor in tensors.items()}
    base, finetuned = (
        write_folder(tmp_path / folder, content, files={"config.json": json.dumps(config).encode()})
        for folder, content in (("base", tensors), ("tuned", tuned))
    )
    file = tmp_path / "d.deltafmt"
    deltafmt.pack(base, finetuned, file, method=SVD(rank=2), exclude=[name] if whole else [])
    if tied and not whole:
        refused(cli("export-lora", file, "-o", tmp_path / "x"), 2, "--base FOLDER")
    result = cli("export-lora", file, "-o", tmp_path / "out", "--base", base, "--json")
    assert result.code == 0
    found = result.json()
    written, settings = read_adapter(tmp_path / "out")
    assert found["tied_embedding"] == ("model.embed_tokens" if tied else None)
    assert found["bytes"] == sum(len(tensor.data) for tensor in written.values())
    assert found["factor_bytes"] == sum(len(tensor.data) for key, tensor in written.items() if ".lora_" in key)
    assert settings.get("ensure_weight_tying", False) is tied
    if tied:
        deltafmt.unpack(base, file, tmp_path / "merged")
        assert found["modules_to_save"] == ["model.embed_tokens", "lm_head"]
        assert written[name] == written["lm_head.weight"] == read_folder(tmp_path / "merged")[name]
        assert "both are stored whole" in cli("export-lora", file, "-o", tmp_path / "again", "--base", base).out
    # An embedding that stays the base's is not stored.
    write_folder(tmp_path / "same", {**tuned, name: tensors[name]}, files={"config.json": json.dumps(config).encode()})
    deltafmt.pack(base, tmp_path / "same", file, method=SVD(rank=2), force=True)
    assert (
        deltafmt.export_lora(file, tmp_path / "same-out").tied,
        deltafmt.export_lora(file, tmp_path / "o").saved,
    ) == (
        "",
        [],
    )


def test_a_plan_writes_nothing(tmp_path: Path, cli: Cli) -> None:
    """The size that a plan says is the size of what is written."""
    base, finetuned = tuned(tmp_path)
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(base, finetuned, delta, method=SVD(rank=3, bits=4))
    planned = cli("export-lora", delta, "-o", tmp_path / "out", "--plan", "--json").json()
    assert not (tmp_path / "out").exists()
    written = cli("export-lora", delta, "-o", tmp_path / "out", "--json").json()
    assert (planned.pop("written"), written.pop("written")) == (False, True)
    assert planned == written
    tensors, _ = read_adapter(tmp_path / "out")
    assert written["bytes"] == sum(len(tensor.data) for tensor in tensors.values())
    assert (
        f"{written['bytes']:,} bytes of tensors, if it is written"
        in cli("export-lora", delta, "-o", tmp_path / "out", "--plan").out
    )


def test_ranks_are_named_where_they_differ(tmp_path: Path) -> None:
    """A name that ends in another one's name comes before it."""
    ranks = {"layers.0.q": 2, "model.layers.0.q": 4, "model.layers.1.q": 4, "layers.1.q": 3}
    assert rank_patterns(ranks) == {"model.layers.0.q": 4, "model.layers.1.q": 4, "layers.0.q": 2, "layers.1.q": 3}
    assert rank_patterns({"a.q": 4, "a.k": 4}) == {}
    assert rank_patterns({"a.q": 4, "a.k": 2}) == {"a.k": 2}


def test_deltas_that_are_no_adapters(tmp_path: Path, cli: Cli) -> None:
    base, finetuned = tuned(tmp_path)
    delta = tmp_path / "d.deltafmt"

    def fails(word: str, **options: Any) -> None:
        deltafmt.pack(base, finetuned, delta, force=True, **options)
        refused(cli("export-lora", delta, "-o", tmp_path / "out"), 2, word)
        assert not (tmp_path / "out").exists()

    rules = [("*.10.*", RTN(4))]
    fails('tensor "model.layers.10.q.weight" has a term of kind lowbit', method=SVD(rank=3), rules=rules)
    fails("no tensor has a low-rank delta", exclude=["*"])
    fails('"model.layers.0.o.weight"', method=RTN(4))


def test_shapes_and_names_that_no_module_has(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, Raw, Raw]] = {
        "other rows": ("embed.weight", normal(1, (40, 24)), normal(2, (44, 24))),
        r"\[2, 40, 24\]": ("conv.weight", normal(1, (2, 40, 24)), normal(2, (2, 40, 24))),
        "transposed, which only": ("h.0.c_attn.weight", normal(1, (40, 24)), normal(2, (40, 24))),
        "belongs to no module": ("scale", normal(1, (40, 24)), normal(2, (40, 24))),
    }
    for number, (word, (name, old, new)) in enumerate(cases.items()):
        base = write_folder(tmp_path / f"base{number}", {name: old})
        finetuned = write_folder(tmp_path / f"tuned{number}", {name: new})
        deltafmt.pack(base, finetuned, tmp_path / f"{number}.deltafmt", method=SVD(rank=2))
        with pytest.raises(UsageError, match=word):
            deltafmt.export_lora(tmp_path / f"{number}.deltafmt", tmp_path / "out")


def test_a_config_of_another_size_is_no_description_of_the_tensors(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    files = {"config.json": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()}
    name = "model.layers.0.self_attn.q_proj.weight"
    base = write_folder(tmp_path / "base", {name: normal(1, (16, 16))}, files=files)
    finetuned = write_folder(tmp_path / "tuned", {name: normal(2, (16, 16))}, files=files)
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=SVD(rank=2))
    with pytest.raises(UsageError, match=r"shape \[16, 16\], and the config.json one of \[4096, 4096\]"):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", base=base)


def test_a_parameter_that_is_no_weight_is_a_target_itself(tmp_path: Path) -> None:
    old, new = normal(1, (40, 24)), normal(2, (40, 24))
    base = write_folder(tmp_path / "base", {"mlp.up": old, "mlp.gate.weight": normal(3, (8, 24))})
    finetuned = write_folder(tmp_path / "tuned", {"mlp.up": new, "mlp.gate.weight": normal(4, (8, 24))})
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=SVD(rank=2))
    result = deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out")
    written, config = read_adapter(tmp_path / "out")
    assert result.parameters == config["target_parameters"] == ["mlp.up"]
    assert config["target_modules"] == ["mlp.gate"]
    # PEFT puts the module into a layer of its own, so the modules inside lie one deeper.
    assert {name.rpartition(".lora_")[0] for name in written} == {"mlp", "mlp.base_layer.gate"}
    again = deltafmt.import_lora(base, tmp_path / "out", tmp_path / "e.deltafmt")
    deltafmt.unpack(base, again.path, tmp_path / "merged")
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "wanted")
    assert read_folder(tmp_path / "merged") == read_folder(tmp_path / "wanted")


def test_tied_tensors(tmp_path: Path) -> None:
    """A tied copy in the file is nothing to a model that does not tie; without its configuration nobody knows."""
    old, new = normal(1, (40, 24)), normal(2, (40, 24))
    base = write_folder(tmp_path / "base", {"embed_tokens.weight": old, "lm_head.weight": old})
    finetuned = write_folder(tmp_path / "tuned", {"embed_tokens.weight": new, "lm_head.weight": new})
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=SVD(rank=2))
    with pytest.raises(UsageError, match=r"lm_head.weight\" is tied to embed_tokens.weight") as caught:
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out")
    assert caught.value.remedy == Remedy("base", None)
    for ties, saved in ((False, []), (True, ["embed_tokens", "lm_head"])):
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": ties, "vocab_size": 40}))
        (finetuned / "config.json").write_text((base / "config.json").read_text())
        for folder, tensor in ((base, old), (finetuned, new)):
            tensors = dict.fromkeys(("embed_tokens.weight", "lm_head.weight", "q.weight"), tensor)
            (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=SVD(rank=2), force=True)
        result = deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", base=base, force=ties)
        assert (result.saved, result.modules) == (saved, 1 if ties else 3)


def test_outputs_that_exist(files: Files, delta: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    found = cli("export-lora", delta, "-o", out, "--json").json()
    assert (found["rank"], found["modules"], found["modules_to_save"]) == (4, 2, [])
    refused(cli("export-lora", delta, "-o", out), 2, "--force")
    result = cli("export-lora", delta, "-o", out, "--force")
    assert (result.code, result.err) == (0, "")
    assert "factors of 2 modules, rank 4" in result.out
    for path in (files.base, tmp_path):
        refused(cli("export-lora", delta, "-o", path, "--base", files.base, "--force"), 2, str(path))
    refused(cli("export-lora", files.base / "model.safetensors", "-o", tmp_path / "x"), 3, "model.safetensors")
    other = write_folder(tmp_path / "other", {"x": normal(1, (4, 4))})
    refused(cli("export-lora", delta, "-o", tmp_path / "x", "--base", other), 4, "other")
    assert not (tmp_path / "x").exists()
