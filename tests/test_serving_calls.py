"""What a served model says where torch would fail, weights that are read without a call, sums and replaced deltas."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import InvalidFileError, StorageError, UsageError, WrongBaseError
from deltafmt.methods import RTN
from deltafmt.transformers import attach, detach
from tiny_models import ARCHITECTURES, CAUSAL, Tiny, close, every, generate, ids, logits, made_once, new_model, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


def packed(folder: Path, base: Any, tuned: Any, **options: Any) -> Path:
    """Return the delta between two modules."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(base.state_dict(), folder / "base.safetensors")
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    deltafmt.pack(folder / "base.safetensors", folder / "tuned.safetensors", folder / "d.deltafmt", **options)
    return folder / "d.deltafmt"


# Vocabularies


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], dict[Any, Any]]:
    """Give a base, deltas with other vocabularies, and the models that they unpack to."""
    folder = tmp_path_factory.mktemp("vocabularies")
    base = new_model("llama")
    base.save_pretrained(folder / "base")
    deltas, unpacked = {}, {None: base}
    for name, size in (("small", 90), ("same", 96), ("large", 128)):
        tuned = copy.deepcopy(base)
        tuned.resize_token_embeddings(size, mean_resizing=False)
        shake(tuned, size, 0.05)
        tuned.save_pretrained(folder / name)
        deltas[name] = folder / f"{name}.deltafmt"
        deltafmt.pack(folder / "base", folder / name, deltas[name], method=RTN(4, scale_group=8))
        deltafmt.unpack(folder / "base", deltas[name], folder / f"{name}-out")
        unpacked[name] = transformers.LlamaForCausalLM.from_pretrained(folder / f"{name}-out").eval()
    return folder / "base", deltas, unpacked


def test_a_loss_over_another_vocabulary(vocabularies: Any) -> None:
    base, deltas, unpacked = vocabularies
    model = attach(transformers.LlamaForCausalLM.from_pretrained(base).eval(), deltas)
    tokens = ids(2, 6).clamp(max=89)
    for names, name, size in (("large", "large", 128), (["large", None], "large", 128), ("small", "small", 90)):
        message = (
            rf'^the loss over labels takes the vocabulary of 96 tokens of the base, and delta "{name}" has {size}; '
            "leave out labels= and compute the loss from the logits$"
        )
        with pytest.raises(UsageError, match=message):
            model(input_ids=tokens, labels=tokens, delta=names)
    for names in ("same", ["same", None], ["small", None]):
        rows = [names, names] if isinstance(names, str) else names
        losses = [unpacked[name](input_ids=tokens[[row]], labels=tokens[[row]]).loss for row, name in enumerate(rows)]
        found = model(input_ids=tokens, labels=tokens, delta=names).loss
        assert abs(float(found - torch.stack(losses).mean())) < 1e-4


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.5}, {"renormalize_logits": True}, {"num_beams": 3}, {"repetition_penalty": 1.3}]
)
def test_generation_over_several_vocabularies(vocabularies: Any, options: dict[str, Any]) -> None:
    base, deltas, unpacked = vocabularies
    model = attach(transformers.LlamaForCausalLM.from_pretrained(base).eval(), deltas)
    tokens = ids(4, 6).clamp(max=89)
    names = ["large", None, "small", "same"]
    want = [generate(unpacked[name], tokens[[row]], **options) for row, name in enumerate(names)]
    assert torch.equal(generate(model, tokens, delta=names, **options), torch.cat(want))


def test_differences_of_logits_are_numbers(vocabularies: Any) -> None:
    base, deltas, _ = vocabularies
    model = attach(transformers.LlamaForCausalLM.from_pretrained(base).eval(), deltas)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = logits(model.to(dtype), ids(2, 6), delta=[None, "large"])
        shares = found.log_softmax(-1)
        assert not (shares - shares).isnan().any()
        assert bool((found[0].float().softmax(-1)[:, 96:] == 0).all())
        sampled = torch.distributions.Categorical(logits=found[0, -1].float() / 5).sample((500,))
        assert int(sampled.max()) < 96


# Weights that are read without a call


