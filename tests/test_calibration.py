"""Calibration: the moments of a plain hooked forward pass, block by block, in bounded memory, resumed when killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.calibration import blockwise, run
from deltafmt.calibration.callbacks import CalibrationResult, Moments
from deltafmt.calibration.modules import find_blocks, linear_modules
from deltafmt.calibration.moment_store import MomentStore
from deltafmt.calibration.run import RunOptions, calibrate, calibrate_folder
from deltafmt.errors import InvalidFileError, NonFiniteError, StorageError, UsageError
from tiny_models import ARCHITECTURES, GPT2, KINDS, Sequences, new_model, plainly

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


def sequences(seed: int = 0, lengths: tuple[int, ...] = (12, 7, 12, 30, 7, 12, 16, 40)) -> Sequences:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 96, length) for length in lengths]


def gather(model: Any, texts: Sequences, **options: Any) -> tuple[dict[str, Moments], CalibrationResult]:
    """Calibrate without replacing a weight."""
    found: dict[str, Moments] = {}

    def on_module(name: str, weight_name: str, moments: Moments) -> None:
        assert name not in found
        assert weight_name in dict(model.named_parameters())
        found[name] = moments

    result = calibrate(model, texts, on_module, options=RunOptions(**{"device": "cpu", **options}))
    assert list(found) == result.modules
    return found, result


def agree(found: dict[str, Moments], expected: dict[str, NDArray[np.float64]]) -> None:
    assert set(found) == set(expected)
    for name, moments in found.items():
        assert moments.matrix.dtype == np.float32
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(moments.matrix, expected[name], atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_moments_are_those_of_a_plain_forward_pass(kind: str, batch_tokens: int) -> None:
    model = new_model(kind)
    texts = sequences()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, result = gather(model, texts, batch_tokens=batch_tokens)
    agree(found, plainly(model, texts))
    assert result.blocks == 2, "run block by block"
    assert result.tokens == sum(len(text) for text in texts)
    # What sees every token counts every token; BERT's pooler and head see the first of each sequence.
    first = find_blocks(model)[0] + ".0."
    assert all(found[name].tokens == result.tokens for name in found if name.startswith(first))
    assert all(found[name].axis == (0 if kind == "gpt2" and name != "lm_head" else 1) for name in found)
    assert not any(block.__dict__.get("forward") for block in find_blocks(model)[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_come_in_the_order_in_which_they_are_called() -> None:
    found, result = gather(new_model("llama"), sequences())
    names = [name.rsplit(".", 1)[1] for name in result.modules if ".layers.1." in name]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert result.modules[-1] == "lm_head"
    assert next(iter(found)).startswith("model.layers.0.")


def test_a_tied_head_is_named_by_its_tensor() -> None:
    model = new_model("qwen2")
    names = {name: linear.weight_name for name, linear in linear_modules(model).items()}
    assert names["lm_head"] == "model.embed_tokens.weight"


def test_an_encoder_and_decoder_is_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("t5")
    texts = sequences()
    found, result = gather(model, texts)
    agree(found, plainly(model, texts))
    assert result.blocks == 0
    monkeypatch.setattr("deltafmt.calibration.whole.BUDGET", 3 * 32 * 32 * 4)
    agree(gather(model, texts)[0], plainly(model, texts))


def test_a_model_whose_blocks_are_no_chain_is_run_as_a_whole() -> None:
    model = new_model("llama")
    layer = model.model.layers[1]
    inner = layer.forward
    layer.forward = lambda hidden, **kwargs: inner(hidden * 2, **kwargs)
    texts = sequences()
    found, result = gather(model, texts)
    assert result.blocks == 2  # what a block does by itself does not matter
    agree(found, plainly(model, texts))

    model = new_model("llama")
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    found, result = gather(model, texts)
    assert result.blocks == 0
    agree(found, plainly(model, texts))
    hook.remove()


def test_later_blocks_see_what_replaced_weights_do() -> None:
    texts = sequences()
    model = new_model("llama")
    found: dict[str, Moments] = {}

    def halve(name: str, weight_name: str, moments: Moments) -> Any:
        found[name] = moments
        weight = dict(model.named_parameters())[weight_name].detach()
        return (weight / 2).numpy() if ".layers.0." in name else None

    calibrate(model, texts, halve, options=RunOptions(device="cpu"))
    halved = new_model("llama")
    first = plainly(halved, texts)
    with torch.no_grad():
        for name, linear in linear_modules(halved).items():
            if ".layers.0." in name:
                linear.weight.mul_(0.5)
    later = plainly(halved, texts)
    # The first block was seen as it was, the rest after its replacement.
    agree(found, {name: (first if ".layers.0." in name else later)[name] for name in first})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), halved.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["llama", "opt", "bert"])
def test_one_block_at_a_time_is_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(kind)
    blocks = find_blocks(model)[1]
    there: set[int] = set()
    most = []

    class Moved:
        def __init__(self, block: Any, _device: Any) -> None:
            self.block = block

        def __enter__(self) -> None:
            there.add(id(self.block))
            most.append(len(there))

        def __exit__(self, *_: object) -> None:
            there.discard(id(self.block))

    monkeypatch.setattr(blockwise, "placed", Moved)
    monkeypatch.setattr("deltafmt.calibration.chain_run.placed", Moved)
    real = {id(block): block.forward for block in blocks}

    def watched(block: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert id(block) in there
            return real[id(block)](*args, **kwargs)

        return forward

    for block in blocks:
        block.forward = watched(block)
    gather(model, sequences())
    assert max(most) == 1
    assert len(most) == 2 * len(blocks)  # once when the model is traced


def test_repeated_runs_give_the_same_bits() -> None:
    one, other = (gather(new_model("gemma3"), sequences())[0] for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name].matrix, other[name].matrix)


class KilledError(Exception):
    """Stands for a run that is killed."""


@pytest.mark.parametrize("killed_at", range(0, 18, 3))
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_killed_run_goes_on(kind: str, killed_at: int, tmp_path: Path) -> None:
    texts = sequences()
    expected: dict[str, NDArray[np.float32]] = {}
    kept: dict[str, NDArray[np.float32]] = {}

    def sequential(model: Any, into: dict[str, NDArray[np.float32]], limit: int) -> Callable[..., Any]:
        def on_module(name: str, weight_name: str, moments: Moments) -> Any:
            nonlocal limit
            if limit == 0:
                raise KilledError
            limit -= 1
            into[name] = moments.matrix
            if "layers" not in name:
                return None
            return dict(model.named_parameters())[weight_name].detach() * 0.9

        return on_module

    model = new_model(kind)
    calibrate(model, texts, sequential(model, expected, 1000), options=RunOptions(device="cpu"))
    options = RunOptions(device="cpu", state=tmp_path / "state")
    model = new_model(kind)
    try:
        result = calibrate(model, texts, sequential(model, kept, killed_at), options=options)
    except KilledError:
        model = new_model(kind)
        result = calibrate(model, texts, sequential(model, kept, 1000), options=options)
    if killed_at >= 14:
        assert result.resumed > 0 or killed_at >= len(expected)
    assert set(kept) == set(expected)
    for name, matrix in expected.items():
        np.testing.assert_array_equal(kept[name], matrix, err_msg=name)
    again = calibrate(new_model(kind), texts, sequential(model, kept, 0), options=options)
    assert (again.modules, again.resumed) == ([], 2)


def test_hidden_states_that_went_away_are_missed(tmp_path: Path) -> None:
    def stop(name: str, *_: Any) -> None:
        if ".layers.1." in name:
            raise KilledError

    options = RunOptions(device="cpu", state=tmp_path)
    with pytest.raises(KilledError):
        calibrate(new_model("llama"), sequences(), stop, options=options)
    assert {path.name for path in tmp_path.glob("*.bin")} >= {"hidden-00001.bin"}
    (tmp_path / "hidden-00001.bin").unlink()
    with pytest.raises(UsageError, match=r"hidden-00001\.bin is missing; remove .* to start anew"):
        calibrate(new_model("llama"), sequences(), stop, options=options)


def test_moments_are_stored_and_read_again(tmp_path: Path) -> None:
    found, _ = gather(new_model("gpt2"), sequences())
    store = MomentStore(tmp_path / "moments")
    for name, moments in found.items():
        store.on_module("module", name, moments)
    assert len(list(store.folder.iterdir())) == len(found)
    for name, moments in found.items():
        held = store.load(name)
        # Each sum is symmetric but for the order in which its products were added.
        np.testing.assert_allclose(held.matrix, moments.matrix, atol=1e-5 * np.abs(moments.matrix).max())
        np.testing.assert_array_equal(held.matrix, held.matrix.T)
        assert (held.tokens, held.axis) == (moments.tokens, moments.axis)
    with pytest.raises(UsageError, match='holds no moments of "other"'):
        store.load("other")
    path = store.path(name)
    for content in (b"", b"PK", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(InvalidFileError, match="not the moments of a weight"):
            store.load(name)
    for wrong in (np.zeros(4, np.float32), np.zeros((3, 1), np.float32), np.zeros(3)):
        np.savez(path, matrix=wrong, tokens=1, axis=1)
        with pytest.raises(InvalidFileError, match="not the upper triangle"):
            store.load(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        MomentStore(tmp_path / "file").on_module("module", "a", found[name])


def test_a_state_of_another_job_is_refused(tmp_path: Path) -> None:
    gather(new_model("llama"), sequences(), state=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"calibration.json", "hidden-00002.bin"}
    with pytest.raises(UsageError, match="holds the state of another calibration"):
        gather(new_model("llama"), sequences(1), state=tmp_path)
    with pytest.raises(UsageError, match="holds the state of another calibration"):
        gather(new_model("llama"), sequences(), state=tmp_path, key="other")
    (tmp_path / "calibration.json").write_text("[]")
    with pytest.raises(UsageError, match="is not the note of a calibration"):
        gather(new_model("llama"), sequences(), state=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        gather(new_model("llama"), sequences(), state=tmp_path / "file")


def test_wrong_texts_are_refused() -> None:
    model = new_model("llama")
    with pytest.raises(
        UsageError, match=r"has 20 tokens where at least 48 are needed: \"model.*down_proj\" has 48 col"
    ):
        gather(model, sequences(0, (20,)))
    gather(model, sequences(0, (48,)))
    with pytest.raises(UsageError, match="has 0 tokens where at least 48 are needed"):
        gather(model, [])
    with pytest.raises(UsageError, match="token 96, but the model has 96 tokens"):
        gather(model, [np.full(60, 96)])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_activations_that_are_not_finite_are_named(kind: str) -> None:
    model = new_model(kind)
    with torch.no_grad():
        name, linear = list(linear_modules(model).items())[2]
        linear.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r'the activations that enter "[\w.]+" are not finite'):
        gather(model, sequences())
    assert name


def test_weights_that_do_not_fit_are_refused() -> None:
    for weight, message in ((np.zeros((2, 2)), r"of shape \[2, 2\] does not fit"), (np.nan, "is not finite")):

        def on_module(name: str, weight_name: str, moments: Moments, weight: Any = weight) -> Any:
            return np.full((32, 32), weight, np.float32) if np.isscalar(weight) else weight

        with pytest.raises(UsageError, match=message):
            calibrate(new_model("llama"), sequences(), on_module, options=RunOptions(device="cpu"))


def test_blocks_are_the_outermost_longest_list() -> None:
    model = torch.nn.Module()
    model.short = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
    for layer in model.layers:
        layer.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))
    model.norms = torch.nn.ModuleList(torch.nn.LayerNorm(2) for _ in range(9))
    assert find_blocks(model)[0] == "layers"
    assert find_blocks(torch.nn.Linear(2, 2)) == ("", [])


def test_the_real_model(models: Path, tmp_path: Path) -> None:
    home = models / "wordmath"
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join((home / "eval.jsonl").read_text("utf-8").splitlines()[500:530]))
    from solve import load, read_problems

    found: dict[str, Moments] = {}
    calibrate_folder(
        home / "math",
        text,
        lambda name, _weight, moments: found.__setitem__(name, moments),
        tokenizer=home / "tokenizer.json",
        options=RunOptions(device="cpu"),
    )
    problems = read_problems(home / "tokenizer.json", text)
    agree(found, plainly(load(home / "math"), [np.array(question + answer) for question, answer in problems]))


def test_gpt2_weights_are_not_transposed() -> None:
    model = new_model("gpt2")
    linear = linear_modules(model)["transformer.h.0.mlp.c_fc"]
    assert linear.columns == GPT2["n_embd"]
    assert KINDS["gpt2"][0] == type(model).__name__
    assert run.LENGTH == 2048
