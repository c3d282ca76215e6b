"""A model that is changed after deltas were attached: what is still the base is served, everything else is refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.transformers import attach, detach
from tiny_models import Tiny, close, ids, logits, made_once, new_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

CHANGED = r"^the model has changed since deltas were attached: "
WAY_OUT = r"; undo the change, or detach the deltas and attach them to the model as it is now$"


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@pytest.fixture(params=["fresh", "used"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give a model with deltas, which has served or not."""
    one = made_once(request, tmp_path_factory) if not hasattr(request, "param") else tiny_of(tmp_path_factory)
    found = attach(one.load(), one.deltas)
    if request.param == "used":
        for names in ("one", ["one", None, "two"]):
            for _ in range(2):
                logits(found, ids(3, 4), delta=names)
    return found


def tiny_of(folders: pytest.TempPathFactory) -> Tiny:
    class Plain:
        """A request without a parameter."""

    return made_once(Plain(), folders)  # type: ignore[arg-type]


def refused(model: Any, match: str, kind: type[Exception] = WrongBaseError) -> None:
    """Check that each call is refused, in a block, by name, in a decoding step; and that the base is not."""
    for tokens in (ids(2, 4), ids(2, 1)):
        for _ in range(2):
            with model.delta("one"):
                for _ in range(2):
                    with pytest.raises(kind, match=CHANGED + match + ".*" + WAY_OUT):
                        logits(model, tokens)
    with pytest.raises(kind, match=CHANGED + match):
        model.generate(ids(1, 4), delta="one", max_new_tokens=2, pad_token_id=0)
    logits(model, ids(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_model_is_followed(tiny: Tiny, model: Any, dtype: Any) -> None:
    """As if the deltas had been attached to the converted model."""
    tokens, names = ids(3, 6), ["one", None, "two"]
    want = logits(attach(tiny.load().to(dtype), tiny.deltas), tokens, delta=names)
    model.to(dtype)
    for _ in range(2):
        found = logits(model, tokens, delta=names)
        assert found.dtype == dtype
        assert torch.equal(found, want)
    assert bool(model.deltas.unchecked["one"]) == (dtype is not torch.float64)


def test_a_model_that_was_rounded_is_not_the_base(model: Any) -> None:
    model.half().float()
    refused(model, r'delta "one": wrong base LlamaForCausalLM: tensor ".*" differs')


def test_a_part_that_was_rounded(model: Any) -> None:
    model.model.layers[0].half()
    model.model.layers[0].float()
    refused(model, r'delta "one": wrong base LlamaForCausalLM: tensor ".*layers.0.*" differs')


def test_another_base_is_loaded(model: Any) -> None:
    mine = {name: value.clone() for name, value in model.state_dict().items()}
    other = new_model("llama", seed=5)
    want = logits(model, ids(2, 4), delta="one")
    model.load_state_dict(other.state_dict())
    refused(model, r'delta "one": wrong base LlamaForCausalLM: tensor ".*" differs')
    with pytest.raises(WrongBaseError):
        model.deltas.merge("one")
    model.load_state_dict(mine)
    assert torch.equal(logits(model, ids(2, 4), delta="one"), want)
    model.load_state_dict(other.state_dict(), assign=True)
    refused(model, r'delta "one": wrong base LlamaForCausalLM: tensor ".*" differs')


@pytest.mark.parametrize("how", ["in place", "data", "parameter", "step"])
def test_a_weight_is_changed(model: Any, how: str) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    if how == "in place":
        with torch.no_grad():
            weight[0, 0] += 1
    elif how == "data":
        weight.data = weight.data + 1
    elif how == "parameter":
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.detach() + 1)
    else:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        model(input_ids=ids(1, 4), labels=ids(1, 4)).loss.backward()
        optimizer.step()
    refused(model, r'delta "one": wrong base LlamaForCausalLM: tensor "model.layers.1.mlp.up_proj.weight" differs')


def test_a_weight_is_changed_inside_a_block(model: Any) -> None:
    with model.delta("one"):
        logits(model, ids(2, 4))
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
        logits(model, ids(2, 1))
        with torch.no_grad():
            model.lm_head.weight += 1
        with pytest.raises(WrongBaseError, match=CHANGED):
            logits(model, ids(2, 4))
        with pytest.raises(WrongBaseError, match=CHANGED):
            logits(model, ids(2, 1))


def test_a_module_is_replaced(tiny: Tiny, model: Any) -> None:
    """By an equal one, which is served; by another, which is not the base."""
    tokens, names = ids(3, 6), ["one", None, "two"]
    want = logits(model, tokens, delta=names)
    for path in ("model.layers.0.self_attn.q_proj", "lm_head", "model.norm", "model.embed_tokens", "model.layers.1"):
        model.set_submodule(path, copy.deepcopy(tiny.load().get_submodule(path)))
        assert close(logits(model, tokens, delta=names), want), path
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    refused(model, r'delta "one": wrong base LlamaForCausalLM: tensor "model.layers.0.mlp.up_proj.weight" differs')


def test_resized_embeddings(model: Any) -> None:
    model.resize_token_embeddings(104, mean_resizing=False)
    refused(model, r'wrong base LlamaForCausalLM: tensor ".*" has shape \[104, 32\], not \[96, 32\]')


def test_an_adapter_on_top(tiny: Tiny, model: Any) -> None:
    """PEFT puts its own module around a served one, which goes on serving."""
    peft = pytest.importorskip("peft")
    tokens = ids(2, 5)
    want = logits(model, tokens, delta="one")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    with model.delta("one"):
        assert close(logits(wrapped, tokens), want)


def test_without_verification(tiny: Tiny) -> None:
    """What cannot be compared is refused if it was written to, and followed if it was converted."""
    tokens = ids(2, 5)
    model = attach(tiny.load(), tiny.deltas, verify_base=False)
    logits(model, tokens, delta="one")
    model.to(torch.bfloat16)
    want = logits(attach(tiny.load().to(torch.bfloat16), tiny.deltas), tokens, delta="one")
    assert torch.equal(logits(model, tokens, delta="one"), want)
    with torch.no_grad():
        model.lm_head.weight += 1
    refused(model, r'the parameter of tensor "lm_head.weight" was written to, and has no', UsageError)


def test_merged_weights_are_not_a_change(tiny: Tiny, model: Any) -> None:
    want = logits(model, ids(2, 4), delta="two")
    model.deltas.merge("one")
    logits(model, ids(2, 4))
    model.deltas.unmerge()
    assert torch.equal(logits(model, ids(2, 4), delta="two"), want)


def test_an_offloaded_model_is_refused(tiny: Tiny, tmp_path: Any, model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    refused_in_one_line = (
        r'^parameter ".*" is not in memory \(device "meta"\): the model is offloaded, or was never loaded'
    )
    with pytest.raises(UsageError, match=refused_in_one_line):
        attach(accelerate.cpu_offload(tiny.load(), torch.device("cpu")), tiny.deltas, device="cpu")
    with accelerate.init_empty_weights():
        empty = new_model("llama").to("meta")
    with pytest.raises(UsageError, match=refused_in_one_line):
        attach(empty, tiny.deltas)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with model.delta("one"), pytest.raises(UsageError, match=CHANGED + r'parameter ".*" is not in memory'):
        logits(model, ids(2, 4))


def test_a_model_on_another_device_than_the_deltas_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r'^module ".*" lies on cpu, and the deltas on cuda:3; load the model on one'):
        attach(tiny.load(), tiny.deltas, device="cuda:3")


def test_a_model_that_is_cut_in_an_unknown_way_is_refused(tiny: Tiny) -> None:
    """What transformers' ``tp_plan`` cuts is served (``tests/test_parallel.py``); others may cut a model too."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor

    way_out = "load the model whole in each process, without tp_plan, or unpack the delta and load that$"
    model = tiny.load()
    model._tp_size = 2
    plainly = (
        r"^the model is cut over 2 processes, and its parameters do not say how; take transformers 5.17 or later, or "
    )
    with pytest.raises(UsageError, match=plainly + way_out):
        attach(model, tiny.deltas)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = tiny.load()
        head = distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        unknown = '^module "lm_head", a Linear, is cut over processes in a way that deltas cannot follow; '
        with pytest.raises(UsageError, match=unknown + way_out):
            attach(model, tiny.deltas)
    finally:
        distributed.destroy_process_group()


def test_hooks_and_forwards_of_the_caller(tiny: Tiny) -> None:
    """Whatever a caller has set up before sees and returns what it would with the unpacked fine-tune."""
    accelerate = pytest.importorskip("accelerate")

    def prepared(folder: Any = None) -> Any:
        model = tiny.load(folder)
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        layer = model.model.layers[0]
        layer.self_attn.k_proj.register_forward_hook(lambda _module, _args, output: output.clamp(min=0))
        layer.mlp.up_proj.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
        return model

    tokens, names = ids(3, 5), ["one", None, "two"]
    want = [logits(prepared(tiny.unpacked.get(name)), tokens)[row] for row, name in enumerate(names)]
    model = attach(prepared(), tiny.deltas)
    before = {name: dict(module.__dict__) for name, module in prepared().named_modules()}
    for _ in range(3):
        assert close(logits(model, tokens, delta=names), torch.stack(want))
        assert close(logits(model, tokens, delta="one")[:1], want[0][None])
    detach(model)
    assert all(set(module.__dict__) == set(before[name]) for name, module in model.named_modules())


def test_a_forward_of_the_callers_own_is_refused(tiny: Tiny) -> None:
    model = tiny.load()
    inner = model.model.layers[0].mlp.down_proj
    original = inner.forward
    inner.forward = lambda x: original(x + 1)
    refused = r'^module "model.layers.0.mlp.down_proj", a Linear, was given another forward'
    with pytest.raises(UsageError, match=refused):
        attach(model, tiny.deltas)
    assert not hasattr(model, "deltas")
    del inner.forward
    attach(model, {"one": tiny.deltas["one"]})
    for _ in range(3):
        logits(model, ids(2, 3), delta="one")
    model.deltas.add("two", tiny.deltas["two"])


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model, lambda model: model.lm_head])
def test_copies_and_pickles_are_refused(model: Any, part: Any) -> None:
    calls = [copy.deepcopy, pickle.dumps, lambda found: torch.save(found, io.BytesIO())]
    for call in calls:
        with pytest.raises(UsageError, match=r"^a model with deltas attached cannot be copied or pickled; detach"):
            call(part(model))
    detach(model)
    for call in calls:
        call(part(model))


def test_the_watch_ends_with_the_deltas(tiny: Tiny) -> None:
    from torch.nn.modules import module as torch_module

    from deltafmt.runtime.changes import _watches

    def hooks() -> list[list[int]]:
        return [
            list(torch_module._global_module_registration_hooks),
            list(torch_module._global_parameter_registration_hooks),
        ]

    detach(attach(tiny.load(), tiny.deltas))
    gc.collect()
    before, living = hooks(), len(_watches.living())
    model = attach(tiny.load(), tiny.deltas)
    assert len(_watches.living()) == living + 1
    detach(model)
    assert len(_watches.living()) == living
    assert hooks() == before  # compiled code of another model is guarded by them
