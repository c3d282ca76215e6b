"""Adapters as PEFT writes them now: ties, vocabularies that grew, trained rows, DoRA, experts, names of wrappers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Raw, Tensors, expected_sum, normal, raw, read_folder, refused, safetensors_bytes, write_folder
from deltafmt.errors import InvalidFileError, UnsupportedError, WrongBaseError
from deltafmt.methods import RTN, SVD, Magnitude
from lora_files import PREFIX, Files, base_tensors, pair_of, product, small_files, write_adapter

Q = "model.layers.0.q"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return small_files(tmp_path)


TIED = {"config.json": b'{"model_type": "tiny", "tie_word_embeddings": true, "vocab_size": 40}'}


def test_a_head_that_the_base_ties(tmp_path: Path) -> None:
    """A head of its own unties it; one that is the embedding's does not."""
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    base = write_folder(tmp_path / "base", tensors, files=TIED)
    whole = {**pair_of(Q, 48, 24), "lm_head.weight": normal(50, (40, 24))}
    adapter = write_adapter(tmp_path / "a", whole, modules_to_save=["lm_head"])
    result = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt")
    assert (result.replaced, result.untied) == (["lm_head.weight"], ["lm_head.weight"])
    assert result.config == {"tie_word_embeddings": False}
    deltafmt.unpack(base, result.path, tmp_path / "out")
    assert read_folder(tmp_path / "out")["lm_head.weight"] == whole["lm_head.weight"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    whole["model.embed_tokens.weight"] = whole["lm_head.weight"]
    tied = write_adapter(tmp_path / "tied", whole, modules_to_save=["lm_head", "embed_tokens"])
    result = deltafmt.import_lora(base, tied, tmp_path / "d.deltafmt", force=True)
    assert (result.replaced, result.untied, result.config) == (["model.embed_tokens.weight"], [], {})


def embedding_pair(seed: int = 1) -> Tensors:
    return {
        "model.embed_tokens.lora_embedding_A": normal(seed, (4, 40), "BF16", 0.1),
        "model.embed_tokens.lora_embedding_B": normal(seed + 1, (24, 4), "BF16", 0.1),
    }


@pytest.mark.parametrize("stored", [True, False])
def test_an_embedding_that_the_base_ties(tmp_path: Path, stored: bool) -> None:
    """Factors of the embedding alone untie it; the transposed factors on the head keep it tied."""
    tensors = base_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding
    if not stored:
        del tensors["lm_head.weight"]
    base = write_folder(tmp_path / "base", tensors, files=TIED)
    factors = embedding_pair()
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", factors), tmp_path / "d.deltafmt")
    assert result.config == {"tie_word_embeddings": False}
    assert "merge_and_unload makes another model" in " ".join(result.warnings)
    deltafmt.unpack(base, result.path, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert found["lm_head.weight"] == embedding
    dense = product(*factors.values(), 2).T
    assert found["model.embed_tokens.weight"].data == expected_sum(embedding, dense, "BF16")
    a, b = (raw(tensor.floats().T, "BF16") for tensor in factors.values())
    both = {**factors, "lm_head.lora_A.weight": b, "lm_head.lora_B.weight": a}
    tied = write_adapter(tmp_path / "tied", both, ensure_weight_tying=True)
    result = deltafmt.import_lora(base, tied, tmp_path / "d.deltafmt", force=True)
    assert (result.untied, result.config, result.warnings) == ([], {}, [])
    deltafmt.unpack(base, result.path, tmp_path / "again")
    assert read_folder(tmp_path / "again").get("lm_head.weight") in (None, found["model.embed_tokens.weight"])


def test_trained_rows(tmp_path: Path) -> None:
    """Rows of an embedding are replaced, bit for bit in BF16, and those of a head that is tied to it with them."""
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    base = write_folder(tmp_path / "base", tensors, files=TIED)
    rows = normal(60, (3, 24))
    whole = {**pair_of(Q, 48, 24), "model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    for number, indices in enumerate(([39, 2, 7], {"embed_tokens": [39, 2, 7]})):
        adapter = write_adapter(tmp_path / f"a{number}", whole, trainable_token_indices=indices)
        result = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt", force=True)
        assert (result.replaced, result.untied) == ([], [])
        deltafmt.unpack(base, result.path, tmp_path / f"out{number}")
        found = read_folder(tmp_path / f"out{number}")
        wanted = tensors["model.embed_tokens.weight"].floats().copy()
        wanted[[39, 2, 7]] = rows.floats()
        assert np.array_equal(found["model.embed_tokens.weight"].floats(), wanted)
    beyond = write_adapter(tmp_path / "beyond", whole, trainable_token_indices=[40, 2, 7])
    with pytest.raises(WrongBaseError, match="has 40 rows, and the adapter replaces row 40"):
        deltafmt.import_lora(base, beyond, tmp_path / "d.deltafmt", force=True)


def test_rows_that_no_sum_gives_are_stored_whole(tmp_path: Path) -> None:
    """In BF16, a base of 1000 plus a difference in float32 cannot be 2**-60."""
    old = raw(np.full((8, 4), 1000.0), "BF16")
    base = write_folder(tmp_path / "base", {"embed_tokens.weight": old, "q.weight": normal(1, (8, 4))})
    rows = raw(np.full((1, 4), 2.0**-60), "BF16")
    name = "embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = write_adapter(tmp_path / "a", {**pair_of("q", 8, 4), name: rows}, trainable_token_indices=[3])
    result = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt")
    assert result.replaced == result.computed == ["embed_tokens.weight"]
    deltafmt.unpack(base, result.path, tmp_path / "out")
    found = read_folder(tmp_path / "out")["embed_tokens.weight"].floats()
    assert (found[3] == 2.0**-60).all()
    assert (np.delete(found, 3, 0) == 1000).all()


def test_a_larger_vocabulary(tmp_path: Path) -> None:
    """New rows are stored, the delta covers the others, and the configuration has the vocabulary's new size."""
    tensors = base_tensors()
    base = write_folder(
        tmp_path / "base", tensors, files={"config.json": b'{"vocab_size": 40, "x": {"vocab_size": 40}}'}
    )
    own = {}
    for name in ("model.embed_tokens", "lm_head"):
        old = tensors[f"{name}.weight"]
        own[f"{name}.base_layer.weight"] = Raw(old.dtype, (42, 24), old.data + normal(70, (2, 24)).data)
    factors = {**embedding_pair(), **pair_of("lm_head", 42, 24)}
    factors["model.embed_tokens.lora_embedding_A"] = normal(71, (4, 42), "BF16", 0.1)
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", {**factors, **own}), tmp_path / "d.deltafmt")
    assert result.grown == ["lm_head.weight", "model.embed_tokens.weight"]
    assert (result.replaced, result.ranks, result.config) == ([], {4: 2}, {"vocab_size": 42})
    deltafmt.unpack(base, result.path, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"vocab_size": 42, "x": {"vocab_size": 42}}
    sides = [factors[f"model.embed_tokens.lora_embedding_{side}"] for side in "AB"]
    dense = {"model.embed_tokens": product(*sides, 2).T}
    dense["lm_head"] = product(factors["lm_head.lora_A.weight"], factors["lm_head.lora_B.weight"], 2)
    for name, delta in dense.items():
        wanted = own[f"{name}.base_layer.weight"]
        assert found[f"{name}.weight"].shape == (42, 24)
        assert found[f"{name}.weight"].data == expected_sum(wanted, delta, "BF16")


def test_new_rows_alone(tmp_path: Path) -> None:
    """A table that was resized and not trained costs its new rows, not the whole table."""
    tensors = {
        **base_tensors(),
        "model.embed_tokens.weight": normal(1, (4000, 24)),
        "lm_head.weight": normal(2, (4000, 24)),
    }
    base = write_folder(tmp_path / "base", tensors, files={"config.json": b'{"vocab_size": 4000}'})
    whole = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        whole[name] = Raw("BF16", (4002, 24), tensors[name].data + normal(70, (2, 24)).data)
    adapter = write_adapter(
        tmp_path / "a", {**pair_of(Q, 48, 24), **whole}, modules_to_save=["embed_tokens", "lm_head"]
    )
    result = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt")
    assert (result.grown, result.replaced) == (["lm_head.weight", "model.embed_tokens.weight"], [])
    assert result.size < 50_000 < result.adapter_bytes
    deltafmt.verify(result.path, base)
    deltafmt.unpack(base, result.path, tmp_path / "out")
    assert {name: read_folder(tmp_path / "out")[name] for name in whole} == whole


def test_another_base_layer_is_what_the_factors_are_added_to(files: Files, tmp_path: Path) -> None:
    """PEFT loads the layers that an adapter holds."""
    own = normal(9, (48, 24))
    adapter = write_adapter(tmp_path / "own", {**files.factors, f"{Q}.base_layer.weight": own})
    result = deltafmt.import_lora(files.base, adapter, tmp_path / "d.deltafmt")
    assert result.computed == [f"{Q}.weight"]
    deltafmt.unpack(files.base, result.path, tmp_path / "out")
    a, b = (files.factors[f"{Q}.lora_{side}.weight"] for side in "AB")
    found = read_folder(tmp_path / "out")[f"{Q}.weight"].floats()
    np.testing.assert_allclose(found, own.floats() + product(a, b, 2), rtol=2**-7, atol=1e-2)


def test_names_that_wrappers_change(files: Files, tmp_path: Path) -> None:
    """FSDP, DeepSpeed, torch.compile and checkpointing leave their marks in names; the delta is the same."""
    plain = deltafmt.import_lora(files.base, files.adapter, tmp_path / "plain.deltafmt").content_id
    changes: dict[str, Callable[[str], str]] = {
        "compiled": lambda name: f"_orig_mod.{name}",
        "fsdp": lambda name: name.replace("model.layers.", "model._fsdp_wrapped_module.layers._fsdp_wrapped_module."),
        "deepspeed": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
        "ddp": lambda name: f"module.{name}",
        "checkpointed": lambda name: name.replace(".q.", "._checkpoint_wrapped_module.q."),
        "named": lambda name: name.replace(".weight", ".default.weight"),
        "twice": lambda name: PREFIX + name,
        "bare": lambda name: name.removeprefix(PREFIX),
    }
    for kind, change in changes.items():
        adapter = write_adapter(tmp_path / kind, files.factors)
        renamed = {change(PREFIX + name): tensor for name, tensor in files.factors.items()}
        (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(renamed, {"format": "pt"}))
        assert deltafmt.import_lora(files.base, adapter, tmp_path / f"{kind}.deltafmt").content_id == plain


def test_dora_is_stored_as_it_is_computed(tmp_path: Path) -> None:
    """Each output's weights get the learned length; an embedding has a length for each column."""
    tensors = {"q.weight": normal(1, (48, 24), "F32"), "embed_tokens.weight": normal(2, (40, 24), "F32")}
    base = write_folder(tmp_path / "base", tensors)
    factors = {**pair_of("q", 48, 24), "q.lora_magnitude_vector": normal(3, (48,), "F32")}
    pair = {key.removeprefix("model."): tensor for key, tensor in embedding_pair().items()}
    factors |= {**pair, "embed_tokens.lora_magnitude_vector": normal(4, (24,), "F32")}
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", factors, use_dora=True), tmp_path / "d.deltafmt")
    assert result.computed == ["embed_tokens.weight", "q.weight"]
    deltafmt.unpack(base, result.path, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    of_q = tensors["q.weight"].floats() + product(factors["q.lora_A.weight"], factors["q.lora_B.weight"], 2)
    wanted = (
        factors["q.lora_magnitude_vector"].floats().reshape(-1, 1) * of_q / np.linalg.norm(of_q, axis=1, keepdims=True)
    )
    np.testing.assert_allclose(found["q.weight"].floats(), wanted, rtol=1e-5, atol=1e-6)
    table = tensors["embed_tokens.weight"].floats() + product(*pair.values(), 2).T
    wanted = factors["embed_tokens.lora_magnitude_vector"].floats() * table / np.linalg.norm(table, axis=0)
    np.testing.assert_allclose(found["embed_tokens.weight"].floats(), wanted, rtol=1e-5, atol=1e-6)
    wrong = {**factors, "q.lora_magnitude_vector": normal(3, (24,), "F32")}
    with pytest.raises(InvalidFileError, match="one length for each of the 48 outputs"):
        deltafmt.import_lora(base, write_adapter(tmp_path / "b", wrong, use_dora=True), tmp_path / "e.deltafmt")


def test_dora_by_a_method(tmp_path: Path, cli: Cli) -> None:
    """What is not of low rank may be compressed, as pack compresses it."""
    base = write_folder(tmp_path / "base", base_tensors())
    factors = {**pair_of(Q, 48, 24), f"{Q}.lora_magnitude_vector": normal(3, (48,))}
    adapter = write_adapter(tmp_path / "a", factors, use_dora=True)
    exact = deltafmt.import_lora(base, adapter, tmp_path / "exact.deltafmt")
    deltafmt.unpack(base, exact.path, tmp_path / "whole")
    for number, method in enumerate((RTN(8, scale_group=8), SVD(rank=6), Magnitude())):
        result = deltafmt.import_lora(base, adapter, tmp_path / f"{number}.deltafmt", method=method)
        assert (result.compressed, result.computed, result.replaced) == ([f"{Q}.weight"], [], [])
        deltafmt.verify(result.path, base)
        deltafmt.unpack(base, result.path, tmp_path / f"{number}")
        wanted, found = (read_folder(tmp_path / folder)[f"{Q}.weight"].floats() for folder in ("whole", f"{number}"))
        assert np.linalg.norm(found - wanted) < 0.8 * np.linalg.norm(wanted - base_tensors()[f"{Q}.weight"].floats())
    printed = cli("import-lora", base, adapter, "-o", tmp_path / "x", "--method", "rtn:bits=4").out
    assert "1 compressed by rtn:bits=4" in printed
    refused(cli("import-lora", base, adapter, "-o", tmp_path / "y", "--method", "magic"), 2, "--method", "magic")


def test_an_imported_adapter_that_is_not_of_low_rank_comes_back_whole(tmp_path: Path) -> None:
    """Trained rows and DoRA's tensors become modules_to_save."""
    tensors = base_tensors()
    base = write_folder(tmp_path / "base", tensors)
    factors = pair_of("model.layers.0.o", 24, 24)
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": normal(60, (3, 24))}
    adapter = write_adapter(tmp_path / "a", {**factors, **rows}, trainable_token_indices=[39, 2, 7])
    delta = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt").path
    with deltafmt.open(delta) as opened:
        kinds = {term.layout.kind for term in opened["model.embed_tokens.weight"].terms}
    exported = deltafmt.export_lora(delta, tmp_path / "out", base=base)
    assert exported.saved == (["model.embed_tokens"] if kinds == {"sparse"} else [])
    again = deltafmt.import_lora(base, tmp_path / "out", tmp_path / "e.deltafmt").path
    for name in (delta, again):
        deltafmt.unpack(base, name, tmp_path / name.stem)
    assert read_folder(tmp_path / "d") == read_folder(tmp_path / "e")


def test_a_bias_of_b(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", base_tensors("F32"))
    factors = {**pair_of(Q, 48, 24), f"{Q}.lora_B.bias": normal(3, (48,), "F32")}
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", factors, lora_bias=True), tmp_path / "d.deltafmt")
    assert result.computed == [f"{Q}.bias"]
    deltafmt.unpack(base, result.path, tmp_path / "out")
    wanted = base_tensors("F32")[f"{Q}.bias"].floats() + 2 * factors[f"{Q}.lora_B.bias"].floats()
    np.testing.assert_allclose(read_folder(tmp_path / "out")[f"{Q}.bias"].floats(), wanted, rtol=1e-6)
    other = {**pair_of("model.layers.0.o", 24, 24), "model.layers.0.o.lora_B.bias": normal(3, (24,), "F32")}
    with pytest.raises(UnsupportedError, match=r"a bias, which the base does not have.*serve this adapter with PEFT"):
        deltafmt.import_lora(base, write_adapter(tmp_path / "b", other, lora_bias=True), tmp_path / "e.deltafmt")


def test_a_convolution_is_stored_whole(tmp_path: Path) -> None:
    base = write_folder(
        tmp_path / "base", {"conv.weight": normal(1, (6, 5, 3, 2), "F32"), "q.weight": normal(2, (9, 8))}
    )
    factors = {
        "conv.lora_A.weight": normal(3, (4, 5, 3, 2), "F32"),
        "conv.lora_B.weight": normal(4, (6, 4, 1, 1), "F32"),
    }
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", factors), tmp_path / "d.deltafmt")
    assert result.computed == ["conv.weight"]
    deltafmt.unpack(base, result.path, tmp_path / "out")
    a, b = (tensor.floats().reshape(tensor.shape[0], -1) for tensor in factors.values())
    wanted = normal(1, (6, 5, 3, 2), "F32").floats() + 2 * (b @ a).reshape(90, 2)
    np.testing.assert_allclose(read_folder(tmp_path / "out")["conv.weight"].floats(), wanted, rtol=1e-4, atol=1e-5)
    grouped = {**factors, "conv.lora_A.weight": normal(3, (4, 10, 3, 2), "F32")}
    with pytest.raises(UnsupportedError, match="a convolution with groups"):
        deltafmt.import_lora(base, write_adapter(tmp_path / "b", grouped), tmp_path / "e.deltafmt")


@pytest.mark.parametrize("layout", ["stacked", "apart", "mixtral"])
def test_factors_of_experts(tmp_path: Path, layout: str) -> None:
    """Factors of stacked experts, on a base that stores them stacked, one by one, and under older names."""
    experts, rank, out, columns = 3, 2, 8, 6
    block = "layers.0.mlp.experts"
    weights = normal(1, (experts, out, columns), "F32").floats().reshape(experts, out, columns)
    if layout == "stacked":
        tensors = {f"{block}.gate_up_proj": raw(weights, "F32")}
    else:
        first, second = ("gate_proj", "up_proj") if layout == "apart" else ("w1", "w3")
        start = block if layout == "apart" else "layers.0.block_sparse_moe.experts"
        tensors = {}
        for number in range(experts):
            tensors[f"{start}.{number}.{first}.weight"] = raw(weights[number, :5], "F32")
            tensors[f"{start}.{number}.{second}.weight"] = raw(weights[number, 5:], "F32")
            tensors[f"{start}.{number}.{'down_proj' if layout == 'apart' else 'w2'}.weight"] = normal(9, (4, 4), "F32")
    base = write_folder(tmp_path / "base", {**tensors, "q.weight": normal(2, (9, 8))})
    a, b = normal(3, (rank * experts, columns), "F32"), normal(4, (out, rank * experts), "F32")
    factors = {f"{block}.lora_A.weight": a, f"{block}.lora_B.weight": b}
    options = {"r": rank, "lora_alpha": 2 * rank, "target_parameters": ["mlp.experts.gate_up_proj"]}
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", factors, **options), tmp_path / "d.deltafmt")
    deltafmt.verify(result.path, base)
    deltafmt.unpack(base, result.path, tmp_path / "out")
    of_a, of_b = a.floats().reshape(experts, rank, columns), b.floats().reshape(out, rank, experts)
    wanted = weights + 2 * np.einsum("ore,eri->eoi", of_b, of_a)
    found = {name: tensor.floats() for name, tensor in read_folder(tmp_path / "out").items()}
    if layout == "stacked":
        together = found[f"{block}.gate_up_proj"].reshape(weights.shape)
    else:
        parts = [(f"{start}.{n}.{first}.weight", f"{start}.{n}.{second}.weight") for n in range(experts)]
        together = np.stack([np.concatenate([found[one], found[two]]) for one, two in parts])
    np.testing.assert_allclose(together, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidFileError, match="not factors of rank 3 for 3 experts"):
        deltafmt.import_lora(
            base, write_adapter(tmp_path / "b", factors, **{**options, "r": 3}), tmp_path / "e.deltafmt"
        )


def test_several_parameters_of_one_module(tmp_path: Path) -> None:
    """PEFT nests their factors: the first parameter's are inside."""
    block = "mlp.experts"
    shapes = {"gate_up_proj": (2, 8, 6), "down_proj": (2, 6, 4)}
    tensors = {f"{block}.{last}": normal(number, shape, "F32") for number, (last, shape) in enumerate(shapes.items())}
    base = write_folder(tmp_path / "base", tensors)
    factors: Tensors = {}
    for start, (experts, out, columns) in zip((f"{block}.base_layer", block), shapes.values(), strict=True):
        factors[f"{start}.lora_A.weight"] = normal(5, (experts * 2, columns), "F32")
        factors[f"{start}.lora_B.weight"] = normal(6, (out, experts * 2), "F32")
    options = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    result = deltafmt.import_lora(base, write_adapter(tmp_path / "a", factors, **options), tmp_path / "d.deltafmt")
    deltafmt.unpack(base, result.path, tmp_path / "out")
    for name, tensor in read_folder(tmp_path / "out").items():
        assert not np.array_equal(tensor.floats(), tensors[name].floats())
    one = {**options, "target_parameters": ["experts.down_proj"]}
    with pytest.raises(UnsupportedError, match="2 pairs of factors, and target_parameters names 1"):
        deltafmt.import_lora(base, write_adapter(tmp_path / "b", factors, **one), tmp_path / "e.deltafmt")


def test_attention_whose_weights_lie_together(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"attn.in_proj_weight": normal(1, (48, 16)), "q.weight": normal(2, (9, 8))})
    with pytest.raises(UnsupportedError, match=r"torch\.nn\.MultiheadAttention.*use pack"):
        deltafmt.import_lora(base, write_adapter(tmp_path / "a", pair_of("attn", 48, 16)), tmp_path / "d.deltafmt")
