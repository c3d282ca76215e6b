"""The layers of an engine with deltas compute what the layers of the unpacked fine-tune do, in every process's cut."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

import deltafmt
from deltafmt import methods
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.kernels.device_memory import DeviceMemory
from deltafmt.kernels.segments import FixedSegments, Segments
from deltafmt.vllm.arena import Arena
from deltafmt.vllm.base import EngineBase
from deltafmt.vllm.choice import BASE, Choice, StepSegments
from deltafmt.vllm.layers import MatrixLayer
from deltafmt.vllm.loading import load_delta
from deltafmt.vllm.norms import NormLayer
from deltafmt.vllm.parts import LayerParts
from deltafmt.vllm.served import ServedModel
from deltafmt.vllm.tensor_places import find_places
from fake_vllm import GemmaRMSNorm, LayerNorm, Llama, RMSNorm, classes, config

pytestmark = pytest.mark.usefixtures("classes")
__all__ = ["classes"]

METHODS = {
    "deltadq": methods.DeltaDQ(n=4, m=16, bits=4),
    "all": methods.DeltaDQ(n=2, m=2, bits=4),
    "residual": methods.Residual(),
    "svd": methods.SVD(),
    "bitdelta": methods.BitDelta(),
}


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> dict[str, Path]:
    """A delta of each kind."""
    folder = tmp_path_factory.mktemp("deltas")
    found = {}
    for name, method in METHODS.items():
        found[name] = folder / f"{name}.deltafmt"
        deltafmt.pack(nano / "base", nano / "math", found[name], method=method)
    return found


def engine(folder: Path, cut: int = 1, rank: int = 0, **model: Any) -> tuple[Llama, ServedModel]:
    """Return a model of an engine that has loaded a checkpoint, prepared for deltas and started."""
    sizes = json.loads((folder / "config.json").read_text())
    made = Llama(
        SimpleNamespace(
            hidden=sizes["hidden_size"],
            head=sizes["head_dim"],
            heads=sizes["num_attention_heads"],
            kv_heads=sizes["num_key_value_heads"],
            inner=sizes["intermediate_size"],
            layers=sizes["num_hidden_layers"],
            vocabulary=sizes["vocab_size"],
        ),
        cut,
        rank,
    )
    made.load_weights({name: value.float() for name, value in load_file(folder / "model.safetensors").items()}.items())
    served = ServedModel(made, EngineBase(folder).shapes(), Choice(4, torch.device("cpu"), 64), config(**model))
    for layer in served.layers.values():
        layer.ran = True  # as after the call at start-up
    return made, served


def fill(served: ServedModel, slot: int, path: Path, base: EngineBase) -> None:
    """Fill a slot with a delta."""
    delta = load_delta(str(path), served, base)
    served.put(slot, delta.parts, delta.tensors)


def linear_layers(model: Llama) -> dict[str, Any]:
    """Return the linear layers and the head by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "tp_size") and "embed" not in name}


@pytest.mark.parametrize(("cut", "plain"), [(1, True), (2, True), (4, True), (1, False), (4, False)])
def test_every_cut_of_every_layer_adds_what_the_whole_layer_would(
    deltas: dict[str, Path], nano: Path, tmp_path: Path, cut: int, *, plain: bool
) -> None:
    """An engine that holds the weights as they are takes new ones for a delta's rows; others add products."""
    slots = dict(enumerate(["deltadq", "all", "residual", "svd"]))
    tokens = [BASE, 0, 1, 2, 3, 0, BASE, 3]
    generator = torch.Generator().manual_seed(0)
    tuned = {}
    for slot, method in slots.items():
        deltafmt.unpack(nano / "base", deltas[method], tmp_path / str(slot))
        tuned[slot] = tmp_path / str(slot)
    tuned[BASE] = nano / "base"
    for rank in range(cut):
        model, served = engine(nano / "base", cut, rank)
        for one in served.layers.values():
            if isinstance(one, MatrixLayer):
                one.plain = plain
        base = EngineBase(nano / "base")
        for slot, method in slots.items():
            fill(served, slot, deltas[method], base)
        served.choice.show(tokens, tokens)
        expected = {slot: linear_layers(engine(folder, cut, rank)[0]) for slot, folder in tuned.items()}
        plain = linear_layers(engine(nano / "base", cut, rank)[0])
        for name, layer in linear_layers(model).items():
            x = torch.randn(len(tokens), layer.weight.shape[1], generator=generator)
            found = layer.quant_method.apply(layer, x)
            for row, slot in enumerate(tokens):
                weight = expected[slot][name].weight
                wanted = x[row] @ weight.T
                # The checkpoint is rounded to BF16 once more; bounds are those of rounding each weight.
                bound = (x[row].abs() @ weight.abs().T) * 2**-8
                assert ((found[row] - wanted).abs() <= bound + 1e-6).all(), (name, slot)
                if slot == BASE:
                    assert torch.equal(found[row], plain[name].quant_method.apply(plain[name], x)[row])