class Tied(torch.nn.Module):
    """A head that multiplies with the embedding's weight, and a norm that is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(96, 32)
        self.fc = torch.nn.Linear(32, 32, bias=False)
        self.norm = torch.nn.LayerNorm(32)

    def forward(self, input_ids: Any, long: bool = False) -> Any:
        """Read one weight more where ``long`` is set."""
        x = torch.tanh(self.fc(self.emb(input_ids)).to(self.norm.weight.dtype))
        x = torch.nn.functional.layer_norm(x, (32,), self.norm.weight, self.norm.bias)
        if long:
            x = x @ self.fc.weight.T
        return torch.nn.functional.linear(x, self.emb.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_read(tmp_path: Path, mode: Any) -> None:
    torch.manual_seed(0)
    base = Tied().eval()
    tuned = copy.deepcopy(base)
    shake(tuned, 1, 0.1)
    path = packed(tmp_path, base, tuned, exclude=["*"])
    tokens = ids(2, 5)
    with torch.no_grad():
        want, longer, plain = tuned(tokens), tuned(tokens, long=True), base(tokens)
    model = attach(base, {"a": path})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with mode():
                assert close(model(tokens, delta="a"), want)
                assert close(model(tokens, long=True, delta="a"), longer)
                assert close(model(input_ids=tokens[:, :1], delta="a"), want[:, :1])
    assert model.deltas.unused() == []
    with mode():
        assert close(model(tokens, delta=["a", None]), torch.stack([want[0], plain[1]]))
        both = model(tokens, long=True, delta=[None, "a"])
    assert close(both[1:], longer[1:])
    with torch.no_grad():
        assert torch.equal(model(tokens, delta=[None, None]), plain)
        assert torch.equal(model(tokens), plain)


def test_a_module_that_is_not_called_is_warned_of_once(tmp_path: Path) -> None:
    class Spare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.used(x)

    base, tuned = Spare(), Spare()
    model = attach(base, {"a": packed(tmp_path, base, tuned, exclude=["*"])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 8))
        model(torch.randn(2, 8), delta=None)
    with pytest.warns(RuntimeWarning, match=r'^the model has not called "spare", which deltas change; if it reads'):
        model(torch.randn(2, 8), delta="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 8), delta="a")
    assert model.deltas.unused() == ["spare"]


@every(ARCHITECTURES)
def test_siblings_are_not_reads(tiny: Tiny) -> None:
    """A module's output that is computed ahead, with its siblings, is no read of its weight; every kind of call."""
    model = attach(tiny.load(), tiny.deltas)
    apart = attach(tiny.load(), tiny.deltas, fuse=False)
    calls = [ids(2, 5), ids(2, 1), ids(2, 7)]
    for tokens in calls:
        for names in ("one", ["one", None], "two"):
            for options in ({}, {"output_hidden_states": True}):
                with model.delta(names), apart.delta(names):
                    assert torch.equal(logits(model, tokens, **options), logits(apart, tokens, **options))
    assert model.deltas.reads._found == set()


# Sums with weights


def fraction(base: Any, parts: list[tuple[Any, float]]) -> Any:
    """Return a model whose weights are the base's and weighted changes."""
    total = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in total.named_parameters():
            for part, weight in parts:
                parameter.add_(part.get_parameter(name) - base.get_parameter(name), alpha=weight)
    return total


@every((*CAUSAL, "bert-mlm"))
def test_a_row_sums_deltas_with_weights(tiny: Tiny) -> None:
    base, one, two = (tiny.load(folder) for folder in (None, tiny.unpacked["one"], tiny.unpacked["two"]))
    tokens = ids(4, 6)
    mixes = [{"one": 0.7, "two": 0.3}, None, "one", {"two": -0.5}]
    truths = [fraction(base, [(one, 0.7), (two, 0.3)]), base, one, fraction(base, [(two, -0.5)])]
    want = [logits(truth, tokens)[row] for row, truth in enumerate(truths)]
    model = attach(tiny.load(), tiny.deltas)
    for _ in range(3):
        assert near(logits(model, tokens, delta=mixes), torch.stack(want))
        assert near(logits(model, tokens[:1], delta=mixes[0]), want[0][None])
        assert torch.equal(logits(model, tokens, delta={"one": 1.0}), logits(model, tokens, delta="one"))
        assert torch.equal(logits(model, tokens, delta={"one": 0}), logits(model, tokens))
    if tiny.kind in CAUSAL:
        alone = torch.cat([generate(model, tokens[[row]], delta=name) for row, name in enumerate(mixes)])
        with model.delta(mixes):
            assert torch.equal(generate(model, tokens), alone)


