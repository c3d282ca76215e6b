"""Models with deltas in code that torch.compile makes: the same code serves every choice of deltas."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.transformers import attach, detach
from tiny_models import Tiny, close, ids, logits, made_once

pytestmark = pytest.mark.filterwarnings("default")  # torch's and transformers' own

MIXTURES: list[Any] = [
    ["one", None, "two", "one"],
    "two",
    None,
    ["two", "two", None, None],
    "one",
    [None, "one", "one", "two"],
]


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import torch._dynamo.utils

    torch._dynamo.reset()
    return made_once(request, tmp_path_factory)


def graphs() -> int:
    """Return how many graphs were compiled since the counters were cleared."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def expected(tiny: Tiny, tokens: Any) -> dict[Any, Any]:
    """Return the logits of the base and of the unpacked fine-tunes."""
    found = {name: logits(tiny.load(folder), tokens) for name, folder in tiny.unpacked.items()}
    return {**found, None: logits(tiny.load(), tokens)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compiled_model_serves_every_mixture(tiny: Tiny, backend: str) -> None:
    tokens = ids(4, 3)
    want = expected(tiny, tokens)
    model = attach(tiny.load(), tiny.deltas)
    compiled = torch.compile(model, backend=backend)
    with model.delta(MIXTURES[0]):
        logits(compiled, tokens)  # looks for reads of weights, and runs as it is
        logits(compiled, tokens)
    with model.delta("one"):
        logits(compiled, tokens)
    torch._dynamo.utils.counters.clear()
    for names in MIXTURES * 2:
        with model.delta(names):
            found = logits(compiled, tokens)
        for row in range(4):
            assert close(found[row], want[names[row] if isinstance(names, list) else names][row]), names
    assert graphs() <= 1
    assert close(logits(compiled, tokens), want[None])
    detach(model)
    assert close(logits(compiled, tokens), want[None])
