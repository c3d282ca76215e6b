"""Weights that are read inside a block but outside of a call: they hold the base's values, and are refused."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from deltafmt.errors import UsageError
from deltafmt.runtime import outside_reads
from deltafmt.runtime.scope import Scope
from deltafmt.runtime.served_modules import ServedModules
from row_cases import Mixed
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
    "formed": ("lm_head", lambda head, _, h: h.double() @ head.type_as(h.double()).T),
    "new": ("lm_head", lambda head, _, h: h.new_tensor(head)),
    "viewed": ("lm_head", lambda head, _, __: head.flatten() + 1),
    "in place": ("lm_head", lambda head, _, __: torch.zeros(96, 32).add_(head)),
    "in places": ("lm_head", lambda head, _, __: torch._foreach_add_([torch.zeros(96, 32)], [head])),
    "copied into": ("lm_head", lambda head, _, h: h @ torch.zeros(96, 32).copy_(head).T),
    "copied into a part": ("lm_head", lambda head, _, h: h @ _part_of(head)[0].T),
    "lent": ("lm_head", lambda head, _, h: _lent(head)(h)),
}


def _sharing(weight: Any) -> Any:
    """Return a module outside of the model that has its weight."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight = weight
    return module


def _counted(calls: list[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that notes its calls."""

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return original(*args, **options)

    return counted


def _part_of(weight: Any) -> Any:
    """Return a tensor with a part that a weight was copied into."""
    found = torch.zeros(2, 96, 32)
    found[0].copy_(weight)
    return found


def _lent(weight: Any) -> Any:
    """Return a module outside of the model that has the values of its weight."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data = weight.data
    return module


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@pytest.fixture
def served(tiny: Tiny) -> Served:
    return Served(tiny)


@pytest.mark.filterwarnings("ignore:To copy construct")
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


def test_what_asks_for_the_form_or_compares_runs(tiny: Tiny, served: Served) -> None:
    head, h, other = served.model.lm_head.weight, torch.randn(1, 3, 32), tiny.load().lm_head.weight
    with served.model.delta("one"):
        assert bool((head == other).all())
        assert not bool((head != other).any())
        assert bool((torch.isfinite(head) & ~head.isnan()).all())
        assert head.T.shape == (32, 96)
        assert len(head.flatten()) == len(head.data.view(-1)) == 96 * 32
        for lent in (h.to(head), h.type_as(head), torch.zeros(96 * 32).view_as(head), head.new_zeros(3)):
            assert (lent + 1).shape == lent.shape
        kept = torch.zeros(96, 32).copy_(head)
        kept.requires_grad = False
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            kept.sum()
        assert not kept.zero_().sum()
    served.check_clean()


def test_a_weight_that_was_given_anew_is_known(served: Served) -> None:
    head = served.model.lm_head
    with served.model.delta("one"):
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            head.weight.sum()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            head.weight.sum()
        assert served.run() == "one"
    served.check_clean()


def test_another_model_inside_a_block_walks_no_modules(
    tiny: Tiny, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight of another model costs a look into a table: no walk over the served modules, nor over frames."""
    other = tiny.load()
    want = logits(other, served.tokens)
    with served.model.delta("one"):
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            served.model.lm_head.weight.sum()
        walks: list[str] = []
        for where, name in ((ServedModules, "sites"), (outside_reads, "frames_of"), (Scope, "here")):
            monkeypatch.setattr(where, name, _counted(walks, name, getattr(where, name)))
        assert torch.equal(logits(other, served.tokens), want)
        assert walks == []
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            served.model.lm_head.weight.sum()
        assert {"frames_of", "here"} == set(walks)
    served.check_clean()


def test_a_running_module_excuses_reads_of_its_own_weights_alone(served: Served) -> None:
    model, tokens = served.model, served.tokens
    handle = model.lm_head.register_forward_hook(lambda *_: F.embedding(tokens, model.model.embed_tokens.weight))
    with model.delta("one"), pytest.raises(UsageError, match=READ.format("model.embed_tokens.weight")):
        model.lm_head(torch.randn(1, 3, 32))
    handle.remove()
    served.check_clean()


def test_a_weight_that_a_served_module_reads_of_an_inner_one_is_known(tmp_path: Path) -> None:
    """Attention of torch does not call its output product; a delta serves both, and another module may read it."""

    class Attends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Any, also: bool = False) -> Any:
            found = self.inner(x, x, x, need_weights=False)[0]
            return found @ self.inner.out_proj.weight.T.type_as(found) if also else found

    torch.manual_seed(0)
    mixed, x = Mixed(tmp_path, Attends()), torch.randn(2, 3, 8)
    weight = mixed.model.inner.out_proj.weight
    for _ in range(2):
        for named in ({}, {"also": True}):
            mixed.check(("one", None), lambda model, part, named=named: model(x[part], **named))
    with mixed.model.delta("one"):
        assert mixed.model.inner(x, x, x)[0].shape == x.shape
        with pytest.raises(UsageError, match=READ.format("inner.out_proj.weight")):
            F.linear(x, weight)


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
        assert pool.submit(served.run).result() == "one"
        with pytest.raises(UsageError, match=READ.format("lm_head.weight")):
            F.linear(h, head)
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


def test_a_block_that_ends_in_another_thread_refuses_nothing_any_more(served: Served) -> None:
    block = served.model.delta("one")
    contextvars.copy_context().run(block.__enter__)
    ending = threading.Thread(target=block.__exit__, args=(None, None, None))
    ending.start()
    ending.join()
    torch.set_grad_enabled(True)
    served.model.lm_head.weight.sum()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.ones(1).sum().backward()
    with served.model.delta("one"), pytest.raises(UsageError, match=READ.format("lm_head.weight")):
        served.model.lm_head.weight.sum()
    assert _get_current_function_mode_stack() == []
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