def near(found: Any, want: Any) -> bool:
    return bool((found - want).abs().max() <= 2e-4 * want.abs().max())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"one": float("nan")}, r'^the weight nan of delta "one" is not a finite number$'),
        ({"one": "0.5"}, r"^the weight '0.5' of delta \"one\" is not a finite number$"),
        ({"one": True}, r'^the weight True of delta "one"'),
        ({None: 1.0}, r"^None is not the name of a delta, and has no weight$"),
        ({"base": 1.0}, r"^'base' is not the name of a delta, and has no weight$"),
        ({}, r"^a row is given no names; None is the base$"),
        ([["one"]], r"^\['one'\] is not a name of a delta; a row takes a name, None or names with weights$"),
        (3, r"^3 is not a name of a delta, nor a list with a name for each row$"),
        ({"one": 0.5, "three": 0.5}, r'^there is no delta "three"; known: one, two$'),
    ],
)
def test_weights_that_are_refused(tiny: Tiny, names: Any, message: str) -> None:
    model = attach(tiny.load(), tiny.deltas)
    with pytest.raises(UsageError, match=message), model.delta(names):
        pass
    with pytest.raises(UsageError, match=message):
        logits(model, ids(1, 3), delta=names)
    assert model.deltas._open == 0


def test_weights_and_vocabularies(vocabularies: Any) -> None:
    base, deltas, _ = vocabularies
    model = attach(transformers.LlamaForCausalLM.from_pretrained(base).eval(), deltas)
    with pytest.raises(UsageError, match=r'^delta "large" changes the number of rows of tensor ".*", and cannot be'):
        logits(model, ids(1, 4), delta={"large": 0.5, "same": 0.5})
    wide = logits(model, ids(3, 4), delta=[{"same": 0.5}, "large", None])
    assert near(wide[:1, :, :96], logits(model, ids(3, 4), delta={"same": 0.5})[:1])


# Replacing a delta


def test_replace_a_delta_that_is_served(tiny: Tiny) -> None:
    """Blocks and calls that have begun end with the old file; later ones have the new; nothing is kept."""
    tokens = ids(1, 5)
    model = attach(tiny.load(), {"a": tiny.deltas["one"]})
    one = logits(model, tokens, delta="a")
    before = model.deltas.residency.used
    with model.delta("a"):
        model.deltas.replace("a", tiny.deltas["two"])
        assert torch.equal(logits(model, tokens), one)
        two = logits(model, tokens, delta="a")
        assert not torch.equal(one, two)
        model.deltas.replace("a", tiny.deltas["one"])
        assert torch.equal(logits(model, tokens, delta="a"), one)
        assert model.deltas.names == ["a"]
    assert model.deltas.residency.used == before
    assert len(model.deltas._versions) == len(model.deltas._store.files) == 1
    model.deltas.remove("a")
    assert model.deltas.residency.used == 0
    detach(model)


def test_replace_refuses_before_anything_changes(tiny: Tiny, tmp_path: Path) -> None:
    tokens = ids(1, 5)
    model = attach(tiny.load(), tiny.deltas)
    one = logits(model, tokens, delta="one")
    with pytest.raises(UsageError, match=r'^there is no delta "three"; known: one, two$'):
        model.deltas.replace("three", tiny.deltas["two"])
    with pytest.raises(StorageError):
        model.deltas.replace("one", tmp_path / "missing")
    damaged = bytearray(tiny.deltas["two"].read_bytes())
    damaged[4096 + 100] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(InvalidFileError):
        model.deltas.replace("one", tmp_path / "damaged")
    other = new_model("llama", seed=9)
    other.save_pretrained(tmp_path / "base")
    deltafmt.pack(tmp_path / "base", tiny.unpacked["two"], tmp_path / "other")
    with pytest.raises(WrongBaseError):
        model.deltas.replace("one", tmp_path / "other")
    assert torch.equal(logits(model, tokens, delta="one"), one)
    assert len(model.deltas._versions) == 2
    model.deltas.merge("two")
    with pytest.raises(UsageError, match=r'^delta "two" is merged into the base; unmerge it before another is'):
        model.deltas.replace("one", tiny.deltas["two"])


def test_replace_without_room_for_both(tiny: Tiny) -> None:
    tokens = ids(1, 5)
    free = attach(tiny.load(), tiny.deltas)
    want = {name: logits(free, tokens, delta=name) for name in tiny.deltas}
    room = max(free.deltas._store.nbytes(name) for name in tiny.deltas)
    model = attach(tiny.load(), {"a": tiny.deltas["one"]}, budget=room)
    with model.delta("a"):
        model.deltas.replace("a", tiny.deltas["two"])
        assert torch.equal(logits(model, tokens), want["one"])
    assert torch.equal(logits(model, tokens, delta="a"), want["two"])


def test_replace_under_load(tiny: Tiny) -> None:
    tokens = ids(1, 5)
    model = attach(tiny.load(), {"a": tiny.deltas["one"]})
    one = logits(model, tokens, delta="a")
    model.deltas.replace("a", tiny.deltas["two"])
    want = [one, logits(model, tokens, delta="a")]
    wrong: list[Any] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                with model.delta("a"):
                    first, second = logits(model, tokens), logits(model, tokens)
                if not torch.equal(first, second) or not any(torch.equal(first, one) for one in want):
                    wrong.append("a half state")
            except BaseException as error:  # noqa: BLE001 - shown below
                wrong.append(error)
                return

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        model.deltas.replace("a", tiny.deltas[("one", "two")[turn % 2]])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(model.deltas._versions) == 1
    detach(model)


