"""Every kind of module that deltas are attached to: siblings, encoders and decoders; and modules that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import RTN, DeltaDQ
from deltafmt.transformers import attach, detach
from played import play
from tiny_models import Tiny, every, generate, ids, logits, made_once, make_tiny, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made_once(request, tmp_path_factory)


@pytest.mark.parametrize("routine", [False, True], ids=["decided", "routine"])
@pytest.mark.parametrize("names", ["one", ["one", None, "two"]], ids=["same", "mixed"])
@every(["llama", "qwen2"])
def test_siblings_share_a_launch(tiny: Tiny, names: Any, routine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and not, outputs are the same, bit for bit; the second forward needs fewer launches."""
    from deltafmt.kernels.products import matmul_
    from deltafmt.runtime import product_group, sites

    played = play(monkeypatch) if routine else None
    launches: list[int] = []

    def counted(outputs: Any, *arguments: Any) -> None:
        launches.append(len(outputs))
        matmul_(outputs, *arguments)

    monkeypatch.setattr(sites, "matmul_", counted)
    monkeypatch.setattr(product_group, "matmul_", counted)
    tokens = ids(3, 5)
    apart = attach(tiny.load(), tiny.deltas, fuse=False)
    with apart.delta(names):
        want = logits(apart, tokens)
    alone = list(launches)
    assert set(alone) == {1}
    model = attach(tiny.load(), tiny.deltas)
    before = logits(model, tokens)
    for turn in range(4):
        launches.clear()
        with model.delta(names):
            assert torch.equal(logits(model, tokens), want)
            assert torch.equal(logits(model, tokens), want)
        if turn:
            # Of seven products in each of the two layers, q, k and v are one, gate and up another.
            assert launches.count(3) == launches.count(2) == 4
            assert len(launches) == 2 * (len(alone) - 2 * 3)
        if turn and played is not None:
            assert played.made
    assert torch.equal(logits(model, tokens), before)
    model.deltas.remove("two")
    with model.delta("one"):
        logits(model, tokens)
    detach(model)
    assert torch.equal(logits(model, tokens), before)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("routine", [False, True], ids=["decided", "routine"])
