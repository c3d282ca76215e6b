"""Continuous batching on a GPU: each request is given what plain ``generate`` gives it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deltafmt.transformers import attach
from tiny_models import Tiny, every, generate, ids, made_once

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # transformers' own
]

NAMES = ["one", None, "two", "one", "two", {"one": 0.5, "two": 0.5}, "two", None]
LENGTHS = (5, 9, 3, 17, 12, 30, 8, 1)


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@every(["llama", "qwen3", "gemma3"])
def test_each_request_is_given_what_it_is_given_alone(tiny: Tiny) -> None:
    model: Any = attach(tiny.load().cuda(), tiny.deltas)
    prompts = [ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
    want = []
    for name, prompt in zip(NAMES, prompts, strict=True):
        found = generate(model, torch.tensor([prompt], device="cuda"), delta=name)
        want.append(found[0, len(prompt) :].tolist())
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for tokens in (20, 256):
        sizes = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=tokens)
        outputs = model.generate_batch(prompts, config, sizes, delta=NAMES).values()
        assert [output.error for output in outputs] == [None] * len(NAMES)
        assert [output.generated_tokens for output in outputs] == want
