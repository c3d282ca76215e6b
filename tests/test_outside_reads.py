"""Weights that are read inside a block but outside of a call: they hold the base's values, and are refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from deltafmt.errors import UsageError
from served import Served
from tiny_models import Tiny, ids, logits, made_once

READ = r"^\"{}\" is read without calling its module, and holds the base's values; call the module, or read"
READS: dict[str, tuple[str, Callable[[Any, Any, Any], Any]]] = {
    "product": ("lm_head", lambda head, _, h: h @ head.T),
    "linear": ("lm_head", lambda head, _, h: F.linear(h, head)),
    "keyword": ("lm_head", lambda head, _, h: F.linear(h, weight=head)),
    "einsum": ("lm_head", lambda head, _, h: torch.einsum("bth,vh->btv", h, head)),
    "detached": ("lm_head", lambda head, _, h: h @ head.detach().T),
    "data": ("lm_head", lambda head, _, h: h @ head.data.clone().T),
    "converted": ("lm_head", lambda head, _, h: h.double() @ head.double().T),
    "list": ("lm_head", lambda head, _, __: torch.cat([head, head])),
    "module": ("lm_head", lambda head, _, h: _sharing(head)(h)),
    "embedding": ("model.embed_tokens", lambda _, table, __: F.embedding(ids(2, 3), table)),
    "rows": ("model.embed_tokens", lambda _, table, __: table[ids(2, 3)]),
}


def _sharing(weight: Any) -> Any:
    """Return a module outside of the model that has its weight."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight = weight
    return module


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@pytest.fixture
def served(tiny: Tiny) -> Served:
    return Served(tiny)


def test_a_weight_that_is_read_outside_of_a_call_is_refused(served: Served) -> None:
    model, h = served.model, torch.randn(2, 3, 32)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    for names in ("one", ["one", None], {"one": 0.5}):
        for name, read in READS.values():
            with model.delta(names), pytest.raises(UsageError, match=READ.format(f"{name}.weight")):
                read(head, table, h)
    for names in (None, ["base", None]):
        with model.delta(names):
            for _, read in READS.values():
                read(head, table, h)
    served.check_clean()


def test_what_reads_no_changed_weight_runs(tiny: Tiny, served: Served) -> None:
    model, h, base = served.model, torch.randn(1, 3, 32), tiny.load()
    values = base.state_dict()
    own = torch.nn.Linear(32, 96)
    with model.delta("one"):
        assert torch.equal(model.lm_head(h), model.lm_head(h))
        assert not torch.equal(model.lm_head(h), base.lm_head(h))
        assert own(h).shape == (1, 3, 96)
        found = model.state_dict()
        assert found.keys() == values.keys()
        assert all(torch.equal(found[name], values[name]) for name in values)
        assert torch.equal(copy.deepcopy(model.lm_head.weight), values["lm_head.weight"])
        assert found["lm_head.weight"].T.shape == (32, 96)
        compiled = torch.compile(lambda x: x.softmax(-1), fullgraph=True, backend="eager")
        assert torch.allclose(compiled(h), h.softmax(-1))
        model.deltas.add("three", tiny.deltas["two"])
        assert served.run(delta="three") == "two"
        hidden = model.model(input_ids=served.tokens).last_hidden_state
        assert torch.allclose(model.lm_head(hidden), served.want["one"], atol=1e-4)
    served.check_clean()


def test_an_unchanged_or_other_models_weight_is_read(tiny: Tiny, served: Served) -> None:
    other, h = tiny.load(), torch.randn(1, 3, 32)
    with served.model.delta("one"):
        assert torch.equal(F.linear(h, other.lm_head.weight), other.lm_head(h))
        with Served(tiny).model.delta("two"), pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            F.linear(h, served.model.lm_head.weight)
    served.check_clean()


def test_threads_see_their_own_reads(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    h, head = torch.randn(1, 3, 32), served.model.lm_head.weight
    with ThreadPoolExecutor(1) as pool, served.model.delta("one"):
        pass
    with ThreadPoolExecutor(1) as pool:

        def other() -> Any:
            with served.model.delta("two"), pytest.raises(UsageError, match=READ.format("lm_head.weight")):
                F.linear(h, head)
            return F.linear(h, head)

        assert torch.equal(pool.submit(other).result(), F.linear(h, head))
    served.check_clean()


def test_no_mode_of_torch_is_left_behind_nor_met_in_calls(served: Served) -> None:
    class Counts(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counts.calls += 1
            return func(*args, **(kwargs or {}))

    seen: list[int] = []
    handle = served.model.model.norm.register_forward_pre_hook(
        lambda *_: seen.append(len(_get_current_function_mode_stack()))
    )
    assert served.run(delta="one") == "one"
    with served.model.delta("one"), served.model.delta("one"):
        served.run()
        assert len(_get_current_function_mode_stack()) == 1
        with Counts():
            assert served.run() == "one"
    assert seen[:2] == [0, 0]
    assert Counts.calls
    assert _get_current_function_mode_stack() == []
    handle.remove()
    outer, block = contextlib.ExitStack(), served.model.delta("one")
    outer.enter_context(block)
    with Counts() as mode:
        outer.close()
        assert _get_current_function_mode_stack() == [mode]
    served.check_clean()


def test_blocks_that_are_left_crosswise_leave_gradients_on(served: Served) -> None:
    first, second, third = (served.model.delta(name) for name in ("one", "two", "one"))
    for block in (first, second, third):
        block.__enter__()
    for block in (second, first):
        block.__exit__(None, None, None)
        assert not torch.is_grad_enabled()
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            served.model.lm_head.weight.sum()
    third.__exit__(None, None, None)
    served.check_clean()
    with torch.no_grad():
        assert logits(served.model, served.tokens).shape == (1, 5, 96)
        assert not torch.is_grad_enabled()


def test_a_step_of_training_inside_a_block_is_refused(served: Served) -> None:
    tokens = served.tokens
    with served.model.delta("one"):
        loss = served.model(input_ids=tokens, labels=tokens).loss
        with pytest.raises(
            UsageError, match=r"^deltas have no gradients, and inside a block nothing has; train outside"
        ):
            loss.backward()
        with torch.enable_grad():
            own = torch.nn.Linear(4, 4)
            own(torch.ones(1, 4)).sum().backward()
            assert own.weight.grad is not None
    served.check_clean()
