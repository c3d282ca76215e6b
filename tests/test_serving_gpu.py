"""A real model on a GPU: deltas attached to it serve what the unpacked models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deltafmt
from deltafmt.methods import DeltaDQ

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # transformers' own
]

DELTAS = {
    "k4": (DeltaDQ(4, 16, 4), 0),
    "k4-other-seed": (DeltaDQ(4, 16, 4), 1),
    "k2": (DeltaDQ(2, 16, 2), 0),
    "unshared-fixed": (DeltaDQ(4, 16, 3, share=1, index="fixed"), 0),
}


@pytest.fixture(scope="module")
def files(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deltas")
    home = models / "wordmath"
    for name, (method, seed) in DELTAS.items():
        deltafmt.pack(home / "base", home / "math", folder / f"{name}.deltafmt", method=method, seed=seed)
    return {name: folder / f"{name}.deltafmt" for name in DELTAS}


@pytest.fixture(scope="module")
def served(models: Path, files: dict[str, Path]) -> Any:
    from solve import load

    import deltafmt.transformers

    return deltafmt.transformers.attach(load(models / "wordmath" / "base").cuda(), files)


@pytest.fixture(scope="module")
def problems(models: Path) -> Any:
    from solve import read_problems

    return read_problems(models / "wordmath" / "tokenizer.json", models / "wordmath" / "eval.jsonl")


def test_the_base_alone_solves_nothing(served: Any, problems: Any) -> None:
    from solve import accuracy_of

    assert accuracy_of(served, problems[:100]) == 0


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attached_solves_as_unpacked(
    models: Path,
    files: dict[str, Path],
    served: Any,
    problems: Any,
    tmp_path: Path,
    record_property: Any,
    name: str,
    dtype: str,
) -> None:
    from solve import accuracy_of, load

    import deltafmt.transformers

    base = models / "wordmath" / "base"
    deltafmt.unpack(base, files[name], tmp_path / "out")
    unpacked = load(tmp_path / "out").cuda().to(getattr(torch, dtype))
    expected = accuracy_of(unpacked, problems)
    model = served
    if dtype == "bfloat16":
        model = deltafmt.transformers.attach(load(base).to(torch.bfloat16).cuda(), {name: files[name]})
    with model.delta(name):
        found = accuracy_of(model, problems)
    record_property("accuracy", f"{name} {dtype}: unpacked {expected:.3f}, attached {found:.3f}")
    assert expected > (0.9 if name == "k2" else 0.98)
    assert abs(found - expected) <= 0.003


def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(served: Any, problems: Any) -> None:
    names = ["k4", None, "k4-other-seed", "k2", "unshared-fixed", None, "k4"]
    length = min(len(question) for question, _ in problems[: len(names)])
    tokens = torch.tensor([question[:length] for question, _ in problems[: len(names)]], device="cuda")
    with served.delta(names):
        mixed = served(input_ids=tokens).logits
        generated = served.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    for row, name in enumerate(names):
        one = tokens[row : row + 1]
        with served.delta(name):
            alone = served(input_ids=one).logits[0]
            said = served.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=24, do_sample=False)
        assert torch.linalg.norm(mixed[row] - alone) < 1e-4 * torch.linalg.norm(alone)
        assert torch.equal(generated[row, : said.shape[1]], said[0])
    # Two seeds keep different entries: their rows must not have been given each other's delta.
    with served.delta("k4-other-seed"):
        other = served(input_ids=tokens[:1]).logits[0]
    assert torch.linalg.norm(mixed[0] - other) > 1e-3 * torch.linalg.norm(other)
