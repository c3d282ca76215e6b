"""What groups of modules have decided for an input holds for the next inputs, and for nothing else.

Every output is compared with that of a model whose modules decide each time.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.methods import RTN
from deltafmt.transformers import attach, detach
from played import play
from test_continuous import NAMES, PROMPTS, batch
from tiny_models import Tiny, close, generate, ids, logits, made_once, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
MIXED = ["one", None, "two"]


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


class Pair:
    """A model with routines, and one whose modules do not even share their input."""

    def __init__(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        self.played = play(monkeypatch)
        self.quick, self.apart = attach(tiny.load(), tiny.deltas), attach(tiny.load(), tiny.deltas, fuse=False)

    def check(self, tokens: Any, *, quick: bool | None = None, **options: Any) -> None:
        """Compare a call; it is made by routines, or not, if that is said."""
        before = self.played.made
        assert torch.equal(logits(self.quick, tokens, **options), logits(self.apart, tokens, **options))
        if quick is not None:
            assert (self.played.made > before) == quick


@pytest.fixture
def pair(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(tiny, monkeypatch)


def test_a_routine_is_of_one_form_and_one_selection(pair: Pair) -> None:
    with pair.quick.delta(MIXED), pair.apart.delta(MIXED):
        lengths = (
            (5, None),
            (5, False),
            (5, True),
            (6, False),
            (6, True),
            (5, False),
            (1, None),
            (1, False),
            (1, True),
        )
        for length, quick in lengths:  # a form's first mixed call is followed, its second decides
            pair.check(ids(3, length, seed=length), quick=quick)
        with torch.autocast("cpu", torch.bfloat16):
            pair.check(ids(3, 5, seed=9))
        pair.check(ids(3, 5, seed=10))
    for names in (["two", None, "one"], "two", ["two", {"one": 0.5, "two": 2.0}, None]):
        with pair.quick.delta(names), pair.apart.delta(names):
            for turn in range(3):
                pair.check(ids(3, 5, seed=turn))


def test_a_routine_ends_when_a_slot_changes(pair: Pair, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    tuned = LlamaForCausalLM.from_pretrained(tiny.base)
    shake(tuned, 77, 0.05)
    tuned.save_pretrained(tmp_path / "tuned")
    deltafmt.pack(tiny.base, tmp_path / "tuned", tmp_path / "three.deltafmt", method=RTN(4))
    models = (pair.quick, pair.apart)
    with pair.quick.delta(MIXED), pair.apart.delta(MIXED):
        for _ in range(3):
            pair.check(ids(3, 4))
        for model in models:  # the table grows by a layout, while the block is open
            model.deltas.add("three", tmp_path / "three.deltafmt")
            logits(model, ids(1, 4), delta="three")
        for quick in (False, False, True):
            pair.check(ids(3, 4), quick=quick)
        for model in models:
            model.deltas.replace("one", tmp_path / "three.deltafmt")
        for _ in range(2):
            pair.check(ids(3, 4))  # the block goes on with the delta that it began with
    for _ in range(3):
        pair.check(ids(3, 4), delta=MIXED)
    for model in models:
        model.deltas.remove("three")
        model.deltas.remove("one")
        model.deltas.add("one", tiny.deltas["one"])  # in a slot that another delta had
    with pair.quick.delta(MIXED), pair.apart.delta(MIXED):
        for _ in range(3):
            pair.check(ids(3, 4))
    with torch.no_grad():
        for model in models:
            layer = model.model.layers[0].mlp
            layer.down_proj = torch.nn.Linear(48, 32, bias=False)
            layer.down_proj.weight.copy_(tiny.load().model.layers[0].mlp.down_proj.weight)
    with pair.quick.delta(MIXED), pair.apart.delta(MIXED):
        for _ in range(3):
            pair.check(ids(3, 4))
    for model in models:
        detach(model)
    assert torch.equal(logits(pair.quick, ids(2, 4)), logits(tiny.load(), ids(2, 4)))


def test_rows_beside_each_other_while_generating(pair: Pair) -> None:
    tokens = ids(3, 4)
    for options in ({}, {"num_beams": 2}):
        found, want = (generate(model, tokens, delta=MIXED, **options) for model in (pair.quick, pair.apart))
        assert torch.equal(found, want)
    assert pair.played.made


def test_packed_batches(pair: Pair) -> None:
    assert batch(pair.quick, PROMPTS, delta=list(NAMES)) == batch(pair.apart, PROMPTS, delta=list(NAMES))
    assert pair.played.made


def test_modules_without_siblings_in_inference_mode(pair: Pair) -> None:
    with torch.inference_mode(), pair.quick.delta(MIXED), pair.apart.delta(MIXED):
        for _ in range(3):
            assert close(pair.quick(ids(3, 4)).logits, pair.apart(ids(3, 4)).logits)


def test_threads_have_routines_of_their_own(pair: Pair) -> None:
    wrong: list[Any] = []
    want = {name: logits(pair.apart, ids(3, 4), delta=name) for name in (*map(tuple, (MIXED, MIXED[::-1])), "one")}

    def work(name: Any) -> None:
        names = list(name) if isinstance(name, tuple) else name
        with pair.quick.delta(names):
            wrong.extend(name for _ in range(4) if not torch.equal(logits(pair.quick, ids(3, 4)), want[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pair.played.made


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bound_launches_on_a_gpu(tiny: Tiny, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltafmt.kernels.recorded_launches import BoundLaunches

    made: list[bool] = []
    run = BoundLaunches.run
    monkeypatch.setattr(BoundLaunches, "run", lambda *arguments: made.append(run(*arguments)) or made[-1])
    kind = getattr(torch, dtype)
    routine, apart = (attach(tiny.load(dtype=kind).cuda(), tiny.deltas, fuse=fuse) for fuse in (True, False))
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for names, rows, length in ((MIXED, 3, 1), (MIXED, 3, 4), ("one", 3, 1), ("one", 1, 1), ("two", 1, 1)):
        with routine.delta(names), apart.delta(names):
            for turn in range(4):
                tokens = ids(rows, length, seed=turn).cuda()
                found, want = (logits(model, tokens).float() for model in (routine, apart))
                assert torch.linalg.norm(found - want) < tolerance * torch.linalg.norm(want)
        assert made.count(True)
        assert all(made)
        made.clear()
