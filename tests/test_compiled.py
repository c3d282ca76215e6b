"""Models with deltas in code that torch.compile makes: the same code serves every choice of deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import DeltaDQ
from deltafmt.runtime import frames, operations
from deltafmt.runtime.compiled_state import CompiledState
from deltafmt.runtime.served_linear import ServedLinear
from deltafmt.runtime.served_modules import ServedModules
from deltafmt.transformers import attach, detach
from tiny_models import Tiny, close, generate, ids, logits, made_once, shake

pytestmark = pytest.mark.filterwarnings("default")  # torch's and transformers' own

MIXTURES: list[Any] = [
    ["one", None, "two", "one"],
    "two",
    None,
    ["two", "two", None, None],
    "one",
    [None, "one", "one", "two"],
]


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import torch._dynamo.utils

    torch._dynamo.reset()
    counters().clear()
    return made_once(request, tmp_path_factory)


def counters() -> Any:
    """Return what torch counts of its compiler's work."""
    return torch._dynamo.utils.counters


def expected(tiny: Tiny, tokens: Any) -> dict[Any, Any]:
    """Return the logits of the base and of the unpacked fine-tunes."""
    found = {name: logits(tiny.load(folder), tokens) for name, folder in tiny.unpacked.items()}
    return {**found, None: logits(tiny.load(), tokens)}


def check(found: Any, want: dict[Any, Any], names: Any, same: Any = close) -> None:
    """Compare each row with what the row's fine-tune gives."""
    for row in range(len(found)):
        assert same(found[row], want[names[row] if isinstance(names, list) else names][row]), (names, row)


def test_one_compiled_model_serves_every_mixture(tiny: Tiny) -> None:
    """Deltas that are added, replaced, removed and evicted need no other code."""
    tokens = ids(4, 3)
    want = expected(tiny, tokens)
    model = attach(tiny.load(), tiny.deltas)
    compiled = torch.compile(model, backend="aot_eager")
    with model.delta(MIXTURES[0]):
        logits(compiled, tokens)  # looks for reads of weights, and runs as it is
    with model.delta("one"):
        logits(compiled, tokens)
    counters().clear()
    for names in MIXTURES:
        with model.delta(names):
            check(logits(compiled, tokens), want, names)
        model.deltas.replace("two", tiny.deltas["two"])
    model.deltas.remove("one")
    with model.delta(["two", None, None, "two"]):
        check(logits(compiled, tokens), want, ["two", None, None, "two"])
    model.deltas.add("one", tiny.deltas["two"])
    with model.delta("one"):
        check(logits(compiled, tokens), want, "two")
    assert counters()["stats"]["unique_graphs"] == 1
    assert not counters()["unimplemented"]
    with model.delta([{"two": 0.5}, None, "two", None]):  # a sum of deltas runs as it is
        found = logits(compiled, tokens)
        assert close(found[1:], torch.stack([want[None][1], want["two"][2], want[None][3]]))
        assert not close(found[0], want["two"][0])
    assert counters()["stats"]["unique_graphs"] == 1
    detach(model)
    check(logits(compiled, tokens), want, None)


def test_a_model_that_was_compiled_before(tiny: Tiny) -> None:
    tokens = ids(4, 3)
    want = expected(tiny, tokens)
    model = tiny.load()
    compiled = torch.compile(model, backend="eager")
    check(logits(compiled, tokens), want, None)
    attach(model, {})
    model.deltas.add("one", tiny.deltas["one"])
    for names in ("one", [None, "one", None, None]):
        for _ in range(2):  # the first call of a kind runs as it is
            with model.delta(names):
                check(logits(compiled, tokens), want, names)


def test_generate_with_a_static_cache_compiles_once(tiny: Tiny) -> None:
    tokens = ids(4, 5)
    options = transformers.CompileConfig(backend="eager", mode=None)
    options._compile_all_devices = True
    want = {name: generate(tiny.load(folder), tokens) for name, folder in tiny.unpacked.items()}
    want[None] = generate(tiny.load(), tokens)
    model = attach(tiny.load(), tiny.deltas)
    counters().clear()
    for names in MIXTURES:
        found = generate(model, tokens, delta=names, cache_implementation="static", compile_config=options)
        check(found, want, names, torch.equal)
    assert counters()["stats"]["unique_graphs"] == 1