def test_the_base_computes_nothing_in_a_step_that_has_no_row_of_it(deltas: dict[str, Path], nano: Path) -> None:
    model, served = engine(nano / "base")
    base = EngineBase(nano / "base")
    for slot, method in enumerate(["all", "svd"]):
        fill(served, slot, deltas[method], base)
    layer = model.model.layers[0].mlp.gate_up_proj
    x = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(1))
    bias = torch.randn(len(layer.weight), generator=torch.Generator().manual_seed(2))
    served.choice.show([0, 1, BASE, 0, 1], [])
    mixed = layer.quant_method.apply(layer, x, bias)
    expected = functional.linear(x, layer.weight, bias)
    assert torch.equal(mixed[2], expected[2])
    layer.weight.data.fill_(torch.nan)  # whoever computes with the base's weight is found out
    served.choice.show([0, 1, 0, 1], [])
    found = layer.quant_method.apply(layer, x[[0, 1, 3, 4]], bias)
    torch.testing.assert_close(found, mixed[[0, 1, 3, 4]])
    assert not torch.allclose(mixed[:2], expected[:2], atol=0.01)


def test_layers_of_a_pooler_are_refused_by_name(deltas: dict[str, Path], nano: Path) -> None:
    """A pooler gives a layer one row a request."""
    made, _ = engine(nano / "base")
    made.pooler = torch.nn.Module()
    made.pooler.classifier = made.model.layers[1].mlp.down_proj
    served = ServedModel(made, EngineBase(nano / "base").shapes(), Choice(4, torch.device("cpu"), 64), config())
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj.* a pooler gives it, whose rows are those of req"):
        load_delta(str(deltas["all"]), served, EngineBase(nano / "base"), starting=True)
    assert "model.layers.1.mlp.down_proj: it computes what a pooler gives" in "\n".join(served.unused())


def test_a_tensor_that_is_copied_on_its_way_has_its_place_and_one_that_is_written_to_has_none(nano: Path) -> None:
    made, _ = engine(nano / "base")
    load = made.load_weights

    def on_the_way(weights: Any) -> None:
        given = {name: weight.clone() for name, weight in weights}
        given["model.norm.weight"] += 1
        given["model.layers.0.self_attn.q_proj.weight"][:4].mul_(2)
        load(given.items())

    made.load_weights = on_the_way
    found = find_places(made, EngineBase(nano / "base").shapes())
    changed = {"model.norm.weight", "model.layers.0.self_attn.q_proj.weight"}
    assert {*found.reasons} == changed
    assert found.reasons["model.norm.weight"] == "the model rearranges it when it is loaded"


def test_weights_that_are_replaced_are_noted(nano: Path) -> None:
    made, served = engine(nano / "base")
    assert not served.weights_changed
    made.load_weights([])
    assert served.weights_changed


