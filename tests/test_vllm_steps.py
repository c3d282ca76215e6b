"""Steps of an engine without vLLM, on the CPU: mixtures, loads and evictions, with and without packed terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from deltafmt import methods
from deltafmt.errors import UsageError
from deltafmt.vllm import served
from engine_steps import BOUND, Kind, Played, Rows, Steps, make
from fake_vllm import Llama, classes

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


def test_a_slot_that_could_not_be_filled_is_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(folder, CPU, slots=2, longest=16)
    steps.load("one")
    put = steps.manager.served.put

    def fails(*given: Any) -> None:
        put(*given)
        raise MemoryError

    monkeypatch.setattr(steps.manager.served, "put", fails)
    with pytest.raises(MemoryError):
        steps.manager.activate_adapter(1)
    assert steps.resident() == []
    monkeypatch.undo()
    assert steps.manager.activate_adapter(1)  # a later request fills it
    assert steps.resident() == ["one"]


def test_rows_of_images_leave_the_choice_of_tokens_as_it_was(folder: Path) -> None:
    steps = Steps(folder, CPU, slots=2, longest=16)
    played = Played(steps, ["one"], seed=1)
    steps.load("one")
    steps.manager.activate_adapter(1)
    given = Rows((1, 0, 1), (1,), Kind.TOWER)
    kept = steps.manager._set_adapter_mapping

    def first_the_image(mapping: Any) -> None:
        kept(mapping)
        kept(given)

    steps.manager._set_adapter_mapping = first_the_image
    ids, names, rows = [3, 4, 5, 6], [None, "one", "one", None], [0, 1, 2, 3]
    played.compare(ids, names, rows, steps.start(ids, names, rows)[1])
    assert played.wrong == []


def test_the_embedding_of_a_model_that_reads_images_is_run_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(model: Any, ids: torch.Tensor) -> torch.Tensor:
        embedding = model.model.embed_tokens
        ran.append(int(ids.sum()))
        return embedding.quant_method.embedding(embedding, ids)

    ran: list[int] = []
    monkeypatch.setattr(Llama, "supports_multimodal", True, raising=False)
    monkeypatch.setattr(Llama, "embed_input_ids", embed, raising=False)
    steps = Steps(folder, CPU, slots=2, longest=16)
    assert ran == [0]
    assert steps.manager.served.unused() == []


def test_an_embedding_is_refused_where_prompts_may_be_embeddings(folder: Path) -> None:
    steps = Steps(folder, CPU, slots=2, longest=16, enable_prompt_embeds=True)
    with pytest.raises(UsageError, match="prompts may be embeddings"):
        steps.load("one")
    steps.load("signs")  # changes no embedding