def test_two_uses_of_a_replaced_version_end_at_once(tiny: Tiny) -> None:
    """Both threads free the old version; by then the second may find a newer one, which it must leave alone."""
    model = attach(tiny.load(), {"a": tiny.deltas["one"]})
    tokens = ids(1, 5)
    model.deltas.replace("a", tiny.deltas["two"])
    want = logits(model, tokens, delta="a")
    model.deltas.replace("a", tiny.deltas["two"])
    model.deltas._pool.retire("a")
    model.deltas._pool.retire("a (2)")
    assert torch.equal(logits(model, tokens, delta="a"), want)
    assert len(model.deltas._versions) == 1
    detach(model)


def test_a_module_that_only_holds_what_others_use_is_not_warned_of(tmp_path: Path) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.used = torch.nn.Embedding(12, 8), torch.nn.Embedding(12, 8)
            self.used.load_state_dict(self.shared.state_dict())

        def forward(self, tokens: Any) -> Any:
            return self.used(tokens)

    base, tuned = Shared(), Shared()
    path = packed(tmp_path, base, tuned, exclude=["*"])
    base.used.weight = base.shared.weight
    model = attach(base, {"a": path})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model(torch.arange(4)[None], delta="a")
    assert close(found, tuned(torch.arange(4)[None]))
    assert model.deltas.unused() == []


def test_calls_that_are_recorded_are_refused(tiny: Tiny) -> None:
    """What is recorded would serve the same rows in every later call."""
    model, tokens = attach(tiny.load().requires_grad_(requires_grad=False), tiny.deltas), ids(2, 4)
    record = {
        "export": lambda: torch.export.export(model, (tokens,), {"use_cache": False}, strict=False),
        "jit.trace": lambda: torch.jit.trace(lambda rows: model(rows, use_cache=False).logits, tokens),
        "func": lambda: torch.vmap(lambda rows: model(rows, use_cache=False).logits)(tokens[:, None]),
    }
    for way, call in record.items():
        with torch.no_grad(), model.delta("one"), pytest.raises(UsageError, match=f"recorded by torch.{way}; unpack"):
            call()
    with pytest.raises(UsageError, match=r"recorded by torch\.export"):
        record["export"]()
    want = logits(tiny.load(), tokens)
    with torch.no_grad():
        assert close(record["jit.trace"]()(tokens), want)


def test_parts_that_are_recorded_are_refused(tiny: Tiny) -> None:
    """Siblings, a module with a hook, and one that computes with its parameter."""
    model = attach(tiny.load(), tiny.deltas)
    logits(model, ids(2, 4), delta="one")
    layer, x = model.model.layers[0], torch.randn(1, 3, 32)
    for part in (layer.mlp, layer.self_attn.o_proj, layer.input_layernorm):
        with torch.no_grad(), model.delta("one"):
            with pytest.raises(UsageError, match=r"recorded by torch\.jit\.trace; unpack"):
                torch.jit.trace(part, x)
            part(x)
        with torch.no_grad():
            assert close(torch.jit.trace(part, x)(x), part(x))


def test_embeddings_that_the_caller_looks_up(tiny: Tiny) -> None:
    """Soft prompts and images are put between rows of the embedding, which the caller asks for before the call."""
    model, tokens, names = attach(tiny.load(), tiny.deltas), ids(3, 5), ["one", None, "two"]
    embedding = model.get_input_embeddings()

    def continued(model: Any, rows: Any) -> Any:
        given = model.get_input_embeddings()(rows).detach()
        return model.generate(
            inputs_embeds=given, attention_mask=torch.ones_like(rows), max_new_tokens=5, pad_token_id=0
        )

    with model.delta(names):
        found = continued(model, tokens)
        with pytest.raises(UsageError, match="given 2 rows and 3 names"):
            embedding(tokens[:2])
        with pytest.raises(UsageError, match="embed_tokens is called outside of its model"):
            embedding(tokens[:, 0])  # three ids may be three rows, or one row's tokens
        assert torch.equal(continued(model, tokens), found)
    for row, name in enumerate(names):
        want = continued(tiny.load(tiny.unpacked[name] if name else None), tokens[row : row + 1])
        assert torch.equal(found[row : row + 1], want)
    detach(model)
    assert not embedding._forward_pre_hooks
    assert not embedding._forward_hooks
