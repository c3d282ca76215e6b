"""Compiled code on a GPU: CUDA graphs serve every choice of deltas, and follow deltas that come and go."""

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
    pytest.mark.filterwarnings("default"),  # torch's and transformers' own
]

from deltafmt.transformers import attach
from tiny_models import DECODER, new_model, shake

METHODS = {
    "one": DeltaDQ(4, 16, 4),
    "two": DeltaDQ(4, 16, 4),
    "three": DeltaDQ(2, 16, 2),
    "late": DeltaDQ(4, 16, 4),
    "other": DeltaDQ(3, 8, 3, index="fixed", share=1, scale_group=4),
}
MIXTURES: list[Any] = [
    ["one", None, "two", "one"],
    "two",
    None,
    ["two", "three", None, None],
    "one",
    [None, "one", "three", "two"],
    ["late", "one", None, "late"],
    ["other", "late", "one", None],
    "other",
    ["one", "two", "one", "two"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base and fine-tunes; only linear weights differ in half of them."""
    home = tmp_path_factory.mktemp("compiled")
    new_model("llama").save_pretrained(home / "base")
    for number, (name, method) in enumerate(METHODS.items()):
        tuned = new_model("llama")
        shake(tuned, 10 + number, 0.05)
        if name in ("one", "two", "late"):
            plain = dict(new_model("llama").named_parameters())
            with torch.no_grad():
                for key, parameter in tuned.named_parameters():
                    if "_proj" not in key:
                        parameter.copy_(plain[key])
        tuned.save_pretrained(home / name)
        deltafmt.pack(home / "base", home / name, home / f"{name}.deltafmt", method=method, seed=number)
        deltafmt.unpack(home / "base", home / f"{name}.deltafmt", home / f"{name}-unpacked")
    return home


def load(folder: Path) -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()


def expected(home: Path, work: Any) -> dict[Any, Any]:
    """Return what a function gives for the base and for the unpacked fine-tunes."""
    found = {name: work(load(home / f"{name}-unpacked")) for name in METHODS}
    return {**found, None: work(load(home / "base"))}


def tokens_of(rows: int, length: int) -> Any:
    return torch.randint(2, DECODER["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3)).cuda()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_one_compiled_model_serves_every_mixture(folder: Path, mode: str, record_property: Any) -> None:
    torch._dynamo.reset()
    tokens = tokens_of(4, 1)

    def work(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits.clone()

    want = expected(folder, work)
    early = {name: folder / f"{name}.deltafmt" for name in ("one", "two", "three")}
    model = attach(load(folder / "base"), early)
    compiled = torch.compile(model, mode=mode)
    wrong = []
    for turn in range(3):
        for names in MIXTURES:
            used = set(names if isinstance(names, list) else [names]) - {None}
            for name in used - set(model.deltas.names):
                model.deltas.add(name, folder / f"{name}.deltafmt")
            with model.delta(names):
                for step in range(3):
                    found = work(compiled)
                    for row in range(4):
                        right = want[names[row] if isinstance(names, list) else names][row]
                        error = float(torch.linalg.norm(found[row] - right) / torch.linalg.norm(right))
                        if error > 1e-3:
                            wrong.append((turn, names, step, row, error))
        model.deltas.remove("late")
        model.deltas.replace("one", folder / "one.deltafmt")
    stats = torch._dynamo.utils.counters
    record_property("graphs", f"{mode}: {dict(stats['stats'])} {dict(stats['inductor'])}"[:600])
    assert not wrong, wrong[:10]


def test_generate_with_a_static_cache(folder: Path, record_property: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens = tokens_of(4, 6)

    def work(model: Any, **options: Any) -> Any:
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, **options
        )

    want = expected(folder, work)
    model = attach(load(folder / "base"), {name: folder / f"{name}.deltafmt" for name in METHODS})
    wrong = []
    for names in MIXTURES * 2:
        found = work(model, delta=names, cache_implementation="static")
        rows = [want[names[row] if isinstance(names, list) else names][row] for row in range(4)]
        wrong += [(names, row) for row in range(4) if not torch.equal(found[row], rows[row])]
    stats = torch._dynamo.utils.counters
    record_property("graphs", f"generate: {dict(stats['stats'])} {dict(stats['inductor'])}"[:600])
    assert not wrong, wrong[:10]


def test_a_layer_is_one_graph(folder: Path) -> None:
    torch._dynamo.reset()
    tokens = tokens_of(4, 1)

    def work(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits.clone()

    want = expected(folder, work)
    model = attach(load(folder / "base"), {name: folder / f"{name}.deltafmt" for name in METHODS})
    with model.delta(MIXTURES[0]):
        work(model)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, mode="reduce-overhead")
    wrong = []
    for names in MIXTURES * 2:
        with model.delta(names):
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                found = work(model)
        for row in range(4):
            right = want[names[row] if isinstance(names, list) else names][row]
            if torch.linalg.norm(found[row] - right) > 1e-3 * torch.linalg.norm(right):
                wrong.append((names, row))
    assert not wrong, wrong[:10]
