"""Steps of an engine without vLLM, on the CPU: mixtures, loads and evictions, with and without packed terms."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from deltafmt import methods
from deltafmt.errors import UsageError
from deltafmt.vllm import served
from engine_steps import BOUND, Played, Steps, make
from fake_vllm import classes

pytestmark = pytest.mark.usefixtures("classes")
__all__ = ["classes"]

CPU = torch.device("cpu")
METHODS = {
    "one": (methods.DeltaDQ(n=4, m=16, bits=4), 1.0, True),
    "two": (methods.DeltaDQ(n=4, m=16, bits=4), -1.5, True),
    "signs": (methods.BitDelta(), 2.0, False),
    "other": (methods.DeltaDQ(n=2, m=2, bits=4), -0.5, True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> Path:
    home = tmp_path_factory.mktemp("steps")
    make(nano, home, METHODS)
    return home


@pytest.mark.parametrize("packed", [False, True])
def test_every_mixture_gives_each_row_the_logits_of_its_own_checkpoint(
    folder: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:  # what is put into an arena and into tables on a GPU; torch multiplies with it here
        monkeypatch.setattr(served, "usable_on", lambda _: True)
    steps = Steps(folder, CPU, slots=2, longest=16, prepare=["one"] if packed else [], largest=1 << 20)
    assert (steps.manager.served.arena is not None) is packed
    played = Played(steps, [*METHODS], seed=1)
    assert played.nearest() > 10 * BOUND
    for _ in range(16):
        played.step(16)
    assert played.loads > 8
    assert played.wrong == []


def test_a_delta_that_is_larger_than_a_slot_of_the_arena_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "usable_on", lambda _: True)
    steps = Steps(folder, CPU, slots=2, longest=16, largest=100_000)
    with pytest.raises(UsageError, match="bytes on the device where a slot has"):
        steps.load("other")
