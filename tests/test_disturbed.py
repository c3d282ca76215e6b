"""What callers and libraries do to served modules: adapters below, hooks, forwards, attributes, torch's defaults."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.utils import prune

from deltafmt.errors import UsageError
from deltafmt.runtime.scope import Scope
from deltafmt.runtime.substituted import refreshed, twin_of
from deltafmt.transformers import attach, detach
from tiny_models import Tiny, close, ids, logits, made_once

pytestmark = pytest.mark.filterwarnings("default")  # transformers' and PEFT's own

ROWS = ["one", None, "two"]


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


class Unpacked:
    """The base and the unpacked fine-tunes of the rows, to which a test does the same as to the served model."""

    def __init__(self, tiny: Tiny) -> None:
        self.models = {name: tiny.load(tiny.unpacked.get(name)) for name in ROWS}

    def check(self, model: Any, *changes: Callable[[Any], Any]) -> None:
        """Change them, and check that a model serves what they give."""
        tokens = ids(3, 6)
        for each, change in itertools.product(self.models.values(), changes):
            change(each)
        want = [logits(each, tokens) for each in self.models.values()]
        assert close(logits(model, tokens, delta="one"), want[0])
        assert close(logits(model, tokens, delta=ROWS), torch.stack([each[row] for row, each in enumerate(want)]))


def used(tiny: Tiny) -> Any:
    """Return a model with deltas, which has served."""
    model = attach(tiny.load(), tiny.deltas)
    logits(model, ids(3, 6), delta=ROWS)
    return model


def add_adapter(model: Any) -> Any:
    """Put adapters below a model's modules, siblings and others; the same each time."""
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "down_proj", "embed_tokens"]
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)).eval()


def test_an_adapter_below(tiny: Tiny) -> None:
    """PEFT has put its modules into the base before the deltas come; the weights in them are compared as ever."""
    model = tiny.load()
    add_adapter(model)
    attach(model, tiny.deltas)
    assert model.deltas.unchecked == {"one": [], "two": []}
    unpacked = Unpacked(tiny)
    unpacked.check(model, add_adapter)
    model.deltas.merge("one")
    assert close(logits(model, ids(2, 5)), logits(unpacked.models["one"], ids(2, 5)))


