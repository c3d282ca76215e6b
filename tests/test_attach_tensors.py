"""Every kind of tensor and of module: quantized, replaced, grown, tied, missing, shared inputs; and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.methods import DeltaDQ
from deltafmt.transformers import attach, detach
from tiny_models import Tiny, close, every, generate, ids, logits, made_once, make_tiny, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


class Int8Linear(torch.nn.Module):
    """A quantized linear module as libraries make them: no float parameter, ``in_features`` and ``out_features``."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.scale = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (source.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = source.bias

    def forward(self, x: Any) -> Any:
        """Multiply with the dequantized weight."""
        return torch.nn.functional.linear(x, self.qweight.float() * self.scale, self.bias)


def quantize(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            model.set_submodule(name, Int8Linear(module))
    return model


@every(["llama", "qwen2", "opt"])
def test_a_quantized_base(tiny: Tiny) -> None:
    tokens = ids(3, 6)
    model = quantize(tiny.load())
    base = logits(model, tokens)
    exact = logits(tiny.load(), tokens)
    tuned = {name: logits(tiny.load(folder), tokens) for name, folder in tiny.unpacked.items()}
    attach(model, tiny.deltas)
    assert any("mlp" in name or "fc1" in name for name in model.deltas.unchecked["one"])
    assert not any("embed_tokens" in name for name in model.deltas.unchecked["one"])
    names = ["one", None, "two"]
    with model.delta(names):
        found = logits(model, tokens)
    assert torch.equal(found[1], base[1])
    for row, name in enumerate(names):
        expected = tuned[name][row] if name else exact[row]
        rounding = torch.linalg.norm(base[row] - exact[row])
        assert torch.linalg.norm(found[row] - expected) < 3 * rounding
    with pytest.raises(UsageError, match=r"cannot be merged: its module holds the weight in another form"):
        model.deltas.merge("one")
    with model.delta("one"):
        logits(model, tokens)


def test_dynamically_quantized(tiny: Tiny) -> None:
    tokens = ids(2, 6)
    exact = tiny.load()
    tuned = logits(tiny.load(tiny.unpacked["one"]), tokens)
    with warnings.catch_warnings(action="ignore"):  # torch.ao is deprecated
        model = torch.ao.quantization.quantize_dynamic(tiny.load(), {torch.nn.Linear}, dtype=torch.qint8)
        rounding = torch.linalg.norm(logits(model, tokens) - logits(exact, tokens))
    attach(model, tiny.deltas)
    with model.delta("one"):
        assert torch.linalg.norm(logits(model, tokens) - tuned) < 3 * rounding


def repack(tiny: Tiny, folder: Path, change: Any, **options: Any) -> tuple[Path, Any]:
    """Return a delta between the base and a changed model, and what it unpacks to."""
    model = tiny.load()
    change(model)
    model.save_pretrained(folder / "tuned")
    deltafmt.pack(tiny.base, folder / "tuned", folder / "d.deltafmt", **options)
    deltafmt.unpack(tiny.base, folder / "d.deltafmt", folder / "out")
    return folder / "d.deltafmt", tiny.load(folder / "out")


@every(["llama", "qwen2", "gpt2", "opt", "bert"])
def test_weights_kept_exactly(tiny: Tiny, tmp_path: Path) -> None:
    """Whatever was excluded from compression replaces the base's."""
    path, tuned = repack(tiny, tmp_path, lambda model: shake(model, 5, 0.05), include=["*.1.*"])
    with deltafmt.open(path) as delta:
        assert {"replace", "add"} <= {delta[name].action for name in delta}
    tokens = ids(4, 5)
    model = attach(tiny.load(), {"exact": path, **tiny.deltas})
    with model.delta(["exact", "one", None, "exact"]):
        mixed = logits(model, tokens)
    with model.delta("exact"):
        alone = logits(model, tokens)
    expected = logits(tuned, tokens)
    assert close(alone, expected)
    assert close(mixed[[0, 3]], expected[[0, 3]])
    assert close(mixed[2], logits(tiny.load(), tokens)[2])


def grow(rows: int) -> Any:
    def change(model: Any) -> None:
        model.resize_token_embeddings(rows, mean_resizing=False)
        shake(model, 6, 0.05)

    return change


@every(["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"exclude": ["*embed_tokens*"]}], ids=["packed", "exact"])
def test_a_grown_vocabulary(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    path, tuned = repack(tiny, tmp_path, grow(101), **options)
    model = attach(tiny.load(), {"grown": path, **tiny.deltas})
    tokens = ids(3, 6)
    wide = tokens.clone()
    wide[0, 2:4] = torch.tensor([96, 100])
    with model.delta("grown"):
        assert close(logits(model, wide), logits(tuned, wide))
        assert torch.equal(generate(model, wide), generate(tuned, wide))
    with model.delta(["grown", "one", None]):
        found = logits(model, wide)
        text = generate(model, wide)
    assert close(found[0], logits(tuned, wide)[0])
    assert torch.equal(text[:1], generate(tuned, wide[:1]))
    one = tiny.load(tiny.unpacked["one"])
    assert close(found[1, :, :96], logits(one, wide[1:])[0])
    assert bool((found[1:, :, 96:] == -torch.inf).all())
    assert torch.equal(text[1:2], generate(one, wide[1:2]))
    with model.delta("one"):
        assert logits(model, tokens).shape[-1] == 96
    with pytest.raises(UsageError, match=r"cannot be merged: it is"):
        model.deltas.merge("grown")


def test_a_smaller_vocabulary(tiny: Tiny, tmp_path: Path) -> None:
    path, tuned = repack(tiny, tmp_path, grow(90))
    model = attach(tiny.load(), {"small": path, **tiny.deltas})
    tokens = ids(2, 5).clamp(max=89)
    with model.delta("small"):
        assert close(logits(model, tokens), logits(tuned, tokens))
    with model.delta(["small", "one"]):
        found = logits(model, tokens)
    assert close(found[0, :, :90], logits(tuned, tokens)[0])
    assert bool((found[0, :, 90:] == -torch.inf).all())
    assert bool(found[1].isfinite().all())


def test_a_head_that_the_model_lacks(tiny: Tiny) -> None:
    import transformers

    tokens = ids(2, 5)
    inner = transformers.LlamaModel.from_pretrained(tiny.base, dtype=torch.float32).eval()
    with pytest.raises(UsageError, match=r'^LlamaModel has no place for tensor "lm_head.weight" of the delta; ignore='):
        attach(inner, tiny.deltas)
    model = attach(inner, tiny.deltas, ignore=["lm_head.*"])
    assert model.deltas.ignored == {"one": ["lm_head.weight"], "two": ["lm_head.weight"]}
    tuned = transformers.LlamaModel.from_pretrained(tiny.unpacked["two"], dtype=torch.float32).eval()
    with torch.no_grad(), model.delta("two"):
        assert close(model(input_ids=tokens).last_hidden_state, tuned(input_ids=tokens).last_hidden_state)


def test_a_tie_that_the_base_lacks(tiny: Tiny, tmp_path: Path) -> None:
    """The fine-tune's head is its embedding; the base's is not, so there is nothing to add a delta to."""

    def tie(model: Any) -> None:
        shake(model, 7, 0.05)
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True

    path, _ = repack(tiny, tmp_path, tie)
    with pytest.raises(UsageError, match=r'^the fine-tune has no tensor "lm_head.weight", which LlamaForCausalLM has'):
        attach(tiny.load(), {"d": path})


def test_a_tie_in_the_delta_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Tied tensors are stored once; a model that holds two copies takes them, one that holds two others does not."""
    base, tuned = tiny.load(), tiny.load()
    shake(tuned, 7, 0.05)
    for side, model in (("base", base), ("tuned", tuned)):
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.save_pretrained(tmp_path / side)
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    deltafmt.unpack(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    with deltafmt.open(tmp_path / "d") as delta:
        assert delta["model.embed_tokens.weight"].action == "alias"
    model = attach(tiny.load(tmp_path / "base"), {"d": tmp_path / "d"})
    with model.delta("d"):
        assert close(logits(model, ids(2, 4)), logits(tiny.load(tmp_path / "out"), ids(2, 4)))
    model.deltas.merge("d")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    refused = (
        r'^tensors "model.embed_tokens.weight" and "lm_head.weight" are one in the fine-tune and differ in the model'
    )
    with pytest.raises(WrongBaseError, match=refused):
        attach(tiny.load(), {"d": tmp_path / "d"}, verify_base=False)


def test_names_that_differ(tiny: Tiny) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.language = inner

        def forward(self, input_ids: Any) -> Any:
            return self.language(input_ids=input_ids)

    tokens = ids(2, 4)
    wrapped = Wrapped(tiny.load())
    with pytest.raises(UsageError, match=r'^Wrapped has no place for tensor "lm_head.weight"'):
        attach(wrapped, tiny.deltas)
    model = attach(wrapped, tiny.deltas, rename=lambda name: f"language.{name}")
    with model.delta(["two", "one"]):
        found = logits(model, tokens)
    assert close(found[0], logits(tiny.load(tiny.unpacked["two"]), tokens)[0])


def test_a_tensor_that_the_base_lacks(tiny: Tiny, tmp_path: Path) -> None:
    path, _ = repack(tiny, tmp_path, lambda model: setattr(model.model, "extra", torch.nn.Linear(4, 4)))
    with pytest.raises(UsageError, match=r'no place for tensor "model.extra.(bias|weight)" of the delta'):
        attach(tiny.load(), {"d": path})


@pytest.mark.parametrize("names", ["one", ["one", None, "two"]], ids=["same", "mixed"])
@every(["llama", "qwen2"])
def test_siblings_share_a_launch(tiny: Tiny, names: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and not, outputs are the same, bit for bit; the second forward needs fewer launches."""
    from deltafmt.kernels.products import matmul_
    from deltafmt.runtime import siblings, sites

    launches: list[int] = []

    def counted(outputs: Any, *arguments: Any) -> None:
        launches.append(len(outputs))
        matmul_(outputs, *arguments)

    monkeypatch.setattr(sites, "matmul_", counted)
    monkeypatch.setattr(siblings, "matmul_", counted)
    tokens = ids(3, 5)
    apart = attach(tiny.load(), tiny.deltas, fuse=False)
    with apart.delta(names):
        want = logits(apart, tokens)
    alone = list(launches)
    assert set(alone) == {1}
    model = attach(tiny.load(), tiny.deltas)
    before = logits(model, tokens)
    for turn in range(4):
        launches.clear()
        with model.delta(names):
            assert torch.equal(logits(model, tokens), want)
            assert torch.equal(logits(model, tokens), want)
        if turn:
            # Of seven products in each of the two layers, q, k and v are one, gate and up another.
            assert launches.count(3) == launches.count(2) == 4
            assert len(launches) == 2 * (len(alone) - 2 * 3)
    assert torch.equal(logits(model, tokens), before)
    model.deltas.remove("two")
    with model.delta("one"):
        logits(model, tokens)
    detach(model)
    assert torch.equal(logits(model, tokens), before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_siblings_that_are_called_otherwise(tiny: Tiny) -> None:
    """A module that gets another tensor than its siblings, or the same one after a change, computes for itself."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (torch.nn.Linear(32, rows) for rows in (16, 24, 16))
            self.way = "same"

        def forward(self, x: Any) -> Any:
            first = self.a(x)
            if self.way == "changed":
                x += 1
            if self.way == "other":
                x = x + 1
            second = torch.zeros(*x.shape[:-1], 24) if self.way == "skipped" else self.b(x)
            if self.way == "twice":
                second = second + self.b(x)
            if self.way == "named":
                second = second + self.b(input=x)
            return torch.cat([first, second, self.c(x)], -1)

    folder = tiny.base.parent / "block"
    folder.mkdir(exist_ok=True)
    from safetensors.torch import save_file

    tuned = Block()
    save_file(Block().state_dict(), folder / "base.safetensors")
    shake(tuned, 3, 0.1)
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    path = folder / "d.deltafmt"
    deltafmt.pack(folder / "base.safetensors", folder / "tuned.safetensors", path, method=DeltaDQ(2, 8, 4), force=True)
    fused, apart = attach(Block(), {"d": path}), attach(Block(), {"d": path}, fuse=False)
    x = torch.randn(2, 3, 32)
    for mode in (torch.no_grad, torch.inference_mode):
        for way in ("same", "same", "changed", "other", "skipped", "twice", "named", "same"):
            fused.way = apart.way = way
            with mode(), fused.delta("d"), apart.delta("d"):
                for _ in range(3):
                    assert torch.equal(fused(x.clone()), apart(x.clone())), way
    detach(fused)
    detach(apart)
    fused.way = "same"
    assert torch.equal(fused(x), Block()(x))


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """T5, whose table of relative positions does not follow the batch: one delta at a time, unless that is the same."""
    t5 = make_tiny("t5", tmp_path / "t5")
    tokens = ids(3, 5)
    model = attach(t5.load(), t5.deltas)
    with model.delta("one"):
        assert torch.equal(generate(model, tokens), generate(t5.load(t5.unpacked["one"]), tokens))
    with model.delta(["one", "two", None]), pytest.raises(UsageError, match=r"serves one delta at a time$"):
        generate(model, tokens)
    tuned = t5.load()
    table = "relative_attention_bias"
    kept = {name: value.clone() for name, value in tuned.state_dict().items() if table in name}
    shake(tuned, 8, 0.05)
    tuned.load_state_dict(kept, strict=False)
    tuned.save_pretrained(tmp_path / "kept")
    deltafmt.pack(t5.base, tmp_path / "kept", tmp_path / "kept.deltafmt")
    deltafmt.unpack(t5.base, tmp_path / "kept.deltafmt", tmp_path / "out")
    model = attach(t5.load(), {"kept": tmp_path / "kept.deltafmt"})
    with model.delta(["kept", None, "kept"]):
        found = generate(model, tokens, num_beams=2)
    assert torch.equal(found[[0, 2]], generate(t5.load(tmp_path / "out"), tokens[[0, 2]], num_beams=2))
    assert torch.equal(found[1:2], generate(t5.load(), tokens[1:2], num_beams=2))


def test_modules_that_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def delta(model: Any, name: str) -> Path:
        shake(model, 1, 1)
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        tuned = {key: value.clone() for key, value in model.state_dict().items()}
        tuned[name] += 0.1
        save_file(tuned, tmp_path / "tuned.safetensors")
        deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", force=True)
        return tmp_path / "d"

    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(32, 4))
    with pytest.raises(UsageError, match=r'^tensor "0.out_proj.weight" is read by torch.nn.MultiheadAttention'):
        attach(attention, {"d": delta(attention, "0.out_proj.weight")})
    with pytest.raises(
        UsageError, match=r'^tensor "0.in_proj_weight" belongs to MultiheadAttention, which has modules'
    ):
        attach(attention, {"d": delta(attention, "0.in_proj_weight")})
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(8))
    with pytest.raises(UsageError, match=r'^Sequential has no place for tensor "0.running_mean" of the delta'):
        attach(norm, {"d": delta(norm, "0.running_mean")})
    recurrent = torch.nn.Sequential(torch.nn.LSTM(8, 8))
    model = attach(recurrent, {"d": delta(recurrent, "0.weight_hh_l0")})
    with model.delta("d"), pytest.raises(UsageError, match=r"^0, a LSTM, gives tuple, which a delta cannot be added"):
        model(torch.randn(2, 3, 8))
    resized = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    save_file({"0.weight": torch.randn(9, 8)}, tmp_path / "tuned.safetensors")
    save_file(resized.state_dict(), tmp_path / "base.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", force=True)
    with pytest.raises(UsageError, match=r'^tensor "0.weight" is \[9, 8\] where Sequential has \[8, 8\]; only embed'):
        attach(resized, {"d": tmp_path / "d"})


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """Experts see tokens in an order of their own, and transformers holds them in one tensor under another name."""
    import transformers

    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 32, "intermediate_size": 32}
    config = transformers.MixtralConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=2, **options)
    model = transformers.MixtralForCausalLM(config)
    tuned = transformers.MixtralForCausalLM(config)
    shake(tuned, 0, 0.1)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    with pytest.raises(UsageError, match=r"^MixtralForCausalLM has no place for tensor .*experts"):
        attach(model, {"d": tmp_path / "d"})


def test_rows_that_cannot_be_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    class Shuffled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8, bias=False)
            self.spare = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: Any) -> Any:
            return self.layer(x.transpose(0, 1)[:3])

    model = Shuffled()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    shake(model, 0, 0.1)
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d")
    model = attach(model, {"d": tmp_path / "d"}, verify_base=False)
    with model.delta("d"):
        model(torch.randn(2, 5, 8))
    # What a delta changes and the model did not run.
    assert model.deltas.unused() == ["spare"]
    refused = r"^layer is given the shape \[3, 2\], which does not follow"
    with model.delta(["d", None]), pytest.raises(UsageError, match=refused):
        model(torch.randn(2, 5, 8))


def test_saving_while_attached(tiny: Tiny, tmp_path: Path) -> None:
    model = attach(tiny.load(), tiny.deltas)
    with model.delta("one"):
        logits(model, ids(1, 3))
        model.save_pretrained(tmp_path / "saved")
    saved = tiny.load(tmp_path / "saved")
    assert torch.equal(logits(saved, ids(1, 3)), logits(tiny.load(), ids(1, 3)))
