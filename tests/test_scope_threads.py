"""Threads, pools and tasks serve the delta of the block that they were started in, or fail."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save_file

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import RTN
from deltafmt.transformers import attach, detach
from served import ENDED, OUTSIDE, Served
from tiny_models import generate, ids, made_once

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(made_once(request, tmp_path_factory))


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


class _Slow(torch.nn.Linear):
    """A linear module whose forward waits in one thread."""

    waits: Any = None

    def forward(self, x: Any) -> Any:
        """Multiply, and wait where the thread is to."""
        found = super().forward(x)
        if self.waits is not None and threading.get_ident() == self.waits[0]:
            self.waits[1].set()
            assert self.waits[2].wait(60)
        return found


class _Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _Slow(32, 32, bias=False), _Slow(32, 32, bias=False), _Slow(32, 32, bias=False)

    def forward(self, x: Any) -> Any:
        """Give two siblings the same input."""
        return self.c(self.a(x) * self.b(x))


def test_a_call_that_began_before_siblings_were_found(tmp_path: Path) -> None:
    """Another thread finds that two modules share their input while a call is inside of one of them."""
    torch.manual_seed(0)
    base = _Pair()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file({key: value + 0.1 for key, value in base.state_dict().items()}, tmp_path / "tuned.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", method=RTN(8))
    model = attach(base, {"d": tmp_path / "d"}, verify_base=False)
    x = torch.randn(2, 32)
    inside, go = threading.Event(), threading.Event()
    found: list[Any] = []

    def serve() -> None:
        model.a.waits = (threading.get_ident(), inside, go)
        found.append(model(x, delta="d"))

    thread = threading.Thread(target=serve)
    thread.start()
    assert inside.wait(60)
    want = [model(x, delta="d") for _ in range(3)]
    go.set()
    thread.join()
    want += [model(x, delta="d") for _ in range(2)]
    assert model.deltas.served._groups
    for one in (*found, *want):
        assert torch.allclose(one, want[0], atol=1e-6)
    assert not torch.allclose(model(x), want[0], atol=1e-2)
    assert not any(site.hooked for site in model.deltas.served.sites() if site.module is not model.c)
    detach(model)