def test_decoder_layers_are_whole_graphs(tiny: Tiny) -> None:
    """One code for all layers, whatever they serve; called by itself, a layer serves its block's one delta."""
    tokens = ids(4, 3)
    want = expected(tiny, tokens)
    model = attach(tiny.load(), tiny.deltas)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    for names in MIXTURES:
        with model.delta(names):
            for _ in range(2):
                check(logits(model, tokens, use_cache=False), want, names)
    assert counters()["stats"]["unique_graphs"] == 1
    layer, x = model.model.layers[0], torch.randn(4, 3, 32)
    place = model.model.rotary_emb(x, torch.arange(3)[None])
    for names in MIXTURES:
        with model.delta(names):
            if isinstance(names, list):  # only the model knows the rows
                with pytest.raises(UsageError, match="is called outside of its model"):
                    layer(x, position_embeddings=place)
                continue
            found = layer(x, position_embeddings=place)
            assert close(found, type(layer).forward(layer, x, position_embeddings=place))
    with model.delta({"one": 0.5}), pytest.raises(UsageError, match="no sums"):
        layer(x, position_embeddings=place)


class Pair(torch.nn.Module):
    """Modules that share their input, unless it is written to in between."""

    def __init__(self, kind: Any = torch.nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = kind(32, 16), kind(32, 24)
        self.way = "same"

    def forward(self, x: Any) -> Any:
        """Call both."""
        first = self.a(x)
        if "broken" in self.way:
            torch._dynamo.graph_break()
        if "changed" in self.way:
            x += 1
        return torch.cat([first, self.b(x + 1 if self.way == "other" else x)], -1)


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_a_compiled_layer_knows_the_rows_in_the_first_call(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What a captured graph reads must be there before the graph, which owns what is made while it is captured."""
    tokens = ids(4, 3)
    want = expected(tiny, tokens)
    model = attach(tiny.load(), tiny.deltas)
    with model.delta("two"):
        logits(model, tokens)  # looks for reads of weights, and runs as it is
    layers = model.model.layers
    if how == "compile":
        layers[0].compile(backend="aot_eager")
    else:
        layers[0] = torch.compile(layers[0], backend="aot_eager")
    begun = []
    begin = CompiledState.begin
    monkeypatch.setattr(CompiledState, "begin", lambda *given: (begun.append(given[1]), begin(*given)))
    with model.delta("one"):
        check(logits(model, tokens), want, "one")
    assert len(begun) == 1
    check(logits(model, tokens), want, None)
    assert len(begun) == 2


class OwnLinear(torch.nn.Linear):
    """A class that served modules keep."""


@pytest.mark.parametrize("kind", [torch.nn.Linear, OwnLinear])
def test_siblings_are_given_the_same_input_or_compute_alone(kind: Any, tmp_path: Path) -> None:
    save_file(Pair().state_dict(), tmp_path / "base.safetensors")
    tuned = Pair()
    shake(tuned, 3, 0.1)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    method = DeltaDQ(2, 8, 4)
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", method=method)
    torch._dynamo.reset()
    model, apart = attach(Pair(kind), {"d": tmp_path / "d"}), attach(Pair(kind), {"d": tmp_path / "d"}, fuse=False)
    x = torch.randn(2, 3, 32)
    for mode in (torch.no_grad, torch.inference_mode):
        for way in ("same", "other", "same"):
            model.way = apart.way = way
            with mode(), model.delta("d"), apart.delta("d"):
                model(x), model(x)
                assert close(torch.compile(model, backend="eager")(x), apart(x)), way
    for way in ("broken", "broken and changed", "broken"):  # one graph does not know what the other was given
        model.way = apart.way = way
        with torch.no_grad(), model.delta("d"), apart.delta("d"):
            compiled = torch.compile(model, backend="eager")
            for _ in range(3):
                assert close(compiled(x.clone()), apart(x.clone())), way
    model.way = "changed"
    with model.delta("d"), pytest.raises(Exception, match="attach the deltas with fuse=False to compile"):
        torch.compile(model, backend="eager")(x.clone())


class Attention(torch.nn.Module):
    """Three modules that share their input, and one that has its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(32, 32, bias=False))

    def forward(self, x: Any) -> Any:
        """Call all."""
        return self.o_proj(self.q_proj(x).sigmoid() * self.k_proj(x).tanh() + self.v_proj(x))


class Stack(torch.nn.Sequential):
    """Layers of such modules, compiled as one."""

    def __init__(self) -> None:
        super().__init__(*(Attention() for _ in range(8)))

    def forward(self, x: Any) -> Any:
        """Call all."""
        for layer in self:
            x = x + layer(x)
        return x


def guards_of(compiled: Any) -> int:
    """Return how many things the code of a compiled function checks before it runs."""

    def count(manager: Any) -> int:
        pairs = manager.get_key_value_managers().values() if hasattr(manager, "get_key_value_managers") else ()
        below = [*manager.get_child_managers(), *(one for pair in pairs for one in pair if one is not None)]
        return 1 + len(manager.get_leaf_guards()) + sum(map(count, below))

    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(compiled.__code__)
    (entry,) = [entry for entry in entries if entry.guard_manager.root is not None]
    return count(entry.guard_manager.root)


def test_compiled_code_checks_hardly_more_than_that_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the groups that a GPU has."""
    save_file(Stack().state_dict(), tmp_path / "base.safetensors")
    tuned = Stack()
    shake(tuned, 3, 0.1)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    method = DeltaDQ(2, 8, 4)
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", method=method)

    def group(served: ServedModules, sites: list[Any]) -> None:
        for number in range(8):
            found = {site.name: site for site in sites}
            served._make_group([found[f"{number}.{name}_proj"] for name in "qkv"])
            served._make_group([found[f"{number}.o_proj"]])

    monkeypatch.setattr(ServedModules, "_group_known", group)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        torch._dynamo.reset()
        base = Stack()
        want = torch.compile(base, backend="aot_eager")(x)
        guards = guards_of(Stack.forward)
        torch._dynamo.reset()
        model = attach(Stack(), {"d": tmp_path / "d"})
        assert {type(module).__name__ for module in model[3].children()} == {"Linear"}
        assert not any(type(module) is torch.nn.Linear for module in model[3].children())
        compiled = torch.compile(model, backend="aot_eager")
        for names in ("d", None, ["d", None], "d"):
            with model.delta(names):
                found = model(x)
                assert close(compiled(x), found)
                assert torch.equal(found[1], want[1]) == (names is None or names == ["d", None])
        assert guards_of(Stack.forward) <= 1.25 * guards
        kept = model[3].q_proj.forward  # as a library keeps it that puts another one there, and later puts it back
        detach(model)
        assert {type(module) for module in model[3].children()} == {torch.nn.Linear}
        assert torch.equal(kept(x), base[3].q_proj(x))


def test_modules_that_keep_their_class() -> None:
    """Those whose weight cannot stand for them, and those that do not compute what their class does."""
    one, two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    assert ServedLinear.takes([one, two])
    tied, bound, own = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), type("Own", (torch.nn.Linear,), {})(4, 4)
    tied.weight = one.weight
    bound.forward = one.forward
    for other in (tied, bound, own, torch.nn.Linear(4, 4, device="meta"), torch.nn.Linear(0, 4)):
        assert not ServedLinear.takes([one, other])
    members = [Operation(), Operation()]
    classes = ServedLinear([one, two], members, Operation())
    assert not ServedLinear.takes([one])
    assert not ServedLinear.takes([tied])
    two.__class__ = type(own)  # a caller's
    classes.close()
    assert (type(one), type(two)) == (torch.nn.Linear, type(own))
    assert ServedLinear.takes([tied])


class Operation:
    """What a key may stand for."""

    def multiply(self, outputs: Any, given: Any) -> None:
        """Add nothing."""


def test_code_of_deltas_that_are_gone_is_refused() -> None:
    with pytest.raises(UsageError, match="no longer attached"):
        operations.multiply_([torch.zeros(1, 1)], torch.zeros(1, 1), torch.zeros(1))


def test_a_gradient_is_refused_as_without_a_compiler(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    model.model.layers[0].compile(backend="eager")
    x = model.model.embed_tokens.weight[None, :3]
    place = model.model.rotary_emb(x, ids(1, 3))
    with model.delta("one"), torch.enable_grad(), pytest.raises(UsageError, match="would compute a gradient"):
        model.model.layers[0](x, position_embeddings=place)


def test_exports_are_refused_by_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.6 says no more than that it compiles."""
    monkeypatch.delattr(torch.compiler, "is_exporting")
    frames.refuse_recording(True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UsageError, match=r"recorded by torch\.export"):
        frames.refuse_recording(True)


def test_calls_that_overlap_leave_the_compiler_as_it_was() -> None:
    """The first calls of two threads end in the order in which they began."""
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    one, two = frames.uncompiled(), frames.uncompiled()
    for step in (one.__enter__, two.__enter__):
        step()
        assert eval_frame._stance.stance == "force_eager"
    one.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    two.__exit__(None, None, None)
    assert eval_frame._stance == before