def test_embeddings_and_heads_that_are_tied_both_change(deltas: dict[str, Path], nano: Path, tmp_path: Path) -> None:
    _, served = engine(nano / "base")
    model = served.modules
    fill(served, 2, deltas["all"], EngineBase(nano / "base"))
    served.choice.show([2, BASE, 2], [BASE, 2])
    deltafmt.unpack(nano / "base", deltas["all"], tmp_path / "out")
    tuned = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].float()
    old = load_file(nano / "base" / "model.safetensors")["model.embed_tokens.weight"].float()
    ids = torch.tensor([5, 5, 1023])
    embedding = model["model.embed_tokens"]
    found = embedding.quant_method.embedding(embedding, ids)
    torch.testing.assert_close(found, torch.stack([tuned[5], old[5], tuned[1023]]), rtol=2**-7, atol=1e-6)
    assert torch.equal(found[1], old[5])
    x = torch.randn(2, 128)
    head = model["lm_head"]
    logits = head.quant_method.apply(head, x)
    torch.testing.assert_close(logits[1], x[1] @ tuned.T, rtol=1e-2, atol=0.05)
    assert torch.equal(logits[0], (x @ old.T)[0])


def test_an_embedding_that_a_model_takes_for_its_head_multiplies_with_the_delta(
    deltas: dict[str, Path], nano: Path
) -> None:
    _, served = engine(nano / "base")
    head, embedding = served.modules["lm_head"], served.modules["model.embed_tokens"]
    fill(served, 1, deltas["all"], EngineBase(nano / "base"))
    served.choice.show([1, BASE], [1, BASE])
    x = torch.randn(2, 128)
    found = embedding.quant_method.apply(embedding, x)
    assert torch.equal(found, head.quant_method.apply(head, x))
    assert not torch.allclose(found[0], x[0] @ embedding.weight.T)
    served.clear(1)
    assert torch.equal(embedding.quant_method.apply(embedding, x), x @ embedding.weight.T)


def test_an_embedding_is_refused_where_logits_are_computed_past_every_head(
    deltas: dict[str, Path], nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "compute_logits", lambda _, x: x, raising=False)
    model, served = engine(nano / "base")
    base = EngineBase(nano / "base")
    for name, layer in served.layers.items():
        layer.ran = "head" not in name
    served.layers["lm_head"].ran = True  # some head
    assert served.unused() == []
    model.compute_logits(torch.zeros(1))
    load_delta(str(deltas["all"]), served, base)
    served.layers["lm_head"].ran = False
    reason = "it computed without the method that deltas are added in"
    assert served.unused() == [f"lm_head: {reason}", f"model.embed_tokens as the head: {reason}"]
    with pytest.raises(UsageError, match="without the method that deltas are added in"):
        load_delta(str(deltas["all"]), served, base)


def test_log_probabilities_of_prompts_take_the_rows_of_tokens(deltas: dict[str, Path], nano: Path) -> None:
    _, served = engine(nano / "base")
    fill(served, 1, deltas["all"], EngineBase(nano / "base"))
    head = served.modules["lm_head"]
    hidden = torch.randn(6, 128)
    tokens = [BASE, BASE, 1, 1, 1, BASE]
    served.choice.show(tokens, tokens)
    wanted = head.quant_method.apply(head, hidden)
    served.choice.show(tokens, [BASE, 1])
    with served.choice.prompts():
        found = head.quant_method.apply(head, hidden[1:4])
    torch.testing.assert_close(found, wanted[1:4])
    # As many rows as are sampled, from the first on, are tokens of a prompt none the less.
    sampled = head.quant_method.apply(head, hidden[:2])
    with served.choice.prompts():
        found = head.quant_method.apply(head, hidden[:2])
    torch.testing.assert_close(found, wanted[:2])
    assert not torch.allclose(sampled[1], found[1])
    with pytest.raises(UsageError, match="lm_head was given 3 rows where the engine announced 2"):
        head.quant_method.apply(head, hidden[1:4])


def test_a_norm_takes_the_weights_of_each_rows_delta(deltas: dict[str, Path], nano: Path) -> None:
    _, served = engine(nano / "base")
    fill(served, 0, deltas["svd"], EngineBase(nano / "base"))
    x, residual = torch.randn(4, 128), torch.randn(4, 128)
    norm = served.modules["model.norm"]
    _, tuned = engine(nano / "math")
    given = x.clone(), residual.clone()
    _, base = engine(nano / "base")
    of_base = base.modules["model.norm"](*(each.clone() for each in given))
    of_tuned = tuned.modules["model.norm"](*(each.clone() for each in given))
    served.choice.show([BASE, 0, 0, BASE], [])
    found = norm(x, residual)
    for part in (0, 1):
        assert torch.equal(found[part][[0, 3]], of_base[part][[0, 3]])
        assert torch.equal(found[part][[1, 2]], of_tuned[part][[1, 2]])