def test_siblings_that_are_called_otherwise(tiny: Tiny, routine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that gets another tensor than its siblings, or the same one after a change, computes for itself."""
    if routine:
        play(monkeypatch)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (torch.nn.Linear(32, rows) for rows in (16, 24, 16))
            self.way = "same"

        def forward(self, x: Any) -> Any:
            first = self.a(x)
            if self.way == "changed":
                x += 1
            if self.way == "other":
                x = x + 1
            second = torch.zeros(*x.shape[:-1], 24) if self.way == "skipped" else self.b(x)
            if self.way == "twice":
                second = second + self.b(x)
            if self.way == "named":
                second = second + self.b(input=x)
            return torch.cat([first, second, self.c(x)], -1)

    folder = tiny.base.parent / "block"
    folder.mkdir(exist_ok=True)
    from safetensors.torch import save_file

    tuned = Block()
    save_file(Block().state_dict(), folder / "base.safetensors")
    shake(tuned, 3, 0.1)
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    path = folder / "d.deltafmt"
    deltafmt.pack(folder / "base.safetensors", folder / "tuned.safetensors", path, method=DeltaDQ(2, 8, 4), force=True)
    fused, apart = attach(Block(), {"d": path}), attach(Block(), {"d": path}, fuse=False)
    x = torch.randn(2, 3, 32)
    for mode in (torch.no_grad, torch.inference_mode):
        for way in ("same", "same", "changed", "other", "skipped", "twice", "named", "same"):
            fused.way = apart.way = way
            with mode(), fused.delta("d"), apart.delta("d"):
                for _ in range(3):
                    assert torch.equal(fused(x.clone()), apart(x.clone())), way
    detach(fused)
    detach(apart)
    fused.way = "same"
    assert torch.equal(fused(x), Block()(x))


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """T5, whose table of relative positions is looked up once for all rows of the batch."""
    t5 = make_tiny("t5", tmp_path / "t5")
    tokens = ids(3, 5)
    model = attach(t5.load(), t5.deltas)
    want = {name: generate(t5.load(folder), tokens) for name, folder in {**t5.unpacked, None: t5.base}.items()}
    with model.delta("one"):
        assert torch.equal(generate(model, tokens), want["one"])
    names = ["one", "two", None]
    with model.delta(names):
        found = generate(model, tokens)
    assert torch.equal(found, torch.stack([want[name][row] for row, name in enumerate(names)]))


def test_modules_that_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def delta(model: Any, name: str) -> Path:
        shake(model, 1, 1)
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        tuned = {key: value.clone() for key, value in model.state_dict().items()}
        tuned[name] += 0.1
        save_file(tuned, tmp_path / "tuned.safetensors")
        deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", force=True)
        return tmp_path / "d"

    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(8))
    model = attach(norm, {"d": delta(norm, "0.running_mean")})
    with model.delta("d"), pytest.raises(UsageError, match=r"^0 is in training mode, and would write to a delta's"):
        model(torch.randn(2, 8))
    recurrent = torch.nn.Sequential(torch.nn.LSTM(8, 8))
    with pytest.raises(UsageError, match=r"^0, a LSTM, keeps copies of its parameters, and cannot be served"):
        attach(recurrent, {"d": delta(recurrent, "0.weight_hh_l0")})

    class Owner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8))
            self.layer = torch.nn.Linear(8, 8)

    with pytest.raises(UsageError, match=r'^tensor "scale" belongs to Owner itself, not to a module inside'):
        attach(owner := Owner(), {"d": delta(owner, "scale")})
    resized = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    save_file({"0.weight": torch.randn(9, 8)}, tmp_path / "tuned.safetensors")
    save_file(resized.state_dict(), tmp_path / "base.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", force=True)
    with pytest.raises(UsageError, match=r'^tensor "0.weight" is \[9, 8\] where Sequential has \[8, 8\]; only embed'):
        attach(resized, {"d": tmp_path / "d"})


@pytest.mark.situation("`attach`: the model keeps in one tensor what the delta has in several")
def test_fused_matrices_are_refused(tmp_path: Path) -> None:
    """A linear module holds q, k and v in one matrix, and the delta has each for itself."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = torch.nn.Linear(8, 24, bias=False)

    for number, name in enumerate(("base", "tuned")):
        torch.manual_seed(number)
        save_file({f"{part}_proj.weight": torch.randn(8, 8) for part in "qkv"}, tmp_path / f"{name}.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", force=True)
    with pytest.raises(UsageError, match=r"^Attention keeps tensor .*_proj.* stacked or fused") as caught:
        attach(Attention(), {"d": tmp_path / "d"})
    assert "ignore" not in str(caught.value)


def test_rows_that_stand_elsewhere(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    class Shuffled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8, bias=False)
            self.spare = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: Any) -> Any:
            return self.layer(x.transpose(0, 1)[:3])

    model = Shuffled()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    shake(model, 0, 0.1)
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d")
    model = attach(model, {"d": tmp_path / "d"}, verify_base=False)
    with model.delta("d"):
        model(torch.randn(2, 5, 8))
    # What a delta changes and the model did not run.
    assert model.deltas.unused() == ["spare"]
    # The rows are followed to the dimension in which they stand.
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        want = torch.stack([model(x, delta="d")[:, 0], model(x)[:, 1]], 1)
        for _ in range(2):
            assert torch.allclose(model(x, delta=["d", None]), want, atol=1e-6)


@pytest.mark.parametrize("names", ["one", ["one", None]], ids=["same", "mixed"])
def test_a_parameter_that_is_none(names: Any, tmp_path: Path) -> None:
    """A norm without a bias keeps the name of the bias, which its forward pass reads."""
    torch.manual_seed(0)
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.LayerNorm(32, bias=False)) for _ in "ab")
    with torch.no_grad():
        tuned.load_state_dict({name: tensor + 0.01 for name, tensor in base.state_dict().items()})
    for name, model in (("base", base), ("one", tuned)):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    deltafmt.pack(tmp_path / "base", tmp_path / "one", tmp_path / "one.deltafmt", method=RTN(8))
    deltafmt.unpack(tmp_path / "base", tmp_path / "one.deltafmt", tmp_path / "out")
    x = torch.randn(2, 3, 32)
    model = attach(base, {"one": tmp_path / "one.deltafmt"})
    plain = model(x)
    tuned.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    with model.delta(names):
        found = model(x)
    wanted = tuned(x)
    if names != "one":
        wanted = torch.cat([wanted[:1], plain[1:]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_parametrized_module(tmp_path: Path) -> None:
    """A convolution under ``weight_norm``, as wav2vec 2.0 has, is served with the parts of its weight."""
    from torch.nn.utils.parametrizations import weight_norm

    torch.manual_seed(0)
    base, tuned = (torch.nn.Sequential(weight_norm(torch.nn.Conv1d(8, 8, 3), dim=2)) for _ in "ab")
    for name, model in (("base", base), ("one", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "one.safetensors", tmp_path / "d", exclude=["*"])
    x = torch.randn(2, 8, 5)
    model = attach(base, {"one": tmp_path / "d"})
    with model.delta("one"):
        assert torch.allclose(model(x), tuned(x), atol=1e-6)
    with model.delta(["one", None]), pytest.raises(UsageError, match="serves one delta at a time"):
        model(x)
