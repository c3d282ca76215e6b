"""Merging gives the bits that unpacking writes, and unmerging gives back the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import DeltaDQ
from deltafmt.transformers import attach, detach
from tiny_models import ARCHITECTURES, Tiny, every, ids, made_once, make_tiny, new_model, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


def bits(model: Any) -> dict[str, Any]:
    return {name: value.contiguous().view(torch.uint8).clone() for name, value in model.state_dict().items()}


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@every(ARCHITECTURES)
def test_merged_is_unpacked(tiny: Tiny) -> None:
    tokens = ids(2, 5)
    model = attach(tiny.load(), tiny.deltas)
    before = bits(model)
    for name in ("one", "two", "one"):
        model.deltas.merge(name)
        assert model.deltas.merged == name
        assert equal(bits(model), bits(tiny.load(tiny.unpacked[name])))
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, tiny.load(tiny.unpacked[name])(tokens).logits)
        model.deltas.unmerge()
        assert model.deltas.merged is None
        assert equal(bits(model), before)
    detach(model)
    assert equal(bits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(tmp_path: Path, dtype: Any) -> None:
    """A pair in 16 bits, merged in its own dtype and in a wider one; only what changes is kept."""
    pair = make_tiny("qwen2", tmp_path, dtype)
    for held in (dtype, torch.float32):
        model = attach(pair.load(dtype=held), pair.deltas)
        assert not any(model.deltas.unchecked.values())
        before = bits(model)
        model.deltas.merge("one")
        assert equal(bits(model), bits(pair.load(pair.unpacked["one"], held)))
        assert 0.2 < model.deltas.saved_bytes / sum(value.nbytes for value in model.parameters()) < 0.3
        model.deltas.unmerge()
        assert model.deltas.saved_bytes == 0
        assert equal(bits(model), before)


def test_a_wide_base_is_restored_whole(tmp_path: Path) -> None:
    """Values that the fine-tune's dtype cannot hold come back, although merging rounds them away."""
    pair = make_tiny("qwen2", tmp_path, torch.bfloat16)
    model = pair.load()
    shake(model, 0, 1e-5)
    attach(model, pair.deltas)
    assert "model.layers.0.mlp.up_proj.weight" in model.deltas.unchecked["one"]
    before = bits(model)
    model.deltas.merge("one")
    assert not equal(bits(model), before)
    model.deltas.unmerge()
    assert equal(bits(model), before)


@every(["qwen2"])
def test_merged_deltas_are_not_served(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    with pytest.raises(UsageError, match=r"^no delta is merged$"):
        model.deltas.unmerge()
    with pytest.raises(UsageError, match=r'^there is no delta "three"; known: one, two$'):
        model.deltas.merge("three")
    with model.delta("one"), pytest.raises(UsageError, match=r"^cannot merge while deltas are in use$"):
        model.deltas.merge("two")
    model.deltas.merge("one")
    refused = '^delta "one" is merged into the base; unmerge it before '
    with pytest.raises(UsageError, match=refused + "deltas are served$"), model.delta("two"):
        pass
    with pytest.raises(UsageError, match=refused + "another is merged$"):
        model.deltas.merge("two")
    with pytest.raises(UsageError, match=refused + "another is added$"):
        model.deltas.add("three", tiny.deltas["one"])
    with pytest.raises(UsageError, match=refused + "deltas are detached$"):
        detach(model)
    with pytest.raises(UsageError, match=r'^delta "one" is in use$'):
        model.deltas.remove("one")
    model.deltas.unmerge()
    with model.delta(["two", "one"]):
        model(ids(2, 3))


@every(["qwen2"])
@pytest.mark.parametrize("hidden", [False, True])
def test_weights_that_changed(tiny: Tiny, hidden: bool) -> None:
    model = attach(tiny.load(), tiny.deltas)
    before = bits(model)
    model.deltas.merge("one")
    weight = model.model.layers[1].mlp.up_proj.weight
    changed = weight.data if hidden else weight
    with torch.no_grad():
        kept = changed.clone()
        changed += 1
    now = bits(model)
    with pytest.raises(UsageError, match=r'^cannot unmerge "one": .* "model.layers.1.mlp.up_proj.weight" was changed'):
        model.deltas.unmerge()
    assert equal(bits(model), now)
    assert model.deltas.merged == "one"
    if hidden:
        weight.data.copy_(kept)
        model.deltas.unmerge()
        assert equal(bits(model), before)


def test_a_merge_that_fails_leaves_the_base(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltafmt.runtime import merge

    model = attach(tiny.load(), tiny.deltas)
    before = bits(model)
    calls = []

    def added(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("full")
        return working(*arguments)

    working = merge.added
    monkeypatch.setattr(merge, "added", added)
    with pytest.raises(MemoryError):
        model.deltas.merge("one")
    assert equal(bits(model), before)
    assert model.deltas.merged is None
    monkeypatch.undo()
    with model.delta("one"):
        model(ids(1, 3))


@every(["qwen2"])
def test_untied_deltas_of_a_tied_base(tiny: Tiny, tmp_path: Path) -> None:
    """The fine-tune has its own head: served as it is, and not mergeable into the one matrix of the base."""
    tuned = new_model("qwen2", tie_word_embeddings=False)
    tuned.load_state_dict(tiny.load().state_dict())
    shake(tuned, 4, 0.05)
    tuned.save_pretrained(tmp_path / "tuned")
    deltafmt.pack(tiny.base, tmp_path / "tuned", tmp_path / "d", method=DeltaDQ(2, 2, 8))
    model = attach(tiny.load(), {"d": tmp_path / "d"})
    tokens = ids(2, 5)
    with model.delta("d"), torch.no_grad():
        assert torch.allclose(model(tokens).logits, tuned(tokens).logits, atol=0.05)
    before = bits(model)
    with pytest.raises(UsageError, match=r"differ, but the model has one parameter for both$"):
        model.deltas.merge("d")
    assert equal(bits(model), before)
