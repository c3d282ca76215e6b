"""Caches of keys and values are continued by the deltas that filled them, and by no others."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deltafmt.errors import UsageError
from deltafmt.transformers import attach
from tiny_models import Tiny, close, generate, ids, logits, made_once

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

OTHERS = "begin with a new cache, or serve what filled it"


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


def fill(model: Any, tokens: Any, delta: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(tokens, use_cache=True, delta=delta, **options)


@pytest.mark.parametrize("before", ["one", None])
def test_what_one_delta_has_filled_another_does_not_continue(tiny: Tiny, before: str | None) -> None:
    model, tokens, more = attach(tiny.load(), tiny.deltas), ids(2, 4), ids(2, 1, seed=1)
    cache = fill(model, tokens, before).past_key_values
    filled = f'"{before}"' if before else "the base"
    for other in ("two", ["one", "two"], {"one": 0.5}):
        for kept in (cache, copy.deepcopy(cache)):
            with pytest.raises(UsageError, match=f"past_key_values filled by {filled}, and serves .*{OTHERS}"):
                fill(model, more, other, past_key_values=kept)
            with pytest.raises(UsageError, match=f"filled by {filled}"):
                model.generate(torch.cat([tokens, more], 1), past_key_values=kept, max_new_tokens=2, delta=other)
    if before:
        with torch.no_grad(), pytest.raises(UsageError, match="and serves the base"):
            model(more, past_key_values=cache)
    found = fill(model, more, [before, before], past_key_values=cache).logits  # the same, said in other words
    plain = tiny.load(tiny.unpacked[before] if before else None)
    assert close(found[:, 0], logits(plain, torch.cat([tokens, more], 1))[:, -1])


def test_a_cache_given_by_place_and_the_models_inside(tiny: Tiny) -> None:
    model, tokens, more = attach(tiny.load(), tiny.deltas), ids(2, 4), ids(2, 1, seed=1)
    cache = fill(model, tokens, "one").past_key_values
    with torch.no_grad(), pytest.raises(UsageError, match='filled by "one", and serves "two"'):
        model(more, None, None, cache, delta="two")
    inner = model.model
    with torch.no_grad():
        for call in (lambda kept: inner(more, past_key_values=kept), lambda kept: inner(more, None, None, kept)):
            with model.delta("two"), pytest.raises(UsageError, match='filled by "one", and serves "two"'):
                call(copy.deepcopy(cache))
            with pytest.raises(UsageError, match='filled by "one", and serves the base'):
                call(copy.deepcopy(cache))
            with model.delta("one"):
                call(copy.deepcopy(cache))
        of_base = inner(tokens, use_cache=True).past_key_values
        with model.delta("one"):
            of_one = inner(tokens, use_cache=True).past_key_values
    for kept, delta in ((of_base, "one"), (of_one, None)):
        with pytest.raises(UsageError, match="filled by"):
            fill(model, more, delta, past_key_values=kept)


def test_a_tuple_of_outputs_has_a_cache_too(tiny: Tiny) -> None:
    model, tokens = attach(tiny.load(), tiny.deltas), ids(1, 4)
    cache = fill(model, tokens, None, return_dict=False)[1]
    with pytest.raises(UsageError, match="filled by the base"):
        fill(model, tokens, "one", past_key_values=cache)


def test_a_replaced_delta_does_not_continue_what_it_was(tiny: Tiny) -> None:
    model, tokens = attach(tiny.load(), tiny.deltas), ids(1, 4)
    cache = fill(model, tokens, "one").past_key_values
    model.deltas.replace("one", tiny.deltas["one"])
    fill(model, tokens, "one", past_key_values=cache)  # the same file
    model.deltas.replace("one", tiny.deltas["two"])
    with pytest.raises(UsageError, match='filled by an earlier version of "one"'):
        fill(model, tokens, "one", past_key_values=cache)


def test_a_merged_delta_is_itself(tiny: Tiny) -> None:
    model, tokens = attach(tiny.load(), tiny.deltas), ids(1, 4)
    of_one, of_base = fill(model, tokens, "one").past_key_values, fill(model, tokens, None).past_key_values
    model.deltas.merge("one")
    with torch.no_grad():
        model(tokens, past_key_values=of_one)
        with pytest.raises(UsageError, match='filled by the base, and serves "one"'):
            model(tokens, past_key_values=of_base)


def test_a_cache_that_was_reset_takes_any_delta(tiny: Tiny) -> None:
    model, tokens = attach(tiny.load(), tiny.deltas), ids(2, 4)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    for name in ("one", None, "two", ["two", "one"]):
        found = fill(model, tokens, name, past_key_values=cache).logits
        names = name if isinstance(name, list) else [name, name]
        for row, each in enumerate(names):
            want = logits(tiny.load(tiny.unpacked[each] if each else None), tokens)
            assert close(found[row], want[row])
        with pytest.raises(UsageError, match="filled by"):
            fill(model, tokens, {"one": 0.5, "two": 0.5}, past_key_values=cache)
        cache.reset()


def test_generation_with_caches_of_its_own_takes_turns(tiny: Tiny) -> None:
    model, tokens = attach(tiny.load(), tiny.deltas), ids(2, 4)
    for options in ({"cache_implementation": "static"}, {"num_beams": 2}, {"num_return_sequences": 1}):
        for name in ("one", None, "two"):
            want = generate(tiny.load(tiny.unpacked[name] if name else None), tokens, **options)
            with model.delta(name):
                assert torch.equal(generate(model, tokens, **options), want)