def test_a_slot_that_is_cleared_or_filled_again_serves_nothing_of_what_it_had(
    deltas: dict[str, Path], nano: Path
) -> None:
    model, served = engine(nano / "base")
    base = EngineBase(nano / "base")
    layer = linear_layers(model)["model.layers.0.mlp.gate_up_proj"]
    x = torch.randn(3, 128)
    plain = layer.quant_method.apply(layer, x)
    served.choice.show([1, 1, 1], [1])
    outputs = {}
    for method in ("svd", "bitdelta", "svd"):
        fill(served, 1, deltas[method], base)
        found = layer.quant_method.apply(layer, x)
        assert torch.equal(outputs.setdefault(method, found), found)
        assert not torch.equal(found, plain)
        served.clear(1)
        assert torch.equal(layer.quant_method.apply(layer, x), plain)


def test_rows_that_nobody_announced_are_refused(deltas: dict[str, Path], nano: Path) -> None:
    model, served = engine(nano / "base")
    fill(served, 0, deltas["svd"], EngineBase(nano / "base"))
    served.choice.show([0, 0, 0], [0])
    layer = linear_layers(model)["model.layers.0.mlp.down_proj"]
    with pytest.raises(UsageError, match=r"down_proj was given 2 rows where the engine announced 3"):
        layer.quant_method.apply(layer, torch.randn(2, 384))
    padded = layer.quant_method.apply(layer, torch.ones(5, 384))
    torch.testing.assert_close(padded[3], padded[4])  # not of the same bits where two threads share the rows
    assert not torch.allclose(padded[2], padded[3])


def test_a_wrong_base_and_a_layer_that_never_ran_are_refused(deltas: dict[str, Path], nano: Path) -> None:
    _, served = engine(nano / "base")
    with pytest.raises(WrongBaseError, match="differs from the one that was packed against"):
        load_delta(str(deltas["svd"]), served, EngineBase(nano / "math"))
    base = EngineBase(nano / "base")
    served.layers["model.layers.1.mlp.down_proj"].ran = False
    reason = "model.layers.1.mlp.down_proj: it computed without the method that deltas are added in"
    assert served.unused() == [reason]
    with pytest.raises(
        UsageError, match=r'deltadq\.deltafmt: tensor "model.layers.1.mlp.down_proj.weight" changes, which'
    ):
        load_delta(str(deltas["deltadq"]), served, base)


def test_models_whose_rows_are_no_tokens_are_refused(deltas: dict[str, Path], nano: Path) -> None:
    _, served = engine(nano / "base", is_encoder_decoder=True)
    with pytest.raises(UsageError, match="an encoder's rows are not those of the tokens"):
        load_delta(str(deltas["svd"]), served, EngineBase(nano / "base"))


