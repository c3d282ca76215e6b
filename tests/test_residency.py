"""Residency of deltas: the budget holds, what is in use stays, errors say what is wrong, no thread waits for ever."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

pytest.importorskip("torch")

from deltafmt.errors import NoRoomError, StorageError, UsageError
from deltafmt.runtime.eviction import host_bytes
from deltafmt.runtime.residency import Residency


@dataclass(eq=False)
class Value:
    """A value on the device."""

    name: str
    nbytes: int
    alive: bool = True


@dataclass(frozen=True)
class Copied:
    """A value in host memory."""

    name: str
    nbytes: int


@dataclass(eq=False)
class Fake:
    """A store without files: values of 10 bytes a letter of the name; counts what it does."""

    log: list[str] = field(default_factory=list)
    live: dict[str, Value] = field(default_factory=dict)
    most: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    failing: dict[str, Exception] = field(default_factory=dict)
    fences: Callable[[], Fence | None] = lambda: None
    larger: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def nbytes(self, name: str) -> int:
        """Return what the name says."""
        return 10 * len(name)

    def _arrive(self, name: str) -> Value:
        assert name not in self.live
        self.live[name] = value = Value(name, self.nbytes(name) + self.larger)
        self.most = max(self.most, sum(value.nbytes for value in self.live.values()))
        return value

    def load(self, name: str, cancel: threading.Event) -> Value:
        """Load when the gate is open."""
        while not self.gate.wait(0.01):
            if cancel.is_set():
                raise StorageError("cancelled")
        self.log.append(f"load {name}")
        if name in self.failing:
            raise self.failing[name]
        return self._arrive(name)

    def to_host(self, name: str, value: Value) -> Copied:
        """Copy."""
        assert value.alive
        self.log.append(f"keep {name}")
        return Copied(name, value.nbytes)

    def to_device(self, name: str, host: Copied) -> Value:
        """Copy back."""
        assert host.name == name
        self.log.append(f"back {name}")
        return self._arrive(name)

    def evicted(self, name: str) -> None:
        """Note who leaves."""
        self.log.append(f"drop {name}")
        self.live.pop(name).alive = False

    def fence(self) -> Fence | None:
        """Return a fence."""
        return self.fences()


@dataclass(eq=False)
class Fence:
    """A fence that says when it was waited for."""

    log: list[str]
    done: bool = False

    def query(self) -> bool:
        """Tell whether it has passed."""
        return self.done

    def synchronize(self) -> None:
        """Pass."""
        self.log.append("waited")
        self.done = True


def make(names: str, budget: int | None = None, host_budget: int = 0, **options: object) -> tuple[Residency, Fake]:
    fake = Fake(**options)
    residency = Residency(fake, budget, host_budget)
    for name in names.split():
        residency.add(name)
    return residency, fake


def use(residency: Residency, *names: str) -> None:
    with residency.acquire(names) as lease:
        assert all(value.alive for value in lease.values.values())
        assert list(lease.values) == list(dict.fromkeys(names))


def test_the_least_recently_used_leaves() -> None:
    residency, fake = make("a b c d", budget=30)
    for name in "abcab":
        use(residency, name)
    assert fake.log == ["load a", "load b", "load c"]
    use(residency, "d")
    assert fake.log[3:] == ["drop c", "load d"]
    assert residency.resident() == ["a", "b", "d"]
    assert residency.used == 30
    residency.close()
    assert not fake.live
    assert fake.most == 30


def test_several_leave_for_a_large_one() -> None:
    residency, fake = make("a b c dd", budget=30)
    use(residency, "a", "b", "c", "a")
    use(residency, "dd")
    assert fake.log[3:] == ["drop b", "drop a", "load dd"] or fake.log[3:] == ["drop a", "drop b", "load dd"]
    assert fake.most == 30
    residency.close()


def test_what_is_in_use_stays() -> None:
    residency, fake = make("a b c", budget=20)
    first = residency.acquire(["a"])
    use(residency, "b")
    use(residency, "c")
    assert fake.log[2:] == ["drop b", "load c"]
    with residency.acquire(["c"]):
        with pytest.raises(NoRoomError, match=r'^no room for "b": "a", "c" in use hold 20 bytes of 20$'):
            residency.acquire(["b"])
        assert not residency.prefetch("b")
    first.release()
    first.release()
    use(residency, "b")
    assert "drop a" in fake.log
    residency.close()


def test_a_copy_in_host_memory() -> None:
    residency, fake = make("a b c d", budget=10, host_budget=20)
    for name in "abc":
        use(residency, name)
    assert fake.log == ["load a", "keep a", "drop a", "load b", "keep b", "drop b", "load c"]
    fake.log.clear()
    use(residency, "a")
    assert fake.log == ["keep c", "drop c", "back a"]  # the copy of b, least recently used, gave way to that of c
    use(residency, "c")
    assert fake.log[3:] == ["drop a", "back c"]
    use(residency, "b")
    assert fake.log[5:] == ["drop c", "load b"]
    assert host_bytes(residency._items) == 20
    residency.remove("a")
    assert host_bytes(residency._items) == 10
    residency.close()


def test_prefetch_returns_at_once() -> None:
    residency, fake = make("a b", budget=20)
    fake.gate.clear()
    assert residency.prefetch("a")
    assert residency.prefetch("a")
    assert residency.resident() == []
    assert residency.used == 10
    fake.gate.set()
    use(residency, "a")
    assert fake.log == ["load a"]
    residency.close()


def test_computing_goes_on_while_another_loads() -> None:
    residency, fake = make("a b", budget=20)
    use(residency, "a")
    fake.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(use, residency, "b")
        for _ in range(50):
            use(residency, "a")
        assert not waiting.done()
        fake.gate.set()
        waiting.result(10)
    residency.close()


def test_a_prefetch_gives_way() -> None:
    """What is being loaded ahead, and is used by nobody, makes room as soon as it has arrived."""
    residency, fake = make("a b", budget=10)
    fake.gate.clear()
    residency.prefetch("a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(use, residency, "b")
        time.sleep(0.05)
        assert not waiting.done()
        fake.gate.set()
        waiting.result(10)
    assert fake.log == ["load a", "drop a", "load b"]
    residency.close()


def test_waiting_for_room() -> None:
    residency, _ = make("a b", budget=10)
    lease = residency.acquire(["a"])
    with pytest.raises(NoRoomError):
        residency.acquire(["b"], wait=0.05)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(residency.acquire, ["b"], 10)
        time.sleep(0.05)
        assert not waiting.done()
        lease.release()
        waiting.result(10).release()
    residency.close()


def test_memory_is_freed_behind_the_kernels_that_read_it() -> None:
    log: list[str] = []
    residency, fake = make("a b", budget=10, log=log, fences=lambda: Fence(log))
    use(residency, "a")
    use(residency, "a")
    assert log == ["load a"]
    use(residency, "b")
    assert log == ["load a", "waited", "waited", "drop a", "load b"]
    residency.close()
    assert log[5:] == ["waited", "drop b"]
    assert fake.most == 10


def test_fences_that_have_passed_are_forgotten() -> None:
    log: list[str] = []
    residency, _ = make("a", log=log, fences=lambda: Fence(log, done=True))
    for _ in range(5):
        use(residency, "a")
    residency.close()
    assert log == ["load a", "waited", "drop a"]


def test_errors() -> None:
    residency, fake = make("a bb", budget=25)
    with pytest.raises(UsageError, match=r'^there is no delta "x"; known: a, bb$'):
        residency.acquire(["a", "x"])
    for call in (residency.prefetch, residency.remove):
        with pytest.raises(UsageError, match=r'^there is no delta "x"; known: a, bb$'):
            call("x")
    with pytest.raises(UsageError, match=r'^there is a delta "a" already$'):
        residency.add("a")
    with pytest.raises(UsageError, match=r'^delta "ccc" takes 30 bytes where the budget is 25$'):
        residency.add("ccc")
    with pytest.raises(UsageError, match=r'^"a", "bb" take 30 bytes together where the budget is 25$'):
        residency.acquire(["a", "bb"])
    with pytest.raises(UsageError, match=r"^budget 0 is not a positive number of bytes$"):
        Residency(fake, 0)
    with pytest.raises(UsageError, match=r"^host budget -1 is negative$"):
        Residency(fake, 1, -1)
    with residency.acquire(["a"]):
        with pytest.raises(UsageError, match=r'^delta "a" is in use$'):
            residency.remove("a")
        with pytest.raises(UsageError, match=r'^delta "a" is in use$'):
            residency.close()
    residency.close()
    residency.close()
    for call in (residency.acquire, residency.prefetch, residency.add, residency.remove):
        with pytest.raises(UsageError, match=r"^the deltas are closed$"):
            call("a")
    assert fake.log == ["load a", "drop a"]


def test_a_load_that_fails_is_tried_again() -> None:
    residency, fake = make("a b", budget=20)
    fake.failing["a"] = StorageError("a is missing")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"^a is missing$"):
            residency.acquire(["b", "a"])
    assert residency.used == 10
    fake.failing.clear()
    use(residency, "a", "b")
    assert fake.log == ["load b", "load a", "load a", "load a"]
    residency.close()


def test_closing_abandons_loads() -> None:
    residency, fake = make("a b")
    fake.gate.clear()
    residency.prefetch("b")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(residency.acquire, ["a"])
        time.sleep(0.05)
        residency.close()
        with pytest.raises(UsageError, match=r"^the deltas are closed$"):
            waiting.result(10)
    assert not fake.live


def test_a_value_larger_than_was_said() -> None:
    """The books follow what arrived; the next load makes the room."""
    residency, fake = make("a b c", budget=30, larger=3)
    use(residency, "a", "b")
    assert residency.used == 26
    use(residency, "c")
    assert residency.used == 26
    assert "drop a" in fake.log
    residency.close()


def test_many_threads() -> None:
    """Random use by many threads: nothing is used after it has left, the budget holds, and all of them finish."""
    names = "a b c dd ee fff gggg"
    residency, fake = make(names, budget=80, host_budget=40)
    known = names.split()

    def work(seed: int) -> int:
        rng = random.Random(seed)
        served = 0
        for _ in range(150):
            wanted = rng.sample(known, rng.randint(1, 3))
            if rng.random() < 0.2:
                residency.prefetch(wanted[0])
                continue
            try:
                with residency.acquire(wanted, wait=rng.choice([0, 0.05, 5])) as lease:
                    values = list(lease.values.values())
                    time.sleep(rng.random() / 5000)
                    assert all(value.alive for value in values)
                    served += 1
            except NoRoomError:
                pass
            except UsageError as error:
                assert "together" in str(error)  # noqa: PT017
        return served

    with ThreadPoolExecutor(8) as pool:
        served = sum(future.result(60) for future in [pool.submit(work, seed) for seed in range(8)])
    assert served > 300
    assert fake.most <= 80
    residency.close()
    assert not fake.live


def test_names_that_come_and_go_while_others_work() -> None:
    residency, fake = make("a b", budget=20)
    stop = threading.Event()

    def work(name: str) -> None:
        while not stop.is_set():
            use(residency, name)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, name) for name in "ab"]
        for turn in range(30):
            residency.add(f"{turn % 10}")
            residency.prefetch(f"{turn % 10}")
            residency.remove(f"{turn % 10}")
        stop.set()
        for job in jobs:
            with contextlib.suppress(NoRoomError):
                job.result(10)
    residency.close()
    assert not fake.live
