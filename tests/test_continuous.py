"""Continuous batching: the tokens of many requests in one row, each request with its delta."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import RTN
from deltafmt.runtime.packed import select
from deltafmt.runtime.row_places import Forms
from deltafmt.transformers import attach, detach
from strategies import examples
from tiny_models import CAUSAL, Tiny, every, generate, ids, made_once, new_model, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

PAGED = [kind for kind in CAUSAL if kind != "opt"]  # transformers' paged cache does not know OPT's heads
LENGTHS = (5, 9, 3, 17, 12, 30)
NAMES = ("one", None, "two", "one", "two", None)


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


def prompt(length: int, seed: int = 0) -> list[int]:
    return ids(1, length, seed=seed)[0].tolist()


PROMPTS = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]

# The name of a page's tokens: transformers 5.18 renamed it.
PAGE_SIZE = "page_size" if hasattr(transformers.ContinuousBatchingConfig, "page_size") else "block_size"


def continued(model: Any, tokens: list[int], **options: Any) -> list[int]:
    """Return the eight tokens that plain ``generate`` gives."""
    return generate(model, torch.tensor([tokens]), **options)[0, len(tokens) :].tolist()


def settings(tokens: int = 20, **options: Any) -> dict[str, Any]:
    """Return small sizes: the longer prompts are read in several steps, beside tokens of other requests."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
    sizes = transformers.ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=tokens, **{PAGE_SIZE: 4})
    return {"generation_config": transformers.GenerationConfig(**options), "continuous_batching_config": sizes}


def batch(model: Any, prompts: list[list[int]], tokens: int = 20, **options: Any) -> list[list[int]]:
    found = model.generate_batch(prompts, **settings(tokens), **options)
    assert [output.error for output in found.values()] == [None] * len(prompts)
    return [list(output.generated_tokens) for output in found.values()]


@pytest.fixture
def managed(tiny: Tiny) -> Iterator[tuple[Any, Any]]:
    """Give a model with deltas and a manager that runs."""
    model = attach(tiny.load(), tiny.deltas)
    manager = model.init_continuous_batching(**settings())
    manager.start()
    yield model, manager
    manager.stop(block=True)
    assert model.deltas._open == 0


def results(manager: Any, count: int) -> dict[str, Any]:
    """Return the last outputs of ``count`` requests."""
    found: dict[str, Any] = {}
    while len(found) < count:
        output = manager.get_result(timeout=60)
        assert output is not None
        if output.is_finished():
            found[output.request_id] = output
    return found


def stream(manager: Any, request_id: str) -> Iterator[Any]:
    """Give the outputs of the only request that runs."""
    while True:
        output = manager.get_result(timeout=60)
        assert output.request_id == request_id
        yield output
        if output.is_finished():
            return


@every(PAGED)
def test_each_request_is_its_fine_tune(tiny: Tiny) -> None:
    """In the steps that read prompts, and in those that only generate; the reference is the unpacked model."""
    tuned = {name: tiny.load(folder) for name, folder in {None: None, **tiny.unpacked}.items()}
    want = [continued(tuned[name], tokens) for name, tokens in zip(NAMES, PROMPTS, strict=True)]
    model = attach(tiny.load(), tiny.deltas)
    assert batch(model, PROMPTS, delta=NAMES) == want
    if tiny.kind == "llama":
        assert batch(model, PROMPTS, 128, delta=NAMES) == want
        with model.delta(list(NAMES)):
            assert batch(model, PROMPTS) == want
    assert model.deltas._open == 0
    detach(model)