def other_attributes(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5
    model.model.layers[0].input_layernorm.variance_epsilon = 0.25


def earlier_hooks(model: Any) -> None:
    for path in ("model.norm", "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda _module, _args, output: output * 2, prepend=True)
        module.register_forward_pre_hook(lambda _module, args: (args[0].clone(),), prepend=True)


def no_hooks(model: Any) -> None:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def test_changes_of_modules_are_followed(tiny: Tiny) -> None:
    model, unpacked = used(tiny), Unpacked(tiny)
    for change in (other_attributes, earlier_hooks, no_hooks):
        change(model)
        unpacked.check(model, change)


def test_other_computations_are_refused(tiny: Tiny) -> None:
    """Be the module served by a hook, or together with its siblings; what is undone is served again."""
    model = used(tiny)
    changed = "^the model has changed since deltas were attached: "
    want = logits(model, ids(2, 5), delta="one")
    for path in ("lm_head", "model.layers.0.self_attn.k_proj"):
        module = model.get_submodule(path)
        module.forward = functools.partial(lambda original, x: original(x) * 2, module.forward)
        with pytest.raises(UsageError, match=f'{changed}module "{path}", .*, was given another forward'):
            logits(model, ids(2, 5), delta="one")
        del module.forward
        assert torch.equal(logits(model, ids(2, 5), delta="one"), want)
    mlp, mlp_of_base = model.model.layers[0].mlp, tiny.load().model.layers[0].mlp
    for name, compute in (
        ("up_proj", lambda module: prune.l1_unstructured(module, "weight", 0.5)),
        ("down_proj", torch.nn.utils.parametrizations.spectral_norm),
    ):
        module, before = getattr(mlp, name), getattr(mlp_of_base, name)
        compute(module)
        with pytest.raises(UsageError, match=f'{changed}the weight of module "model.layers.0.mlp.{name}" is computed'):
            logits(model, ids(2, 5), delta="one")
        setattr(mlp, name, before)
    assert close(logits(model, ids(2, 5), delta="one"), want)


@pytest.mark.parametrize("order", ["taken off", "detached, taken off", "taken off, detached"])
def test_parametrizations_that_are_taken_off(tiny: Tiny, order: str) -> None:
    """They give the module the class that they found, which is ours if it was served then."""
    tokens, unpacked, parametrize = ids(2, 5), Unpacked(tiny), torch.nn.utils.parametrize
    model = used(tiny)
    module = model.model.layers[0].self_attn.q_proj
    parametrize.register_parametrization(module, "weight", torch.nn.Identity())
    if order == "detached, taken off":
        detach(model)
    else:
        assert close(logits(model, tokens, delta="one"), logits(unpacked.models["one"], tokens))
    parametrize.remove_parametrizations(module, "weight")
    if order == "taken off, detached":
        detach(model)
    if order != "taken off":
        assert type(module) is torch.nn.Linear
        assert close(logits(model, tokens), logits(unpacked.models[None], tokens))
        attach(model, tiny.deltas)
    unpacked.check(model)
    detach(model)
    assert type(module) is torch.nn.Linear


def test_parts_that_are_recorded(tiny: Tiny) -> None:
    """Torch.fx records calls of linear modules, not what these compute; a part cannot be pickled or copied."""
    model, unpacked = used(tiny), Unpacked(tiny)
    part, x = model.model.layers[0].mlp, torch.randn(1, 5, 32)
    recorded = torch.fx.symbolic_trace(part)
    for name in ("one", None, "two"):
        with torch.no_grad(), model.delta(name):
            assert close(recorded(x), unpacked.models[name].model.layers[0].mlp(x))
    for way in (lambda: torch.save(part, io.BytesIO()), lambda: copy.deepcopy(part.up_proj)):
        with pytest.raises(UsageError, match="cannot be copied or pickled; detach"):
            way()
    detach(model)
    assert copy.deepcopy(part).up_proj.in_features == 32


def test_hooks_that_another_module_was_given(tiny: Tiny) -> None:
    """As torch's quantization does, which puts new modules in the places of old ones, with their hooks."""
    model = used(tiny)
    old = model.model.layers[0].mlp.down_proj
    new = torch.nn.Linear(48, 32, bias=False)
    new.weight = old.weight
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
    model.model.layers[0].mlp.down_proj = new
    Unpacked(tiny).check(model)


def test_the_defaults_of_torch_do_not_matter(tiny: Tiny) -> None:
    """A default dtype or device is for the caller's tensors."""
    tokens, base = ids(3, 6), tiny.load()
    model = used(tiny)
    want = logits(model, tokens, delta=ROWS)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        found = logits(model, tokens, delta=ROWS), logits(attach(base, tiny.deltas), tokens, delta=ROWS)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(one, want) for one in found)


def test_a_copy_of_a_module_is_refreshed_without_a_change() -> None:
    module, values = torch.nn.LayerNorm(4), {"weight": torch.full((4,), 3.0)}
    twin = twin_of(module, values)
    before = dict(twin.__dict__)
    module.eps = 0.5
    made = refreshed(twin, module)
    assert made is not twin
    assert twin.__dict__ == before  # another thread computes with it
    assert made.eps == 0.5
    assert made.weight is values["weight"]
    assert made.bias is module.bias


def test_a_hook_is_followed_between_the_calls_of_other_threads(tiny: Tiny) -> None:
    tokens, model = ids(2, 5), attach(tiny.load(), tiny.deltas)
    want = logits(tiny.load(tiny.unpacked["one"]), tokens)
    wrong: list[object] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                if not close(logits(model, tokens, delta="one"), want):
                    wrong.append("another answer")
            except Exception as error:  # noqa: BLE001 - whatever a client is told is wrong
                wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    module = model.get_submodule("model.layers.0.self_attn.o_proj")
    for _ in range(12):
        hook = module.register_forward_hook(lambda *_: None, prepend=True)
        logits(model, tokens, delta="one")
        hook.remove()
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_waits_while_the_model_is_rebuilt_and_the_rebuilding_waits_for_calls() -> None:
    scope, seen = Scope(), list[str]()
    scope.begin_call()

    def rebuild() -> None:
        with scope.quiet(30) as alone:
            seen.append(f"rebuilt {alone}")

    def call() -> None:
        scope.begin_call()
        seen.append("another call")
        scope.end_call()

    threads = [threading.Thread(target=rebuild), threading.Thread(target=call)]
    threads[0].start()
    while scope._quiet is None:
        time.sleep(0.001)
    threads[1].start()
    scope.begin_call()  # one within the call goes on
    scope.end_call()
    with scope.quiet(0) as alone:
        assert not alone  # another thread has the turn
    assert not seen
    scope.end_call()
    for thread in threads:
        thread.join()
    assert seen == ["rebuilt True", "another call"]


def quantized(tiny: Tiny) -> Any:
    """Return a base whose linear modules torch has quantized."""
    return torch.ao.quantization.quantize_dynamic(tiny.load(), {torch.nn.Linear})


def test_modules_that_are_put_in_without_a_word(tiny: Tiny) -> None:
    """Torch's quantization writes to ``_modules``, and no hook tells of it; linear modules computed with the base."""
    model = used(tiny)
    mlp = model.model.layers[0].mlp
    new = torch.nn.Linear(48, 32, bias=False)
    new.weight = mlp.down_proj.weight
    mlp._modules["down_proj"] = new
    Unpacked(tiny).check(model)
    tokens, served = (
        ids(2, 5),
        {"before": attach(quantized(tiny), tiny.deltas), "after": attach(tiny.load(), tiny.deltas)},
    )
    logits(served["after"], tokens, delta="one")
    for name, module in quantized(tiny).named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            parent, _, last = name.rpartition(".")
            served["after"].get_submodule(parent)._modules[last] = module
    found = {when: logits(model, tokens, delta="one") for when, model in served.items()}
    assert torch.equal(found["after"], found["before"])


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_weights_that_are_computed_already(tiny: Tiny, how: str) -> None:
    """A delta of a weight that is computed from others would be added behind the computation."""
    model = tiny.load()
    module = model.model.layers[0].mlp.up_proj
    if how == "pruned":
        prune.l1_unstructured(module, "weight", 0.5)
    else:
        torch.nn.utils.parametrizations.spectral_norm(module)
    with pytest.raises(UsageError, match=r'^the weight of module "model.layers.0.mlp.up_proj" is computed from other'):
        attach(model, tiny.deltas)
