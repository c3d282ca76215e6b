"""Products whose kernels are not compiled yet: they are right all the same, and launch their kernels later."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt.kernels import background_compile, devices, launching, products
from deltafmt.kernels.background_compile import Loaded
from deltafmt.kernels.nm import dense
from deltafmt.kernels.segments import FixedSegments, Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.kernels.variants import Variant, collecting
from deltafmt.terms.nm.layout import NMLayout
from operands import random_operand
from reference import naive_delta
from term_kinds import CASES

CPU = torch.device("cpu")
SLOTS = [0, 1, -1, 0]


class Fetched:
    """Stands in for the process that compiles: what is asked for comes when it is let go."""

    def __init__(self) -> None:
        self.asked: list[list[Variant]] = []
        self.let_go = threading.Event()

    def fetch(self, variants: list[Variant]) -> None:
        """Note what is asked for, and wait."""
        self.asked.append(variants)
        self.let_go.wait()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Fetched, Loaded]]:
    """A device that was warmed up for something else, whose kernels the interpreter runs."""
    made = Fetched()
    loaded = Loaded(made.fetch)
    monkeypatch.setitem(background_compile._loaded, CPU, loaded)
    monkeypatch.setattr(devices, "usable_on", lambda _: True)
    yield made, loaded
    made.let_go.set()
    loaded.join()


def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list of what products are told: whether their kernels are there."""
    found: list[bool] = []
    original = Loaded.has
    monkeypatch.setattr(Loaded, "has", lambda self, variants: found.append(original(self, variants)) or found[-1])
    return found


@pytest.mark.parametrize("layout", [cases.samples[0] for cases in CASES.values()], ids=lambda layout: layout.kind)
def test_a_product_is_decoded_until_its_kernels_are_there(
    layout: object, fetched: tuple[Fetched, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, loaded = fetched
    rng = np.random.default_rng(0)
    table = OperandTable(2, [40], 64, "cpu")
    operands = [random_operand(rng, layout, 40, 64) for _ in range(2)]
    for slot, operand in enumerate(operands):
        table.put(slot, [[operand]])
    deltas = [naive_delta(operand) for operand in operands]
    x = torch.from_numpy(rng.standard_normal((4, 64)).astype(np.float32))
    said = answers(monkeypatch)

    def check() -> None:
        y = torch.ones(4, 40)
        products.matmul_([y], x, table, Segments.of(SLOTS, 2, "cpu"))
        for token, slot in enumerate(SLOTS):
            wanted = 1 + (x[token] @ deltas[slot].T if slot >= 0 else torch.zeros(40))
            assert (y[token] - wanted).abs().max() <= 1e-4 * wanted.abs().max()

    check()
    assert said
    assert not any(said)
    asked = len(said)
    check()
    assert not any(said[asked:])
    fetch.let_go.set()
    loaded.join()
    variants = [variant for batch in fetch.asked for variant in batch]
    assert len(variants) == len(set(variants))  # nothing is fetched twice
    said.clear()
    check()
    assert said == [True]


def test_what_a_graph_may_hold_is_launched_at_once(fetched: tuple[Fetched, Loaded]) -> None:
    fetch, _ = fetched
    table = OperandTable(2, [40], 64, "cpu")
    operand = random_operand(np.random.default_rng(0), NMLayout(1, 32, 4), 40, 64)
    table.put(1, [[operand]])
    segments = FixedSegments(4, 2, CPU)
    segments.fill([1, -1, 1, 0])
    x, y = torch.randn(4, 64), torch.zeros(4, 40)
    assert launching.launch_products([y], x, table, segments)
    assert not fetch.asked
    wanted = x @ naive_delta(operand).T * torch.tensor([1, 0, 1, 0])[:, None]
    assert (y - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_an_embedding_is_decoded_until_its_kernel_is_there(fetched: tuple[Fetched, Loaded]) -> None:
    fetch, loaded = fetched
    table = OperandTable(1, [40], 64, "cpu")
    operand = random_operand(np.random.default_rng(0), NMLayout(1, 32, 4), 40, 64)
    table.put(0, [[operand]])
    ids = torch.tensor([3, 39, 0])
    wanted = naive_delta(operand)[ids]
    for _ in range(2):
        y = torch.zeros(3, 64)
        products.embedding_(y, ids, table, Segments.of([0] * 3, 1, "cpu"))
        assert (y - wanted).abs().max() <= 1e-6
        fetch.let_go.set()
        loaded.join()
    assert [variant.name for variant in fetch.asked[0]] == [dense.embedding_kernel.__name__]


@pytest.mark.parametrize("tokens", [1, 300])
def test_base_and_delta_are_no_single_product_until_the_kernel_is_there(
    tokens: int, fetched: tuple[Fetched, Loaded]
) -> None:
    fetch, loaded = fetched
    table = OperandTable(1, [64], 64, "cpu")
    operand = random_operand(np.random.default_rng(0), NMLayout(1, 32, 4), 64, 64)
    table.put(0, [[operand]])
    x, weight = torch.randn(tokens, 64), torch.randn(64, 64)
    before = weight.clone()
    assert products.can_fuse(table, 0, tokens)
    assert products.fused_linear(x, [weight], table, 0) is None
    assert torch.equal(weight, before)
    fetch.let_go.set()
    loaded.join()
    (found,) = products.fused_linear(x, [weight], table, 0) or ()
    wanted = x @ (weight + naive_delta(operand)).T
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_device_that_was_not_warmed_up_launches_at_once() -> None:
    assert background_compile.may_launch(torch.device("meta"), lambda: pytest.fail("collected"))


def test_within_a_collection_everything_may_be_launched(fetched: tuple[Fetched, Loaded]) -> None:
    with collecting():
        assert background_compile.may_launch(CPU, lambda: pytest.fail("collected twice"))
    assert not fetched[0].asked


def test_what_cannot_be_fetched_is_left_to_the_launch(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: list[Variant]) -> None:
        raise RuntimeError("no compiler")

    loaded = Loaded(fail)
    variant = Variant("module", "kernel", "{}")
    assert not loaded.has([variant])
    loaded.join()
    assert loaded.has([variant])
    assert [record.getMessage() for record in caplog.records] == [
        "kernels could not be compiled beside the requests: no compiler"
    ]


def test_many_threads_fetch_each_variant_once() -> None:
    asked: list[Variant] = []
    loaded = Loaded(asked.extend)
    variants = [Variant("module", str(number), "{}") for number in range(50)]

    def ask() -> None:
        for variant in variants:
            loaded.has([variant])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded.join()
    assert sorted(asked) == sorted(variants)
    assert loaded.has(variants)
