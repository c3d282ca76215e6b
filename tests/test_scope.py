"""Every call of a model gets the delta that its caller meant, or fails: ``delta=``, blocks and generators."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.errors import UsageError
from deltafmt.transformers import attach, detach
from served import OUTSIDE, Served
from tiny_models import generate, ids, logits, made_once

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(made_once(request, tmp_path_factory))


@pytest.mark.parametrize("name", ["one", None, "base"])
def test_a_call_names_its_delta(served: Served, name: str | None) -> None:
    want = None if name == "base" else name
    assert served.run(delta=name) == want
    with served.model.delta("two"):
        assert served.run(delta=name) == want
        assert served.run() == "two"
    output = served.model(input_ids=served.tokens, delta="one")
    assert not output.logits.requires_grad
    with pytest.raises(UsageError, match=r'^there is no delta "three"; known: one, two$'):
        served.run(delta="three")
    served.check_clean()


def test_a_call_names_a_delta_for_each_row(served: Served) -> None:
    tokens = served.tokens.repeat(3, 1)
    found = logits(served.model, tokens, delta=["one", None, "two"])
    for row, name in enumerate(("one", None, "two")):
        assert torch.allclose(found[row : row + 1], served.want[name], atol=1e-4)
    served.check_clean()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_names_its_deltas(served: Served, options: dict[str, Any]) -> None:
    model, tokens = served.model, ids(3, 5)
    names = ["one", None, "two"]
    alone = [generate(model, tokens[row : row + 1], delta=name, **options) for row, name in enumerate(names)]
    assert torch.equal(generate(model, tokens, delta=names, **options), torch.cat(alone))
    with model.delta(names):
        assert torch.equal(generate(model, tokens, **options), torch.cat(alone))
    served.check_clean()


def test_two_names_for_four_rows(served: Served) -> None:
    """Rows of independent prompts are never shared out among fewer names, in a call, in generate or in a part."""
    tokens = ids(4, 5)
    refused = r"is given 4 rows and 2 names of deltas; give a name for each row, or one name for all rows$"
    for call in (
        lambda: logits(served.model, tokens),
        lambda: generate(served.model, tokens),
        lambda: generate(served.model, tokens, num_beams=2),
        lambda: served.model.model(input_ids=tokens),
    ):
        with served.model.delta(["one", "two"]), pytest.raises(UsageError, match=refused):
            call()
    with pytest.raises(UsageError, match=r"is given 4 rows and 1 names"):
        logits(served.model, tokens, delta=["one"])
    served.check_clean()


def test_a_pipeline_takes_delta(served: Served) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    pipe = transformers.pipeline("text-generation", model=served.model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    texts = ["w5 w6 w7", "w9 w8 w2", "w11 w12 w13"]
    alone = {name: pipe(texts, **options, delta=name) for name in ("one", None, "two")}
    assert alone["one"] != alone[None]
    names = ["two", None, "one"]
    found = pipe(texts, batch_size=3, **options, delta=names)
    assert found == [alone[name][row] for row, name in enumerate(names)]
    with pytest.raises(UsageError, match=r"is given 1 rows and 3 names"):
        pipe(texts, **options, delta=names)
    served.check_clean()


def test_a_part_of_the_model_does_not_swallow_delta(served: Served) -> None:
    with pytest.raises(UsageError, match=r"^LlamaModel is a part of LlamaForCausalLM, which takes delta="):
        served.model.model(input_ids=served.tokens, delta="one")
    served.check_clean()


def test_generators_do_not_see_each_other(served: Served) -> None:
    for first, second in (("one", "two"), ("two", None), (None, "one")):
        a, b = served.stream(first), served.stream(second)
        assert list(zip(a, b, strict=True)) == [(first, second)] * 3
    served.check_clean()


def test_generators_that_are_closed_in_any_order(served: Served) -> None:
    a, b, c = (served.stream(name) for name in ("one", "two", "one"))
    assert [next(one) for one in (a, b, c, a, b)] == ["one", "two", "one", "one", "two"]
    assert served.run() is None
    a.close()
    assert next(b) == "two"
    assert served.run() is None
    c.close()
    b.close()
    assert list(a) == []
    served.check_clean()


def test_a_generator_that_is_dropped(served: Served) -> None:
    stream = served.stream("one")
    next(stream)
    del stream
    gc.collect()
    served.check_clean()


def test_generators_and_blocks_nest(served: Served) -> None:
    stream = served.stream("one")
    assert next(stream) == "one"
    with served.model.delta("two"):
        assert served.run() == "two"
        assert next(stream) == "one"
        assert served.run() == "two"

        def within() -> Iterator[str | None]:
            yield served.run()
            with contextlib.ExitStack() as stack:
                stack.enter_context(served.model.delta(None))
                yield served.run()
                yield served.run()

        inner = within()
        assert next(inner) == "two"
        assert next(inner) is None
        assert served.run() == "two"
        assert next(inner) is None
        inner.close()
        assert served.run() == "two"
    stream.close()
    served.check_clean()


def test_a_context_manager_holds_for_its_body(served: Served) -> None:
    @contextlib.contextmanager
    def serving(name: str) -> Iterator[None]:
        with served.model.delta(name):
            yield

    with serving("one"):
        assert served.run() == "one"
        with serving("two"), contextlib.ExitStack() as stack:
            assert served.run() == "two"
            stack.enter_context(serving("one"))
            assert served.run() == "one"
        assert served.run() == "one"

    def stream() -> Iterator[str | None]:
        with serving("one"):
            yield served.run()
            yield served.run()

    a = stream()
    assert next(a) == "one"
    assert served.run() is None
    assert list(a) == ["one"]
    served.check_clean()


def test_a_generator_whose_consumer_is_gone(served: Served) -> None:
    """Like a fixture that yields inside a block: whether its block is meant for the caller cannot be told."""

    def drive(stream: Iterator[Any]) -> Any:
        return next(stream)

    stream = served.stream("one")
    drive(stream)
    with pytest.raises(UsageError, match=OUTSIDE.format("a paused generator")):
        served.run()
    assert served.run(delta=None) is None
    assert next(stream) == "one"
    stream.close()
    served.check_clean()


def test_a_block_is_entered_once_and_not_forgotten(served: Served) -> None:
    block = served.model.delta("one")
    with block:
        assert served.run() == "one"
    with pytest.raises(
        UsageError, match=r"^a block of deltas is left once, after it was entered; ask model\.delta for"
    ):
        block.__exit__(None, None, None)
    with pytest.raises(UsageError, match=r"^a block of deltas is entered once"), block:
        pass
    with pytest.warns(RuntimeWarning, match=r"^model.delta\(...\) was not entered, and serves nothing"):
        served.model.delta("one")

    @served.model.delta("two")
    def function() -> Any:
        return served.run()

    assert [function(), function(), served.run()] == ["two", "two", None]
    served.check_clean()


def test_an_error_or_interrupt_leaves_nothing(served: Served) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = served.model.model.layers[1].register_forward_pre_hook(stop)
    for call in (lambda: served.run(delta="one"), lambda: generate(served.model, served.tokens, delta="one")):
        with pytest.raises(KeyboardInterrupt):
            call()
    with pytest.raises(KeyboardInterrupt), served.model.delta("two"):
        served.run()
    handle.remove()
    served.check_clean()


def test_gradients_in_and_around_blocks(served: Served) -> None:
    stream = served.stream("one")
    next(stream)
    assert torch.is_grad_enabled()
    assert served.model(input_ids=served.tokens, delta=None).logits.requires_grad is False
    stream.close()
    assert served.model(input_ids=served.tokens).logits.requires_grad
    with torch.inference_mode(), served.model.delta("one"):
        assert torch.allclose(served.model(input_ids=served.tokens).logits, served.want["one"])
    served.check_clean()


def test_a_model_without_transformers(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    import deltafmt

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x: Any) -> Any:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    base, tuned = Net(), Net()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", exclude=["*"])
    x = torch.randn(2, 8)
    want = {"d": tuned(x), None: base(x)}
    keys = set(base.__dict__)
    model = attach(base, {"d": tmp_path / "d"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
            with mode():
                assert torch.allclose(model(x, delta="d"), want["d"])
                found = model(x, delta=["d", None])
                assert torch.allclose(found, torch.stack([want["d"][0], want[None][1]]))
    detach(model)
    assert set(model.__dict__) == keys
    assert torch.equal(model(x), want[None])
