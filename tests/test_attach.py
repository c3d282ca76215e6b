"""A model with deltas attached computes what each unpacked fine-tune computes, row by row; without, what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import (
    InvalidFileError,
    NoRoomError,
    StorageError,
    UsageError,
    WrongBaseError,
)
from deltafmt.methods import RTN, BitDelta, DeltaDQ
from deltafmt.runtime.eviction import host_bytes
from deltafmt.transformers import attach, detach
from tiny_models import ARCHITECTURES, CAUSAL, Tiny, close, every, generate, ids, logits, made_once, new_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@every(ARCHITECTURES)
def test_each_delta_alone_and_mixed(tiny: Tiny) -> None:
    tokens = ids(6, 7)
    base = tiny.load()
    before = logits(base, tokens)
    tuned = {name: logits(tiny.load(folder), tokens) for name, folder in tiny.unpacked.items()}
    state = {name: value.clone() for name, value in base.state_dict().items()}
    keys = set(base.__dict__)
    model = attach(base, tiny.deltas)
    assert model is base
    assert not any(model.deltas.unchecked.values())
    assert torch.equal(logits(model, tokens), before)
    for name, expected in tuned.items():
        with model.delta(name):
            assert close(logits(model, tokens), expected)
        assert not torch.allclose(expected, before, rtol=0.01)
    names = ["one", None, "two", "two", "base", "one"]
    with model.delta(names):
        mixed = logits(model, tokens)
    for row, name in enumerate(names):
        assert close(mixed[row], tuned.get(name or "base", before)[row]), name
    assert torch.equal(logits(model, tokens), before)
    detach(model)
    assert torch.equal(logits(model, tokens), before)
    assert set(model.__dict__) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@every(ARCHITECTURES)
def test_left_padding_and_masks(tiny: Tiny) -> None:
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    names = ["two", "one", None]
    expected = [
        logits(tiny.load(tiny.unpacked.get(name)), tokens, attention_mask=mask)[row] for row, name in enumerate(names)
    ]
    model = attach(tiny.load(), tiny.deltas)
    with model.delta(names):
        found = logits(model, tokens, attention_mask=mask)
    seen = mask.bool() if found.dim() == 3 else slice(None)
    assert close(found[seen], torch.stack(expected)[seen])


BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    ("tiny", "options"),
    [*((kind, {}) for kind in CAUSAL), ("llama", BEAMS), ("opt", BEAMS), ("qwen2", {"use_cache": False})],
    indirect=["tiny"],
)
def test_generate_gives_each_row_its_own(tiny: Tiny, options: dict[str, Any]) -> None:
    tokens = ids(4, 5, seed=3)
    names = ["one", None, "two", "one"]
    copies = options.get("num_return_sequences", 1)
    expected = [
        generate(tiny.load(tiny.unpacked.get(name)), tokens[row : row + 1], **options) for row, name in enumerate(names)
    ]
    model = attach(tiny.load(), tiny.deltas)
    with model.delta(names):
        found = generate(model, tokens, **options)
    assert torch.equal(found, torch.cat(expected))
    assert len(found) == 4 * copies


def test_prefill_in_chunks(tiny: Tiny) -> None:
    tokens = ids(4, 12)
    names = ["two", None, "one", "one"]
    model = attach(tiny.load(), tiny.deltas)
    with model.delta(names), torch.inference_mode():
        whole = model(input_ids=tokens).logits
        cache, parts = None, []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            step = model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
        assert close(torch.cat(parts, 1), whole)
        assert close(model(input_ids=tokens, logits_to_keep=2).logits, whole[:, -2:])
    with model.delta([name for name in names for _ in range(2)]):
        assert close(logits(model, tokens.repeat_interleave(2, 0)), whole.repeat_interleave(2, 0))


def test_sampled_rows_stand_side_by_side(tiny: Tiny) -> None:
    tokens = ids(2, 5)
    model = attach(tiny.load(), tiny.deltas)
    with model.delta(["one", "two"]):
        found = model.generate(
            tokens, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3, attention_mask=tokens > 0
        )
        once = generate(model, tokens)[:, :11]
    assert torch.equal(found, once.repeat_interleave(3, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(tiny: Tiny, dtype: Any) -> None:
    tokens = ids(4, 6)
    names = ["one", None, "two", "one"]
    expected = [logits(tiny.load(tiny.unpacked.get(n), dtype), tokens)[r].float() for r, n in enumerate(names)]
    model = attach(tiny.load(dtype=dtype), tiny.deltas)
    # Norms are stored whole and need no base; a narrower model no longer has the bits of the others.
    with deltafmt.open(tiny.deltas["one"]) as delta:
        assert set(model.deltas.unchecked["one"]) == {name for name in delta if "norm" not in name}
    with model.delta(names):
        found = logits(model, tokens).float()
    error = torch.linalg.norm(found - torch.stack(expected)) / torch.linalg.norm(found)
    assert error < (0.02 if dtype is torch.bfloat16 else 0.003)


def test_nested_blocks_and_none(tiny: Tiny) -> None:
    tokens = ids(2, 4)
    model = attach(tiny.load(), tiny.deltas)
    base = logits(model, tokens)
    with model.delta("one"):
        one = logits(model, tokens)
        with model.delta("two"):
            two = logits(model, tokens)
            with model.delta(None):
                assert torch.equal(logits(model, tokens), base)
            assert torch.equal(logits(model, tokens), two)
        assert torch.equal(logits(model, tokens), one)
    with pytest.raises(KeyError, match=r"stop"), model.delta("one"):
        raise KeyError("stop")
    assert torch.equal(logits(model, tokens), base)
    assert not torch.equal(one, two)


def test_two_models_are_independent(tiny: Tiny) -> None:
    tokens = ids(2, 4)
    first, second = attach(tiny.load(), tiny.deltas), attach(tiny.load(), tiny.deltas)
    base = logits(first, tokens)
    with first.delta("one"):
        assert torch.equal(logits(second, tokens), base)
        with second.delta("two"):
            assert not torch.equal(logits(first, tokens), logits(second, tokens))


def test_add_and_remove(tiny: Tiny) -> None:
    tokens = ids(2, 4)
    model = attach(tiny.load(), {"one": tiny.deltas["one"]})
    base = logits(model, tokens)
    model.deltas.add("two", tiny.deltas["two"])
    with model.delta("two"):
        two = logits(model, tokens)
        with pytest.raises(UsageError, match=r'^delta "two" is in use$'):
            model.deltas.remove("two")
        with pytest.raises(UsageError, match=r"^cannot detach while deltas are in use$"):
            detach(model)
    model.deltas.remove("two")
    assert model.deltas.names == ["one"]
    with pytest.raises(UsageError, match=r'^there is no delta "two"; known: one$'), model.delta("two"):
        pass
    assert torch.equal(logits(model, tokens), base)
    model.deltas.add("again", tiny.deltas["two"])
    with model.delta(["again", "one"]):
        assert close(logits(model, tokens)[:1], two[:1])


def test_many_deltas_under_a_budget(tiny: Tiny) -> None:
    """More deltas than fit: they come and go, from files and from host memory, and every answer stays right."""
    tokens = ids(1, 5)
    files = {f"{name}{copy}": path for name, path in tiny.deltas.items() for copy in range(3)}
    want = {}
    free = attach(tiny.load(), tiny.deltas)
    for name in tiny.deltas:
        with free.delta(name):
            want[name] = logits(free, tokens)
    size = free.deltas.residency.used
    model = attach(tiny.load(), files, budget=size, host_budget=size)
    for turn in range(12):
        name = list(files)[turn * 5 % 6]
        with model.delta(name):
            assert torch.equal(logits(model, tokens), want[name[:3]])
        assert model.deltas.residency.used <= size
        assert host_bytes(model.deltas.residency._items) <= size
    with pytest.raises(UsageError, match=r"take \d+ bytes together where the budget is"), model.delta(list(files)):
        pass
    with model.delta(["one0", "two1"]), pytest.raises(NoRoomError, match=r'^no room for "one1"'), model.delta("one1"):
        pass
    with pytest.raises(UsageError, match=r'^delta "one" takes \d+ bytes where the budget is 100$'):
        attach(tiny.load(), tiny.deltas, budget=100)


def test_refused_names_and_batches(tiny: Tiny, tmp_path: Path) -> None:
    model = attach(tiny.load(), tiny.deltas)
    with pytest.raises(UsageError, match=r'^there is no delta "code"; known: one, two$'), model.delta("code"):
        pass
    with pytest.raises(UsageError, match=r"^no names of deltas are given$"), model.delta([]):
        pass
    with (
        model.delta(["one", None, "two"]),
        pytest.raises(
            UsageError,
            match=r"^LlamaForCausalLM is given 4 rows and 3 names of deltas; give a name for each row, or one name for",
        ),
    ):
        logits(model, ids(4, 5))
    with pytest.raises(UsageError, match=r'has "delta" already'):
        attach(model, tiny.deltas)
    for name in ("base", ""):
        with pytest.raises(UsageError, match=r"cannot have the name"):
            model.deltas.add(name, tiny.deltas["one"])
    with pytest.raises(UsageError, match=r'^there is a delta "one" already; replace puts'):
        model.deltas.add("one", tiny.deltas["one"])
    with pytest.raises(StorageError, match=r"missing\.deltafmt"):
        model.deltas.add("missing", tmp_path / "missing.deltafmt")
    (tmp_path / "bad").write_bytes(b"not a delta" * 100)
    with pytest.raises(InvalidFileError):
        model.deltas.add("bad", tmp_path / "bad")
    assert model.deltas.names == ["one", "two"]
    detach(model)
    with pytest.raises(UsageError, match=r"^LlamaForCausalLM has no deltas attached$"):
        detach(model)


def test_gradients_are_refused(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    with model.delta("one"):
        assert not model(input_ids=ids(1, 3)).logits.requires_grad
        with torch.enable_grad(), pytest.raises(UsageError, match=r"would compute a gradient"):
            model(input_ids=ids(1, 3))


def test_a_wrong_base_is_named(tiny: Tiny) -> None:
    wrong = tiny.load()
    with torch.no_grad():
        wrong.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    with pytest.raises(
        WrongBaseError,
        match=r'^delta "one": wrong base Llama.*: tensor "model.layers.1.mlp.up_proj.weight" differs .*"base"$',
    ):
        attach(wrong, tiny.deltas)
    assert not hasattr(wrong, "delta")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrong.modules())
    model = attach(wrong, tiny.deltas, verify_base=False)
    with model.delta("one"):
        logits(model, ids(1, 3))


def test_a_base_of_another_shape(tiny: Tiny) -> None:
    with pytest.raises(WrongBaseError, match=r"mlp\.(gate|up|down)_proj.weight\" has shape \[.*\], not \["):
        attach(new_model("llama", intermediate_size=64), tiny.deltas)


def test_a_file_that_changes(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(tiny.deltas["one"].read_bytes())
    model = attach(tiny.load(), {"d": path})
    path.write_bytes(tiny.deltas["two"].read_bytes())
    with pytest.raises(StorageError, match=r'changed since it was attached as "d"'), model.delta("d"):
        pass
    nano = Path(__file__).parent.parent / "examples" / "nano"
    deltafmt.pack(nano / "base", nano / "math", path, force=True)
    with pytest.raises(StorageError, match='changed since it was attached as "d"'), model.delta("d"):
        pass
    path.unlink()
    with pytest.raises(StorageError, match=r"d\.deltafmt"), model.delta("d"):
        pass
    path.write_bytes(tiny.deltas["one"].read_bytes())
    with model.delta("d"):
        logits(model, ids(1, 3))


def test_threads_serve_different_deltas(tiny: Tiny) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tokens = ids(1, 6)
    model = attach(tiny.load(), tiny.deltas)
    want = {None: logits(model, tokens)}
    for name in tiny.deltas:
        with model.delta(name):
            want[name] = logits(model, tokens)

    def serve(name: str | None) -> bool:
        ok = True
        for _ in range(10):
            with model.delta(name):
                ok &= torch.equal(logits(model, tokens), want[name])
        return ok

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(serve, ["one", None, "two"]))
        # A block holds for the work that is submitted in it, although the threads are older.
        with model.delta("one"):
            assert torch.equal(pool.submit(logits, model, tokens).result(), want["one"])
        assert torch.equal(pool.submit(logits, model, tokens).result(), want[None])


def test_prefetch(tiny: Tiny) -> None:
    model = attach(tiny.load(), tiny.deltas)
    assert model.deltas.residency.used == 0
    assert model.deltas.prefetch("two")
    with model.delta("two"):
        assert model.deltas.residency.resident() == ["two"]
    with pytest.raises(UsageError, match=r'^there is no delta "three"; known: one, two$'):
        model.deltas.prefetch("three")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every(ARCHITECTURES)
def test_on_a_gpu(tiny: Tiny) -> None:
    """The kernels in their place, and deltas that come and go while another stream may still read them."""
    tokens = ids(4, 9).cuda()
    names = ["one", None, "two", "one"]
    expected = {name: logits(tiny.load(tiny.unpacked.get(name)).cuda(), tokens) for name in names}
    model = attach(tiny.load().cuda(), tiny.deltas)
    with model.delta(names):
        mixed = logits(model, tokens)
    for row, name in enumerate(names):
        assert torch.linalg.norm(mixed[row] - expected[name][row]) < 1e-4 * torch.linalg.norm(mixed[row])
    room = max(model.deltas._store.nbytes(name) for name in tiny.deltas)
    detach(model)
    attach(model, tiny.deltas, budget=room, host_budget=room)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for turn in range(12):
        name = ("one", "two")[turn % 2]
        with torch.cuda.stream(streams[turn % 3 % 2]), model.delta(name):
            found = logits(model, tokens)
        torch.cuda.synchronize()
        assert torch.linalg.norm(found - expected[name]) < 1e-4 * torch.linalg.norm(found)
        assert model.deltas.residency.used <= room
    before = [parameter.clone() for parameter in model.parameters()]
    unpacked = tiny.load(tiny.unpacked["two"]).cuda()
    model.deltas.merge("two")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unpacked.parameters(), strict=True))
    model.deltas.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_nano_solves_as_unpacked(nano: Path, tmp_path: Path) -> None:
    from solve import accuracy_of, load, read_problems

    deltafmt.pack(nano / "base", nano / "math", tmp_path / "d.deltafmt", method=DeltaDQ(2, 2, 4))
    deltafmt.unpack(nano / "base", tmp_path / "d.deltafmt", tmp_path / "out")
    problems = read_problems(nano / "tokenizer.json", nano / "eval.jsonl", 60)
    expected = accuracy_of(load(tmp_path / "out"), problems)
    model = attach(load(nano / "base"), {"math": tmp_path / "d.deltafmt"})
    assert accuracy_of(model, problems) == 0
    with model.delta("math"):
        assert accuracy_of(model, problems) >= expected - 0.01


@pytest.mark.parametrize("method", [RTN(4), BitDelta("column")], ids=lambda method: method.name)
def test_every_kind_of_term_serves_what_it_unpacks_to(nano: Path, tmp_path: Path, method: Any) -> None:
    from solve import load

    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(nano / "base", nano / "math", delta, method=method)
    deltafmt.unpack(nano / "base", delta, tmp_path / "unpacked")
    tokens = ids(3, 9)
    expected = logits(load(tmp_path / "unpacked"), tokens)
    model = attach(load(nano / "base"), {"math": delta})
    before = logits(model, tokens)
    with model.delta(["math", None, "math"]):
        mixed = logits(model, tokens)
    # The unpacked weights are rounded to bf16.
    assert (mixed - expected)[::2].abs().max() <= 0.02 * expected.abs().max()
    assert close(mixed[1], before[1])
    model.deltas.merge("math")
    assert close(logits(model, tokens), expected)
