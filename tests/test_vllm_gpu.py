"""Steps of an engine without vLLM on a GPU: graphs replay every mixture, while deltas come and leave their slots."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # torch's own
    pytest.mark.usefixtures("classes"),
]

from deltafmt import methods
from deltafmt.errors import UsageError
from engine_steps import BOUND, Played, Steps, make
from fake_vllm import classes

__all__ = ["classes"]

SIZES = (1, 2, 4, 8, 16, 24, 32)
LONGEST = 64  # of a step; those above 32 tokens replay no graph
# Fewer under compute-sanitizer, where a step takes long.
STEPS = int(os.environ.get("DELTAFMT_STEPS", "300"))
METHODS = {
    "one": (methods.DeltaDQ(n=4, m=16, bits=4), 1.0, True),
    "two": (methods.DeltaDQ(n=4, m=16, bits=4), -1.5, True),
    "three": (methods.DeltaDQ(n=4, m=16, bits=4), 0.5, False),
    "fixed": (methods.DeltaDQ(n=2, m=8, bits=2, index="fixed", share=1), 2.0, True),
    "signs": (methods.BitDelta(), -2.0, False),
    "vectors": (methods.SVD(rank=8), -1.0, False),
    "spread": (methods.DARE(), 1.5, False),
}
REFUSED = {
    "late": (methods.DeltaDQ(n=3, m=8, bits=3, index="fixed", share=1, scale_group=4), 1.0, False),
    "everywhere": (methods.BitDelta(), 1.0, True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> Path:
    home = tmp_path_factory.mktemp("steps")
    make(nano, home, METHODS | REFUSED)
    return home


@pytest.fixture(autouse=True)
def plain_floats() -> Iterator[None]:
    """Let products of the base be those of float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def steps(folder: Path) -> Steps:
    device = torch.device("cuda", torch.cuda.current_device())
    return Steps(folder, device, slots=3, longest=LONGEST, sizes=SIZES, prepare=[*METHODS])


def test_graphs_replay_every_mixture_while_deltas_come_and_go(steps: Steps, record_property: Any) -> None:
    played = Played(steps, [*METHODS], seed=2)
    assert played.nearest() > 10 * BOUND
    changed = 0
    for number in range(STEPS):
        ids, names, rows = played.draw(LONGEST if number % 5 == 0 else SIZES[-1])
        hidden, logits = steps.start(ids, names, rows, eager=number % 7 == 0)
        played.compare(ids, names, rows, logits)
        # Rows of the base keep every bit that they have where nobody asks for a delta.
        plain = steps.start(ids, [None] * len(ids), rows, eager=number % 7 == 0)[0]
        base = [row for row, name in enumerate(names) if name is None]
        changed += sum(not torch.equal(hidden[row], plain[row]) for row in base)
    record_property("loads", played.loads)
    assert played.wrong == [], (len(played.wrong), played.wrong[:10])
    assert changed == 0
    assert played.loads > STEPS // 4


def test_a_step_that_is_under_way_is_left_alone_by_a_delta_that_takes_its_slot(steps: Steps) -> None:
    played = Played(steps, [*METHODS], seed=3)
    names = [*METHODS]
    for turn in range(12):
        mine = names[turn % len(names)]
        others = [name for name in names if name != mine][:3]
        for name in names:
            if name not in steps.loaded():
                steps.load(name)  # so that little time passes between the steps
        ids = [(7 * turn + row) % Played.IDS for row in range(8)]
        rows = range(8)
        steps.start(ids, [mine] * 8, rows)
        eager = turn % 2 == 1
        first = steps.start(ids, [mine] * 8, rows, eager=eager, delay=300_000_000)[1]
        second = steps.start(ids, [others[row % 3] for row in rows], rows, eager=eager)[1]
        assert mine not in steps.resident()
        played.compare(ids, [mine] * 8, rows, first)
        played.compare(ids, [others[row % 3] for row in rows], rows, second)
    assert played.wrong == [], (len(played.wrong), played.wrong[:10])


def test_what_no_graph_holds_is_refused_by_name(steps: Steps) -> None:
    with pytest.raises(UsageError, match="changes in a layout that no graph was captured for"):
        steps.load("late")
    with pytest.raises(UsageError, match="no kernel looks rows up in a graph"):
        steps.load("everywhere")
