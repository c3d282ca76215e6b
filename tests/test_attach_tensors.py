"""Every kind of tensor that a delta may attach: over a quantized base, replaced, grown, tied, missing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.transformers import attach
from tiny_models import Tiny, close, every, generate, ids, logits, made_once, shake

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
    assert bool((found[1:, :, 96:] == torch.finfo(torch.float32).min).all())
    assert torch.equal(text[1:2], generate(one, wide[1:2]))
    with model.delta("one"):
        assert logits(model, tokens).shape[-1] == 96
    with pytest.raises(UsageError, match=r"cannot be merged: its shape is"):
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
    assert bool((found[0, :, 90:] == torch.finfo(torch.float32).min).all())
    assert bool(found[1].isfinite().all())


def test_a_head_that_the_model_lacks(tiny: Tiny) -> None:
    import transformers

    tokens = ids(2, 5)
    inner = transformers.LlamaModel.from_pretrained(tiny.base, dtype=torch.float32).eval()
    with pytest.raises(UsageError, match=r'^LlamaModel has no place for tensor "lm_head.weight" of the delta; rename='):
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
        r'^tensors "model.embed_tokens.weight" and "lm_head.weight" are tied in the fine-tune but differ in the model'
    )
    with pytest.raises(WrongBaseError, match=refused):
        attach(tiny.load(), {"d": tmp_path / "d"}, verify_base=False)


@pytest.mark.situation("`attach`: the model's names differ from the delta's")
@pytest.mark.parametrize("rename", [None, ["=language."], ["*=language.*"], lambda name: f"language.{name}"])
def test_names_that_differ(tiny: Tiny, rename: Any) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.language = inner

        def forward(self, input_ids: Any) -> Any:
            return self.language(input_ids=input_ids)

    tokens = ids(2, 4)
    wrapped = Wrapped(tiny.load())
    model = attach(wrapped, tiny.deltas, rename=rename)
    with model.delta(["two", "one"]):
        found = logits(model, tokens)
    assert close(found[0], logits(tiny.load(tiny.unpacked["two"]), tokens)[0])


def test_a_tensor_that_the_base_lacks(tiny: Tiny, tmp_path: Path) -> None:
    path, _ = repack(tiny, tmp_path, lambda model: setattr(model.model, "extra", torch.nn.Linear(4, 4)))
    with pytest.raises(UsageError, match=r'no place for tensor "model.extra.(bias|weight)" of the delta'):
        attach(tiny.load(), {"d": path})


def test_saving_while_attached(tiny: Tiny, tmp_path: Path) -> None:
    model = attach(tiny.load(), tiny.deltas)
    with model.delta("one"):
        logits(model, ids(1, 3))
        model.save_pretrained(tmp_path / "saved")
    saved = tiny.load(tmp_path / "saved")
    assert torch.equal(logits(saved, ids(1, 3)), logits(tiny.load(), ids(1, 3)))
