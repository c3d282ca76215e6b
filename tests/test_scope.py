"""Every call of a model gets the delta that its caller meant, or fails: threads, tasks, generators, ``delta=``."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.errors import UsageError
from deltafmt.transformers import attach, detach
from tiny_models import Tiny, generate, ids, logits, made_once

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

OUTSIDE = r"^the model is called outside of any block while {} serves \"one\"; name the delta in the call: model\("
ENDED = r"^the block of deltas that this thread or task was started in has ended; keep the block open until"


class Served:
    """A model with two deltas, and what each of them gives."""

    def __init__(self, tiny: Tiny) -> None:
        self.tokens = ids(1, 5)
        self.model = attach(tiny.load(), tiny.deltas)
        self.want = {None: logits(self.model, self.tokens)}
        for name in tiny.deltas:
            self.want[name] = logits(self.model, self.tokens, delta=name)
        assert not any(torch.equal(self.want[None], self.want[name]) for name in tiny.deltas)

    def run(self, **options: Any) -> str | None:
        """Return the name of the delta that a call serves."""
        found = logits(self.model, self.tokens, **options)
        return next(name for name, want in self.want.items() if torch.equal(found, want))

    def stream(self, name: str | None, steps: int = 3) -> Iterator[str | None]:
        """Serve one delta step by step."""
        with self.model.delta(name):
            for _ in range(steps):
                yield self.run()

    def check_clean(self) -> None:
        """Check that nothing is left behind."""
        assert torch.is_grad_enabled()
        assert self.run() is None
        assert self.model.deltas._open == 0
        detach(self.model)


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


def test_a_thread_started_in_a_block_follows_it(served: Served) -> None:
    found: list[Any] = []

    class Custom(threading.Thread):
        def run(self) -> None:
            found.append(served.run())

    with served.model.delta("one"):
        nested = threading.Thread(target=lambda: started(threading.Thread(target=lambda: found.append(served.run()))))
        for thread in (threading.Thread(target=lambda: found.append(served.run())), Custom(), nested):
            started(thread)
        with served.model.delta(None):
            started(Custom())
        assert served.run() == "one"
    assert found == ["one", "one", "one", None]
    started(Custom())
    assert found[-1] is None
    served.check_clean()


def started(thread: threading.Thread) -> None:
    thread.start()
    thread.join()


def test_the_streaming_recipe(served: Served) -> None:
    """``generate`` in a thread with a streamer, for three clients at once."""
    import queue

    class Streamer:
        def __init__(self) -> None:
            self.tokens: queue.Queue[Any] = queue.Queue()

        def put(self, value: Any) -> None:
            self.tokens.put(value)

        def end(self) -> None:
            self.tokens.put(None)

    tokens = ids(1, 5)
    names = ("one", None, "two")
    want = {name: generate(served.model, tokens, delta=name)[0, 5:].tolist() for name in names}
    found = {}

    def client(name: str | None) -> None:
        streamer = Streamer()
        with served.model.delta(name):
            thread = threading.Thread(target=generate, args=(served.model, tokens), kwargs={"streamer": streamer})
            thread.start()
            parts = list(iter(streamer.tokens.get, None))
            thread.join()
        found[name] = torch.cat(parts[1:]).tolist()

    clients = [threading.Thread(target=client, args=(name,)) for name in names]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert found == want
    served.check_clean()


@pytest.mark.parametrize("call", ["block", "named"])
def test_work_submitted_in_a_block_follows_it(served: Served, call: str) -> None:
    """Workers are shared: each piece of work has the block in which it was submitted, whoever started the worker."""
    with ThreadPoolExecutor(1) as pool:
        with served.model.delta("one"):
            assert pool.submit(served.run).result() == "one"
            with served.model.delta("two"):
                assert pool.submit(served.run).result() == "two"
            assert list(pool.map(served.run)) == []
            assert pool.submit(served.run, delta=None).result() is None
        assert pool.submit(served.run).result() is None
        if call == "named":
            assert pool.submit(served.run, delta="two").result() == "two"
    served.check_clean()


@pytest.mark.parametrize("kind", ["executor", "pool"])
def test_a_pool_that_is_made_in_a_block_serves_each_its_own(served: Served, kind: str) -> None:
    with served.model.delta("one"):
        pool = ThreadPoolExecutor(1) if kind == "executor" else ThreadPool(1)
        submit = pool.submit if kind == "executor" else pool.apply_async
        result = "result" if kind == "executor" else "get"
        with pool:
            assert getattr(submit(served.run), result)() == "one"
            with served.model.delta("two"):
                assert getattr(submit(served.run), result)() == "two"
                assert list(pool.map(lambda _: served.run(), range(3))) == ["two"] * 3
                if kind == "pool":
                    assert list(pool.imap(lambda _: served.run(), range(3))) == ["two"] * 3
            assert getattr(submit(served.run), result)() == "one"
            unaware = contextvars.Context().run(submit, lambda: served.run(delta=None))
            assert getattr(unaware, result)() is None
            refused = contextvars.Context().run(submit, served.run)
            with pytest.raises(UsageError, match=OUTSIDE.format("another thread or task")):
                getattr(refused, result)()
    served.check_clean()


def test_a_stream_of_a_thread_in_a_generator(served: Served) -> None:
    def stream(name: str) -> Iterator[Any]:
        with served.model.delta(name):
            found: list[Any] = []
            for _ in range(3):
                started(threading.Thread(target=lambda: found.append(served.run())))
                yield found[-1]

    assert list(zip(stream("one"), stream("two"), strict=True)) == [("one", "two")] * 3
    served.check_clean()


def test_many_threads_share_a_block(served: Served) -> None:
    with served.model.delta("one"), ThreadPoolExecutor(4) as pool:
        found = [pool.submit(served.run) for _ in range(24)]
        assert {one.result() for one in found} == {"one"}
    served.check_clean()


def test_a_thread_that_outlives_its_block_fails(served: Served) -> None:
    go, errors = threading.Event(), []

    def late() -> None:
        go.wait(20)
        for options in ({}, {"delta": "two"}):
            try:
                errors.append(served.run(**options))
            except UsageError as error:
                errors.append(error)

    thread = threading.Thread(target=late)
    with served.model.delta("one"):
        thread.start()
    go.set()
    thread.join()
    assert errors[1] == "two"
    with pytest.raises(UsageError, match=ENDED):
        raise errors[0]
    served.model.deltas.remove("one")
    served.check_clean()


def test_a_call_that_has_begun_keeps_its_delta(served: Served) -> None:
    """The block ends while a thread is within a call: the call ends as it began, and then the delta can be removed."""
    inside, go, found = threading.Event(), threading.Event(), []

    def pause(*_: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            go.wait(20)

    handle = served.model.model.layers[0].register_forward_pre_hook(pause)
    thread = threading.Thread(target=lambda: found.append(served.run()))
    with served.model.delta("one"):
        thread.start()
        assert inside.wait(20)
    with pytest.raises(UsageError, match=r'^delta "one" is in use$'):
        served.model.deltas.remove("one")
    go.set()
    thread.join()
    handle.remove()
    assert found == ["one"]
    served.model.deltas.remove("one")
    served.check_clean()


def test_a_call_of_another_thread_must_say_what_it_means(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool, served.model.delta("one"):
        block = served.model.delta

        def elsewhere(options: dict[str, Any], names: Any = "none") -> Any:
            with contextlib.nullcontext() if names == "none" else block(names):
                return served.run(**options)

        plain = threading.Event()
        results: list[Any] = []

        def stranger() -> None:
            plain.wait(20)
            for options, names in (({}, "none"), ({"delta": None}, "none"), ({}, None), ({}, "two")):
                try:
                    results.append(elsewhere(options, names))
                except UsageError as error:
                    results.append(str(error))

        # Started by a thread that has no block.
        pool.submit(lambda: None).result()
        thread = contextvars.Context().run(lambda: threading.Thread(target=stranger))
        contextvars.Context().run(thread.start)
        plain.set()
        thread.join()
        with pytest.raises(UsageError, match=OUTSIDE.format("another thread or task")):
            raise UsageError(results[0])
        assert results[1:] == [None, None, "two"]
    served.check_clean()


def test_others_that_serve_the_base_do_not_matter(served: Served) -> None:
    with served.model.delta(None):
        assert contextvars.Context().run(served.run) is None
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


def test_a_generator_that_moves_between_threads(served: Served) -> None:
    """Web servers run each step of a stream in another thread, and another context."""
    stream, other = served.stream("one", 4), served.stream("two", 4)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for each, name in ((stream, "one"), (other, "two")):
                assert pool.submit(contextvars.copy_context().run, next, each).result() == name
        assert pool.submit(next, stream, "end").result() == "end"
        assert pool.submit(next, other, "end").result() == "end"
    served.check_clean()


def test_tasks(served: Served) -> None:
    async def client(name: str | None) -> list[Any]:
        found = []
        with served.model.delta(name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(served.run())
                found.append(await asyncio.to_thread(served.run))
                found.append(await asyncio.get_running_loop().run_in_executor(None, served.run))
                found.append(await asyncio.create_task(later()))
        return found

    async def later() -> Any:
        await asyncio.sleep(0)
        return served.run()

    async def stream(name: str | None) -> Any:
        with served.model.delta(name):
            for _ in range(3):
                yield served.run()
                yield await asyncio.to_thread(served.run)

    async def consume(name: str | None) -> list[Any]:
        found = []
        async for one in stream(name):
            found.append(one)
            await asyncio.sleep(0)
            found.append(served.run(delta=None))
        return found

    async def main() -> None:
        names = ("one", None, "two")
        for name, found in zip(names, await asyncio.gather(*map(client, names)), strict=True):
            assert found == [name] * 12
        for name, found in zip(names, await asyncio.gather(*map(consume, names)), strict=True):
            assert found == [name, None] * 6
        with served.model.delta("one"):
            task = asyncio.create_task(later())
        with pytest.raises(UsageError, match=ENDED):
            await task

    asyncio.run(main())
    served.check_clean()


def test_a_block_is_entered_once_and_not_forgotten(served: Served) -> None:
    block = served.model.delta("one")
    with block:
        assert served.run() == "one"
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
