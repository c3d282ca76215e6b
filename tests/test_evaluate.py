"""Evaluations: the figures are those of plain forward passes and of the models' own generation, and what is refused."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from conftest import NANO, Cli
from deltafmt.analysis.evaluation import page, readers, tables
from deltafmt.analysis.evaluation.figures import Evaluation, ModelFigures, followed, lost_of
from deltafmt.analysis.evaluation.texts import PROMPT, Span, prompts, spans
from deltafmt.calibration.text import Document
from deltafmt.calibration.tokens import Encoder, batched
from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods import DeltaDQ
from tiny_models import KINDS, Tiny, every, made_once, new_model, shake, transformers

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

TOKENIZER = NANO / "tokenizer.json"
BOS = 1


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 94 words, which are the tokens 2 to 95; a text begins with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2, 96)} | {"unk": 0}, unk_token="unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def text_of(folder: Path, name: str = "text.jsonl") -> Path:
    """Write two texts, one of them longer than a sequence of 24 tokens, and three prompts with answers."""
    rng = np.random.default_rng(0)

    def some(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(2, 96, count))

    lines: list[dict[str, str]] = [{"text": some(60)}, {"text": some(20)}]
    lines += [{"prompt": some(count), "completion": " " + some(9)} for count in (5, 7, 30)]
    path = folder / name
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


class Reference:
    """The plain way: whole models, one sequence at a time, in numpy and float64."""

    def __init__(self, model: Any, sequences: list[Span]) -> None:
        self.model = model
        self.logs = []
        for span in sequences:
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(span.tokens)[None]).logits[0].double().numpy()
            self.logs.append(log_softmax(logits)[span.first - 1 : span.stop - 1])

    def figures(self, other: Reference, sequences: list[Span]) -> dict[str, float]:
        """Return the figures of this model beside the other."""
        targets = np.concatenate([span.tokens[span.first : span.stop] for span in sequences])
        mine, theirs = np.concatenate(self.logs), np.concatenate(other.logs)
        return {
            "log_likelihood": float(mine[np.arange(len(targets)), targets].mean()),
            "agreement": float((mine.argmax(-1) == theirs.argmax(-1)).mean()),
            "divergence": float((np.exp(theirs) * (theirs - mine)).sum(-1).mean()),
        }

    def writes(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """Return what this model's own generation writes."""
        tokens = torch.from_numpy(prompt)[None]
        mask = torch.ones_like(tokens)
        found = self.model.generate(
            tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        return [int(token) for token in found[0, prompt.size :]]


def encoder() -> Encoder:
    return Encoder(lambda text: [int(word[1:]) for word in text.split()], (BOS,), (), None)


@every(["llama", "gemma3"])
def test_figures_are_those_of_plain_forward_passes(tiny: Tiny, words: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path)
    finetuned = tiny.base.parent / "one"
    steps: list[tuple[int, int]] = []
    found = deltafmt.evaluate(
        tiny.base,
        finetuned,
        [tiny.deltas["one"], tiny.deltas["two"]],
        text,
        tokenizer=words,
        length=24,
        continuations=4,
        new_tokens=6,
        device="cpu",
        progress=lambda done, total: steps.append((done, total)),
    )
    documents = [
        Document(tuple(line.values()), ended=len(line) > 1) for line in map(json.loads, text.read_text().splitlines())
    ]
    sequences = spans(documents, encoder(), 24, 10**6)
    folders = {"base": tiny.base, "finetuned": finetuned, **tiny.unpacked}
    models = {name: Reference(tiny.load(folder), sequences) for name, folder in folders.items()}
    theirs = models["finetuned"]
    asked = prompts(sequences, 4, 64)
    labels = (str(tiny.base), str(finetuned), *map(str, tiny.deltas.values()))
    assert [model.label for model in found.models] == [*labels]
    assert [model.role for model in found.models] == ["base", "finetuned", "delta", "delta"]
    assert (found.tokens, found.sequences) == (sum(span.tokens.size for span in sequences), len(sequences))
    assert found.counted == sum(span.counted for span in sequences)
    assert found.prompts == tuple(prompt.size for prompt in asked)
    for model, reference in zip(found.models, models.values(), strict=True):
        for name, value in reference.figures(theirs, sequences).items():
            assert getattr(model, name) == pytest.approx(value, abs=2e-4), (model.label, name)
        assert model.lost == pytest.approx(found.finetuned.log_likelihood - model.log_likelihood, abs=1e-9)
        # Where its own greedy continuation leaves the fine-tune's.
        for prompt, length, same in zip(asked, found.continuations, model.followed, strict=True):
            wanted, own = theirs.writes(prompt, length), reference.writes(prompt, length)
            parted = next((i for i in range(length) if wanted[i] != own[i]), length)
            assert same == parted, model.label
    assert found.finetuned.divergence == 0
    assert found.finetuned.agreement == 1
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_blocks_and_the_whole_model_predict_the_same(words: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A model that is no chain of blocks is run as a whole."""
    home = tmp_path / "models"
    for seed, name in enumerate(("base", "one")):
        new_model("llama", seed).save_pretrained(home / name)
    deltafmt.pack(home / "base", home / "one", home / "d.deltafmt", method=DeltaDQ(4, 16, 4))
    arguments = (home / "base", home / "one", [home / "d.deltafmt"], text_of(tmp_path))
    options: Any = {"tokenizer": words, "device": "cpu", "new_tokens": 3, "continuations": 2}
    chained = deltafmt.evaluate(*arguments, **options)
    monkeypatch.setattr(readers, "find_blocks", lambda _: ("", []))
    whole = deltafmt.evaluate(*arguments, **options)
    for one, other in zip(chained.models, whole.models, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-6)
        assert one.followed == other.followed


def test_a_released_model_predicts_from_its_hidden_states() -> None:
    model = new_model("llama")
    tokens = np.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)).logits
    reader = readers.reader_of(model, "m", torch.device("cpu"), tokens[:1])
    reader.read(batched(list(tokens), 8), lambda: None)
    reader.release()
    assert {parameter.device.type for parameter in model.model.layers.parameters()} == {"meta"}
    found = torch.cat([reader.logits(0), reader.logits(1)])
    assert torch.allclose(found, expected, atol=1e-5)


def test_exact_deltas_cost_nothing_and_small_ones_something(tmp_path: Path, cli: Cli) -> None:
    deltas = [tmp_path / f"{name}.deltafmt" for name in ("exact", "2-2", "1-16")]
    for out, options in zip(deltas, (("--method", "exact"), ("--nm", "2:2"), ("--nm", "1:16")), strict=True):
        assert cli("pack", NANO / "base", NANO / "math", "-o", out, *options).code == 0
    report = tmp_path / "report.html"
    options = ("--text", NANO / "eval.jsonl", "--tokenizer", TOKENIZER, "--tokens", 300, "--new-tokens", 4)
    arguments = ("evaluate", NANO / "base", NANO / "math", *deltas, *options)
    result = cli(*arguments, "--continuations", 2, "--html", report, "--json")
    assert result.code == 0, result.err
    found = result.json()
    base, _, exact, close, far = found["models"]
    assert (exact["divergence"], exact["agreement"], exact["lost"], exact["same_continuations"]) == (0, 1, 0, 2)
    assert exact["divergence_quantiles"]["0.99"] == 0
    assert close["agreement"] > 0.99
    assert close["divergence"] < 0.01
    assert base["divergence"] > 1
    assert far["divergence"] > 1
    assert far["bytes"] == deltas[2].stat().st_size
    assert found["report"] == str(report)
    _read_page(report.read_text("utf-8"), charts=3)


def _read_page(text: str, charts: int) -> None:
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert tags.count("svg") == charts
    assert "script" not in tags
    assert "http" not in text.replace("http://www.w3.org", "")


def test_the_command_prints_a_table(tmp_path: Path, cli: Cli) -> None:
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(NANO / "base", NANO / "math", delta, method=DeltaDQ(2, 2, 4))
    options = ("--text", NANO / "eval.jsonl", "--tokenizer", TOKENIZER, "--tokens", 400, "--continuations", 0)
    result = cli("evaluate", NANO / "base", NANO / "math", delta, *options)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["base", "fine-tune", "delta"]
    assert "continuation" not in result.out
    assert str(delta) in lines[4]


def test_a_base_that_lacks_tokens_is_left_out(words: Path, tmp_path: Path) -> None:
    """A fine-tune with added tokens: its text may need them."""
    home = tmp_path / "models"
    new_model("llama", vocab_size=90).save_pretrained(home / "base")
    new_model("llama").save_pretrained(home / "one")
    deltafmt.pack(home / "base", home / "one", home / "d.deltafmt", method=DeltaDQ(4, 16, 4))
    options: Any = {"tokenizer": words, "device": "cpu", "continuations": 0}
    text = text_of(tmp_path)
    found = deltafmt.evaluate(home / "base", home / "one", [home / "d.deltafmt"], text, **options)
    assert found.left_out == {str(home / "base"): "it has 90 tokens, and text or continuations have token 95"}
    assert found.base is None
    assert len(found.deltas) == 1
    assert "Left out" in page.render(found)
    # Without such tokens the base reads the text, and its distribution is over fewer tokens.
    text.write_text(json.dumps({"text": " ".join(f"w{i}" for i in range(2, 60))}), "utf-8")
    found = deltafmt.evaluate(home / "base", home / "one", [home / "d.deltafmt"], text, **options)
    assert found.base is not None
    assert found.base.divergence is None
    assert found.to_obj()["models"][0]["divergence_quantiles"] is None
    assert "-" in tables.table(found).rows[1]
    _read_page(page.render(found), charts=1)


def _refuse(tiny: Tiny, words: Path, tmp_path: Path, **changes: Any) -> tuple[type[Exception], str]:
    options: dict[str, Any] = {"text": text_of(tmp_path), "tokenizer": words, "device": "cpu", "continuations": 0}
    options |= {"base": tiny.base, "finetuned": tiny.base.parent / "one", "deltas": [tiny.deltas["one"]], **changes}
    positional = [options.pop(name) for name in ("base", "finetuned", "deltas", "text")]
    with pytest.raises(deltafmt.errors.DeltafmtError) as caught:
        deltafmt.evaluate(*positional, **options)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1}, "1 tokens to read: the least is 2"),
        ({"length": 1}, "1 tokens of a sequence: the least is 2"),
        ({"continuations": -1}, "-1 continuations: the least is 0"),
        ({"new_tokens": 0}, "0 new tokens: the least is 1"),
        ({"device": "tpu"}, "evaluation device 'tpu' is not cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "evaluation device 'cuda:99': torch finds"),
    ],
)
def test_wrong_options(tiny: Tiny, words: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    kind, found = _refuse(tiny, words, tmp_path, **changes)
    assert kind is UsageError
    assert found.startswith(message)


def test_wrong_inputs(tiny: Tiny, words: Path, tmp_path: Path) -> None:
    home = tiny.base.parent
    short = tmp_path / "short.txt"
    short.write_text("w2 w3 w4 w5", "utf-8")
    assert "gives 4 tokens to predict, and at least 32 are needed" in _refuse(tiny, words, tmp_path, text=short)[1]
    short.write_text(" ".join(["w2"] * 35), "utf-8")
    message = _refuse(tiny, words, tmp_path, text=short, continuations=1, length=20)[1]
    assert "nothing that a continuation can begin with" in message
    other = tmp_path / "other"
    new_model("llama", 7).save_pretrained(other)
    kind, message = _refuse(tiny, words, tmp_path, base=other)
    assert kind is deltafmt.errors.WrongBaseError
    assert str(tiny.deltas["one"]) in message
    # The tokenizer of another model has more tokens.
    assert "tokens; use the model's own tokenizer" in _refuse(tiny, TOKENIZER, tmp_path, text=NANO / "eval.jsonl")[1]
    # A fine-tune that has a tokenizer of its own.
    tuned = tmp_path / "tuned"
    shutil.copytree(home / "one", tuned)
    changed = json.loads(words.read_text("utf-8"))
    vocabulary = changed["model"]["vocab"]
    vocabulary["w2"], vocabulary["w3"] = vocabulary["w3"], vocabulary["w2"]
    (tuned / "tokenizer.json").write_text(json.dumps(changed), "utf-8")
    (tuned / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    kind, message = _refuse(tiny, words, tmp_path, finetuned=tuned)
    assert kind is UsageError
    assert f"{tuned} has another tokenizer than {words}" in message
    assert _refuse(tiny, words, tmp_path, finetuned=home / "nowhere")[1].startswith("no such folder")
    assert _refuse(tiny, tmp_path / "nowhere.json", tmp_path)[0] is UsageError


def test_models_that_are_not_finite(tiny: Tiny, words: Path, tmp_path: Path) -> None:
    for place, where in ((-1, 'leave "model.layers.1"'), (None, "predictions")):
        model = tiny.load(tiny.base.parent / "one")
        with torch.no_grad():
            (model.lm_head.weight if place is None else model.model.layers[place].mlp.up_proj.weight)[5] = torch.nan
        model.save_pretrained(tmp_path / "nan")
        kind, message = _refuse(tiny, words, tmp_path, finetuned=tmp_path / "nan")
        assert kind is NonFiniteError
        assert where in message
        assert message.startswith(str(tmp_path / "nan"))


@pytest.mark.parametrize("kind", ["bert", "bert-mlm", "t5"])
def test_only_causal_models_are_evaluated(kind: str) -> None:
    model = new_model(kind)
    with pytest.raises(UsageError, match="evaluate needs a causal language model") as caught:
        readers.reader_of(model, "m", torch.device("cpu"), np.arange(2, 12)[None])
    assert KINDS[kind][0] in str(caught.value)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = transformers.BertConfig(**{**KINDS["bert"][1], "is_decoder": False})
    model = transformers.BertLMHeadModel(config).eval()
    shake(model, 0, 0.2)
    with pytest.raises(UsageError, match="sees later tokens"):
        readers.reader_of(model, "m", torch.device("cpu"), np.arange(2, 12)[None])


# Parts


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8),
    length=st.integers(2, 20),
)
@settings(max_examples=50, deadline=None)
def test_every_token_counts_once_or_has_a_reason(lengths: list[tuple[int, int]], length: int) -> None:
    documents, expected = [], 0
    for asked, answered in lengths:
        pieces = (" ".join(["w5"] * asked), " ".join(["w7"] * answered))
        documents.append(Document(pieces, ended=True))
        # The answer's tokens but those that begin a sequence; the prompt has a token in front.
        expected += sum(1 for place in range(1 + asked, 1 + asked + answered) if place % length)
    found = spans(documents, encoder(), length, 10**9)
    assert sum(span.counted for span in found) == expected
    assert all((span.tokens[span.first : span.stop] == 7).all() for span in found)
    assert all(1 <= span.first < span.stop == span.tokens.size <= length for span in found)


def test_prompts_are_spread_over_the_text() -> None:
    texts = [Span(np.full(PROMPT + i, i), 1, PROMPT + i) for i in range(10)]
    found = prompts(texts, 3, 10**6)
    assert [int(prompt[0]) for prompt in found] == [1, 4, 7], "the first text ends with its prompt"
    assert {prompt.size for prompt in found} == {PROMPT}
    assert prompts(texts, 3, PROMPT - 1) == []
    asked = [Span(np.arange(9), 4, 9, asked=4)]
    assert [prompt.tolist() for prompt in prompts(asked, 5, 4)] == [[0, 1, 2, 3]]


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        tokens = rng.integers(5, 50, 40)
        mine = [-(0.3 + 0.2 * rng.standard_normal() + rng.standard_normal(count)) for count in tokens]
        found.append(lost_of([np.zeros(count) for count in tokens], mine))
    means, errors = zip(*found, strict=True)
    assert np.mean(means) == pytest.approx(0.3, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert lost_of([np.zeros(3)], [np.ones(3)]) == (-1, None)


def test_followed() -> None:
    assert followed(np.array([True, True, False, True])) == 2
    assert followed(np.array([True, True])) == 2
    assert followed(np.array([False])) == 0


def test_json_has_no_infinity() -> None:
    model = ModelFigures("m", "delta", 10, -np.inf, np.inf, None, 0.5, np.inf, (0.0,) * 5 + (np.inf,), ())
    found = Evaluation("t", 1, 1, 1, (), (), 100, [model])
    json.dumps(found.to_obj(), allow_nan=False)