def test_a_grown_vocabulary_a_new_tensor_and_a_missing_one_are_refused_by_name(nano: Path, tmp_path: Path) -> None:
    _, served = engine(nano / "base")
    base = EngineBase(nano / "base")
    tensors = load_file(nano / "math" / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    grown = {**tensors, embedding: torch.cat([tensors[embedding], torch.ones(3, 128, dtype=torch.bfloat16)])}
    extra = {**tensors, "model.layers.0.mlp.router.weight": torch.ones(4, 128, dtype=torch.bfloat16)}
    for name, changed, message in (
        ("grown", grown, rf'tensor "{embedding}" changes, .* vocabulary of a request is the base\'s'),
        ("extra", extra, r'tensor "model.layers.0.mlp.router.weight" changes, .* no such tensor'),
    ):
        folder = tmp_path / name
        shutil.copytree(nano / "math", folder)
        save_file(changed, folder / "model.safetensors")
        deltafmt.pack(nano / "base", folder, tmp_path / f"{name}.deltafmt")
        with pytest.raises(UsageError, match=message):
            load_delta(str(tmp_path / f"{name}.deltafmt"), served, base)


def test_an_exact_delta_is_refused(nano: Path, tmp_path: Path) -> None:
    _, served = engine(nano / "base")
    deltafmt.pack(nano / "base", nano / "math", tmp_path / "e.deltafmt", method=deltafmt.methods.parse("exact"))
    with pytest.raises(UsageError, match="exact"):
        load_delta(str(tmp_path / "e.deltafmt"), served, EngineBase(nano / "base"))


def test_a_damaged_file_is_refused_when_it_is_loaded(deltas: dict[str, Path], nano: Path, tmp_path: Path) -> None:
    _, served = engine(nano / "base")
    data = bytearray(deltas["svd"].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.deltafmt").write_bytes(data)
    with pytest.raises(InvalidFileError, match=r"bad\.deltafmt: section 0"):
        load_delta(str(tmp_path / "bad.deltafmt"), served, EngineBase(nano / "base"))


@pytest.mark.parametrize("kind", ["RMSNorm", "GemmaRMSNorm", "LayerNorm"])
def test_the_formula_of_compiled_code_is_that_of_the_layer(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = {"RMSNorm": RMSNorm, "GemmaRMSNorm": GemmaRMSNorm, "LayerNorm": LayerNorm}[kind](32)
    for parameter in layer.parameters():
        parameter.data = torch.randn(32, generator=generator)
        parameter.requires_grad = False
    values = {name: torch.randn(32, generator=generator) for name, _ in layer.named_parameters()}
    x = torch.randn(5, 32, generator=generator)
    choice = Choice(3, torch.device("cpu"), 16)
    plain, again = (
        NormLayer("n", copy.deepcopy(layer), choice),
        NormLayer("n", copy.deepcopy(layer), choice, compiled=True),
    )
    for one in (plain, again):
        one.put(1, LayerParts(values=values), {})
    choice.show([BASE, 1, 2, 1, BASE], [])
    expected, found = plain(x.clone()), again(x.clone())
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 2, 4]], layer(x.clone())[[0, 2, 4]])
    assert not torch.allclose(found[1], layer(x.clone())[1])
    if kind != "LayerNorm":
        residual = torch.randn(5, 32, generator=generator)
        both = [one(x.clone(), residual.clone()) for one in (plain, again)]
        torch.testing.assert_close(both[1], both[0])
    again.clear(1)
    assert torch.equal(again(x.clone()), layer(x.clone()))


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40), st.integers(0, 8), st.sampled_from([1, 4, 16]))
def test_segments_of_a_graph_are_the_beginning_of_those_of_the_longest_step(
    slots: list[int], padding: int, size: int
) -> None:
    whole = FixedSegments(64, 4, torch.device("cpu"))
    whole.fill([*slots, *[BASE] * (64 - len(slots))])
    count = len(slots) + padding
    found = StepSegments(whole, count).tiles(size)
    expected = Segments(torch.tensor([*slots, *[BASE] * padding], dtype=torch.int32), 4).tiles(size)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.table, expected.table)


def test_buffers_in_a_block_of_an_arena_are_those_of_the_block() -> None:
    block = Arena(torch.device("cpu"), 3, 1024).take(2, 512)
    block.copy_(torch.arange(512) % 251)
    memory = DeviceMemory(block)
    for dtype in (torch.uint8, torch.int32, torch.bfloat16):
        found = memory.view(dtype, (2, 3), 256)
        assert found.data_ptr() == block.data_ptr() + 256
        assert torch.equal(found.view(torch.uint8).flatten(), block[256 : 256 + 6 * dtype.itemsize])


def test_an_arena_has_a_block_for_each_slot_and_refuses_what_is_larger() -> None:
    arena = Arena(torch.device("cpu"), 3, 1000)
    blocks = [arena.take(slot, 500) for slot in range(3)]
    for number, block in enumerate(blocks):
        block.fill_(number + 1)
    assert [int(block.min()) for block in blocks] == [1, 2, 3]
    arena.check("x", arena.size)
    with pytest.raises(
        UsageError, match=r'x takes 769 bytes on the device where a slot has 768; .* \{"largest": 769\}'
    ):
        arena.check("x", 769)