def test_one_name_for_all_and_none(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    few = PROMPTS[2:4]
    for name in ("one", "base", {"one": 0.5, "two": -0.5}):
        want = [continued(model, tokens, delta=name) for tokens in few]
        assert batch(model, few, delta=name) == want
        with model.delta(name):
            assert batch(model, few) == want
    assert batch(model, few) == [continued(tiny.load(), tokens) for tokens in few]


def test_requests_of_a_model_with_compiled_layers(tiny: Tiny) -> None:
    few, names = PROMPTS[:3], ("one", None, "two")
    model = attach(tiny.load(), tiny.deltas)
    want = [continued(model, tokens, delta=name) for tokens, name in zip(few, names, strict=True)]
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert batch(model, few, delta=names) == want
    tokens = torch.tensor([few[0]])
    with model.delta("one"):
        for _ in range(2):
            model(tokens)  # in compiled code from here on
    assert batch(model, few, delta=names) == want


@every(["gemma3"])
def test_sums_beside_single_deltas(tiny: Tiny) -> None:
    names = [{"one": 0.5, "two": 0.5}, "one", None, {"two": 2.0}]
    model = attach(tiny.load(), tiny.deltas)
    want = [continued(model, tokens, delta=name) for name, tokens in zip(names, PROMPTS, strict=False)]
    assert batch(model, PROMPTS[:4], delta=names) == want


def test_vocabularies_of_their_own(tmp_path: Path) -> None:
    """A delta with more tokens beside the base, whose requests sample none of them."""
    base = new_model("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(128, mean_resizing=False)
    shake(tuned, 3, 0.05)
    with torch.no_grad():
        tuned.lm_head.weight[96:] *= 20
    tuned.save_pretrained(tmp_path / "large")
    deltafmt.pack(tmp_path / "base", tmp_path / "large", tmp_path / "large.deltafmt", method=RTN(4, scale_group=8))
    deltafmt.unpack(tmp_path / "base", tmp_path / "large.deltafmt", tmp_path / "out")
    unpacked = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompts = [[100, *PROMPTS[0]], PROMPTS[1], PROMPTS[3]]
    want = [continued(model, tokens) for model, tokens in zip((unpacked, base, unpacked), prompts, strict=True)]
    assert max(want[0] + want[2]) >= 96
    model = attach(copy.deepcopy(base), {"large": tmp_path / "large.deltafmt"})
    assert batch(model, prompts, delta=["large", None, "large"]) == want


def test_keys_and_values_are_shared_by_requests_of_one_delta(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the cache that another delta filled would give other tokens, and no block shared none gains."""
    cache = pytest.importorskip("transformers.generation.continuous_batching.cache").PagedAttentionCache
    shared: list[int] = []
    search = cache.search_prefix_match

    def watched(self: Any, request_id: str, tokens: list[int]) -> int:
        shared.append(search(self, request_id, tokens))
        return shared[-1]

    monkeypatch.setattr(cache, "search_prefix_match", watched)
    model = attach(tiny.load(), tiny.deltas)
    half = {"one": 0.5}
    tokens = prompt(24)
    want = {str(name): continued(model, tokens, delta=name) for name in ("one", "two", None, half)}
    assert len(set(map(tuple, want.values()))) == 4
    for turn in range(2):
        for name in ("one", None, "two", half) if turn == 0 else ("one", None):
            assert batch(model, [tokens], delta=name, persistent_manager=True) == [want[str(name)]]
            assert shared.pop() == (20 if turn else 0)
    # Another file under the same name is another delta; the same file under another name is the same.
    model.deltas.remove("one")
    model.deltas.add("one", tiny.deltas["two"])
    assert batch(model, [tokens], delta="one", persistent_manager=True) == [want["two"]]
    assert shared.pop() == 20
    model.deltas.replace("two", tiny.deltas["one"])
    assert batch(model, [tokens], delta="two", persistent_manager=True) == [want["one"]]
    # A merged delta is not the base.
    model.deltas.merge("two")
    merged = continued(model, tokens)
    assert merged != want["None"]
    assert batch(model, [tokens], persistent_manager=True) == [merged]
    model.deltas.unmerge()
    assert batch(model, [tokens], persistent_manager=True) == [want["None"]]
    model.destroy_cached_continuous_batching_manager()


def test_requests_come_and_go(managed: tuple[Any, Any]) -> None:
    model, manager = managed
    names = ["two", "one", None, "two", "one", None]
    want = [continued(model, tokens, delta=name) for name, tokens in zip(names, PROMPTS, strict=True)]
    longest = continued(model, PROMPTS[0], delta="one")
    first = manager.add_request(PROMPTS[0], delta="one", max_new_tokens=24, streaming=True)
    for output in itertools.islice(stream(manager, first), 3):
        assert output.generated_tokens == longest[: len(output.generated_tokens)]
    gone = manager.add_request(PROMPTS[5], delta="two", max_new_tokens=24, request_id="gone")
    others = manager.add_requests(PROMPTS, delta=names)
    with model.delta("two"):
        inside = manager.add_request(PROMPTS[0])
    manager.cancel_request(gone)
    manager.cancel_request("never added")
    found = results(manager, 8)
    assert found[first].generated_tokens[:8] == longest
    assert [found[request].generated_tokens for request in others] == want
    assert found[inside].generated_tokens == want[0]
    assert gone not in found


def test_a_request_keeps_the_version_that_it_began_with(managed: tuple[Any, Any], tiny: Tiny) -> None:
    model, manager = managed
    before, after = (continued(model, PROMPTS[1], delta=name) for name in ("one", "two"))
    assert before != after
    manager.batch_processor.scheduler.block_new_requests = False
    request = manager.add_request(PROMPTS[1], delta="one", streaming=True)
    outputs = stream(manager, request)
    next(outputs)
    with pytest.raises(UsageError, match=r'^delta "one" is in use$'):
        model.deltas.remove("one")
    with pytest.raises(UsageError, match=r"^cannot merge while deltas are in use$"):
        model.deltas.merge("two")
    model.deltas.replace("one", tiny.deltas["two"])
    assert list(outputs)[-1].generated_tokens == before
    later = manager.add_request(PROMPTS[1], delta="one")
    assert results(manager, 1)[later].generated_tokens == after
    model.deltas.remove("one")
    with pytest.raises(UsageError, match=r'^there is no delta "one"; known: two$'):
        manager.add_request(PROMPTS[1], delta="one")


def test_the_base_is_not_merged_under_a_request(managed: tuple[Any, Any]) -> None:
    model, manager = managed
    outputs = stream(manager, manager.add_request(PROMPTS[1], streaming=True))
    next(outputs)
    with pytest.raises(UsageError, match=r"^cannot merge while deltas are in use$"):
        model.deltas.merge("two")
    list(outputs)
    model.deltas.merge("two")
    with pytest.raises(UsageError, match=r'^delta "two" is merged into the base; unmerge it before deltas are served$'):
        manager.add_request(PROMPTS[1], delta="one")
    model.deltas.unmerge()


def test_a_request_fails_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Its delta cannot be read; the other requests end as they would."""
    files = {name: tmp_path / f"{name}.deltafmt" for name in tiny.deltas}
    for name, file in files.items():
        file.write_bytes(tiny.deltas[name].read_bytes())
    model = attach(tiny.load(), files)
    want = [continued(model, tokens, delta="one") for tokens in PROMPTS[:3]]
    files["two"].unlink()
    found = list(model.generate_batch(PROMPTS[:3], delta=["one", "two", "one"], **settings()).values())
    for number, output in enumerate(found):
        if number == 1:
            assert output.error == f"cannot open {files['two']}: no such file or directory"
            assert output.generated_tokens == []
        else:
            assert (output.error, output.generated_tokens) == (None, want[number])
    assert model.deltas._open == 0


def test_more_deltas_than_the_device_has_room_for(tiny: Tiny) -> None:
    """Requests wait until others give room; their order is kept."""
    model = attach(tiny.load(), {**tiny.deltas, "three": tiny.deltas["one"]})
    names = ["one", "two", "three", "two", "one", "three"]
    want = [continued(model, tokens, delta=name) for name, tokens in zip(names, PROMPTS, strict=True)]
    size = max(model.deltas.residency._items[name].size for name in ("one", "two"))
    detach(model)
    model = attach(model, {**tiny.deltas, "three": tiny.deltas["one"]}, budget=size)
    assert batch(model, PROMPTS, delta=names) == want
    with model.delta("one"):
        manager = model.init_continuous_batching(**settings())
        manager.start()
        waits = manager.add_request(PROMPTS[0], delta="two")
        assert manager.get_result(timeout=0.3) is None
        gone = manager.add_request(PROMPTS[1], delta="two")
        manager.cancel_request(gone)
    assert list(results(manager, 1)) == [waits]
    manager.stop(block=True)
    assert model.deltas._open == 0


def test_several_samples_of_a_request(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    want = [continued(model, tokens, delta=name) for name, tokens in zip(NAMES, PROMPTS, strict=True)]
    found = model.generate_batch(PROMPTS, delta=NAMES, **settings(num_return_sequences=2, do_sample=True, top_k=1))
    assert len(found) in (6, 12)  # older transformers return the first samples alone
    for request, output in found.items():
        number = int(request.removeprefix("req_").partition("__")[0])
        assert (output.error, output.generated_tokens) == (None, want[number])
    assert model.deltas._open == 0


def test_a_model_that_is_no_longer_the_base(managed: tuple[Any, Any]) -> None:
    model, manager = managed
    want = continued(model, PROMPTS[0], delta="one")
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    failed = manager.add_request(PROMPTS[0], delta="one")
    assert results(manager, 1)[failed].error.startswith("the model has changed since deltas were attached: ")
    with torch.no_grad():
        weight.copy_(before)
    again = manager.add_request(PROMPTS[0], delta="one")
    assert results(manager, 1)[again].generated_tokens == want


def test_what_is_refused(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    refused = r"generate_batch is given 6 rows and 2 names of deltas; give a name for each row, or one name for all"
    with pytest.raises(UsageError, match=refused):
        batch(model, PROMPTS, delta=["one", "two"])
    with model.delta(["one", "two"]), pytest.raises(UsageError, match=refused):
        batch(model, PROMPTS)
    with pytest.raises(UsageError, match=r'^there is no delta "three"; known: one, two$'):
        batch(model, PROMPTS, delta="three")
    with pytest.raises(
        UsageError, match=r"takes a delta for each request: manager\.add_request\(\.\.\., delta=\.\.\.\)$"
    ):
        model.init_continuous_batching(delta="one")
    options = settings()
    options["continuous_batching_config"].use_cuda_graph = True
    with pytest.raises(UsageError, match=r"asynchronous batching; leave out use_cuda_graph$"):
        model.generate_batch(PROMPTS, delta="one", **options)
    manager = model.init_continuous_batching(**settings())
    with pytest.raises(UsageError, match=r"^add_request is given 1 rows and 2 names"):
        manager.add_request(PROMPTS[0], delta=["one", "two"])
    manager.add_request(PROMPTS[0], delta="one", request_id="mine")
    with pytest.raises(UsageError, match=r'^there is a request "mine" already'):
        manager.add_request(PROMPTS[0], delta="two", request_id="mine")
    batch(model, PROMPTS[:1], persistent_manager=True)
    with pytest.raises(UsageError, match=r"was made for the base alone; call model\.destroy_cached"):
        batch(model, PROMPTS[:1], delta="one")
    model.destroy_cached_continuous_batching_manager()
    detach(model)
    with pytest.raises(UsageError, match=r"^add_request names a delta, and the deltas were detached"):
        manager.add_request(PROMPTS[0], delta="one")


TERMS = st.sampled_from([(), ((0, 1.0),), ((1, 1.0),), ((0, 0.5), (2, 0.5)), ((2, 2.0),)])


@examples(60)
@given(requests=st.lists(st.tuples(TERMS, st.integers(1, 5)), min_size=1, max_size=8), each=st.integers(1, 3))
def test_a_packed_selection_is_the_selection_of_its_tokens(requests: Any, each: int) -> None:
    """The reference names a slot for every token."""
    terms, lengths = zip(*requests, strict=True)
    found = select(terms, lengths, 4, torch.device("cpu"))
    tokens = [one for one, length in requests for _ in range(length * each)]
    alone = [one[0][0] if len(one) == 1 and one[0][1] == 1 else -1 for one in tokens]
    assert found.packed == (len(set(terms)) > 1)
    assert found.used == set(alone) - {-1}
    assert {one for one in terms if one and (len(one) > 1 or one[0][1] != 1)} == set(found.mixes.values())
    alike = torch.empty(1, sum(lengths), each, 3)
    order = found.order(None, 0, alike, alike.shape[:-1], "it")
    assert order is not None
    segments = order.segments()
    assert segments.slots.tolist() == alone
    assert segments.lengths() == {slot: alone.count(slot) for slot in set(alone) - {-1}}
    numbers = {terms: mix for mix, terms in found.mixes.items()}
    numbers |= {one: one[0][0] for one in terms if one and one not in numbers}
    for one in set(terms) - {()}:
        members = order.members(numbers[one])
        assert torch.arange(len(tokens))[members].tolist() == [n for n, other in enumerate(tokens) if other == one]
    if found.packed:
        kinds = [(), *numbers]
        places = order.numbers([-1, *numbers.values()])
        assert [kinds[place] for place in places.tolist()] == tokens


def test_the_tokens_of_a_packed_batch_are_told_by_their_form_alone() -> None:
    """Heads that are as many as the tokens, and experts that are given as many rows as there are tokens."""
    found = select([((0, 1.0),), ()], [2, 1], 4, torch.device("cpu"))

    def dim(tensor: Any) -> int:
        order = found.order(None, 0, tensor, tensor.shape[:-1], "it")
        assert order is not None
        assert order.line.tolist() == [0, 0, -1]
        return order.dim

    x = torch.randn(1, 3, 8)
    assert dim(x) == 1
    assert dim(x.view(3, 8)) == dim(x[0]) == 0
    for heads in (2, 3):
        split = torch.randn(1, 3, heads, 4)
        assert dim(split) == 1
        assert dim(split.transpose(1, 2)) == 2
    for other in (x[0][torch.tensor([2, 0, 1])], x.transpose(1, 2), x.view(6, 4), torch.randn(3, 8), x.expand(3, 3, 8)):
        with pytest.raises(UsageError, match=r"^it is given the shape .*cannot be told apart by the batch's rows"):
            dim(other)
    with pytest.raises(UsageError, match=r"given a batch of the shape \[1, 4\] where the requests have 3 tokens$"):
        found.begin(Forms(), "it", {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, None, "Llama")
