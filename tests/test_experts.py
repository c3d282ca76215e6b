"""Experts, routers and other modules that compute with parameters in a way of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save_file

import deltafmt
import deltafmt.torch
from deltafmt.errors import UsageError
from deltafmt.kernels.products import operand_delta
from deltafmt.methods import RTN, SVD, BitDelta, DeltaDQ
from deltafmt.runtime import expert_matrices
from deltafmt.runtime.expert_matrices import ExpertMatrices, cut_rows
from deltafmt.transformers import attach, detach
from lora_models import new_family, outputs, same, shake
from test_serving_families import made


def generated(model: Any, tokens: Any) -> Any:
    """Continue rows by six tokens."""
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(tokens, do_sample=False, **options)


@pytest.mark.situation("`attach`: the model stacks experts that the delta has one by one, or under older names")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "mamba2", "jamba"])
def test_mixed_rows_generate(tmp_path: Path, name: str) -> None:
    model, _ = made(name, tmp_path)
    tokens = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(2))
    rows = ["two", None, "one"]
    folders = [tmp_path / ("base" if row is None else f"{row}-out") for row in rows]
    want = [generated(type(model).from_pretrained(folder).eval(), tokens)[row] for row, folder in enumerate(folders)]
    with model.delta(rows):
        assert torch.equal(generated(model, tokens), torch.stack(want))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_sums_of_deltas(tmp_path: Path, name: str) -> None:
    """Routers choose by the sum of the deltas, and experts compute with it."""
    model, expected = made(name, tmp_path)
    kind = type(model)
    summed = kind.from_pretrained(tmp_path / "base").eval()
    parts = [kind.from_pretrained(tmp_path / f"{one}-out").state_dict() for one in ("one", "two")]
    with torch.no_grad():
        for key, value in summed.state_dict().items():
            value.add_(0.75 * (parts[0][key] - value) + 0.5 * (parts[1][key] - value))
    want = outputs(summed, name)
    with model.delta({"one": 0.75, "two": 0.5}):
        assert same(outputs(model, name), want)
    with model.delta(["two", {"one": 0.75, "two": 0.5}]):
        assert same(outputs(model, name), torch.stack([expected["two"][0], want[1]]))


def test_a_stack_in_the_file_and_experts_one_by_one(tmp_path: Path) -> None:
    """Deltas of both layouts are served in one batch, and only experts that a token has chosen are decoded."""
    model, expected = made("mixtral", tmp_path)
    stacked = new_family("mixtral").eval()
    shake(stacked, 3, 0.05)
    base = type(model).from_pretrained(tmp_path / "base").state_dict()
    save_file({key: value.contiguous() for key, value in base.items()}, tmp_path / "b.safetensors")
    save_file({key: value.contiguous() for key, value in stacked.state_dict().items()}, tmp_path / "s.safetensors")
    deltafmt.pack(tmp_path / "b.safetensors", tmp_path / "s.safetensors", tmp_path / "s.deltafmt", method=RTN(8))
    model.deltas.add("stack", tmp_path / "s.deltafmt")
    with model.delta("stack"):
        want = outputs(model, "mixtral")
    assert torch.allclose(want, outputs(stacked, "mixtral"), rtol=0.1, atol=0.1)
    with model.delta(["one", "stack"]):
        assert same(outputs(model, "mixtral"), torch.stack([expected["one"][0], want[1]]))


def test_only_chosen_experts_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("gpt_oss", tmp_path)
    decoded: list[int] = []

    def counted(operand: Any, start: int = 0, stop: int | None = None) -> Any:
        decoded.append((operand.rows if stop is None else stop) - start)
        return operand_delta(operand, start, stop)

    monkeypatch.setattr(expert_matrices, "operand_delta", counted)
    with model.delta("one"):
        model(input_ids=torch.tensor([[5]]))
    # One token has two of the four experts in each of two layers, each with two matrices.
    assert len(decoded) == 2 * 2 * 2
    assert max(decoded) < 4 * 32


@pytest.mark.parametrize(
    "method", [RTN(3), RTN(4, scale_group=16), BitDelta("column"), DeltaDQ(2, 8, 4, index="fixed")], ids=repr
)
@pytest.mark.parametrize("rows", [32, 96, 128, 40])
def test_a_stack_is_cut_where_experts_begin(tmp_path: Path, method: Any, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3, rows, 48, generator=generator)
    save_file({"experts.up_proj": base}, tmp_path / "a.safetensors")
    save_file(
        {"experts.up_proj": base + 0.1 * torch.randn(base.shape, generator=generator)}, tmp_path / "b.safetensors"
    )
    deltafmt.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "d", method=method, force=True)
    tensor = deltafmt.torch.load(tmp_path / "d", device="cpu")["experts.up_proj"]
    (operand,) = tensor.terms
    cut = cut_rows(operand, rows)
    if rows % (32 * getattr(operand.layout, "share", 1)) == 0:
        assert cut is not None
        for number, one in enumerate(cut):
            assert torch.equal(operand_delta(one), operand_delta(operand, number * rows, (number + 1) * rows))
    else:
        assert cut is None
    # Whatever was cut, the products are those of the decoded delta.
    matrices = ExpertMatrices("up_proj", base, transposed=False)
    matrices.grow(2)
    matrices.put(1, {"up_proj": tensor})
    x = torch.randn(6, 48, generator=generator)
    experts, slots = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1, -1, 1, 0, 1, -5])
    y = torch.zeros(6, rows)
    matrices.add(y, x, experts, slots, {1})
    change = operand_delta(operand).view(3, rows, 48)
    want = torch.stack(
        [
            x[i] @ change[e].T if s == 1 else y.new_zeros(rows)
            for i, (e, s) in enumerate(zip(experts, slots, strict=True))
        ]
    )
    assert torch.allclose(y, want, atol=1e-5)
    matrices.clear(1)
    matrices.add(y, x, experts, slots, {1})
    assert torch.allclose(y, want, atol=1e-5)


def test_factors_and_seeded_terms_are_not_cut(tmp_path: Path) -> None:
    base = torch.randn(2, 32, 32)
    save_file({"w": base}, tmp_path / "a.safetensors")
    save_file({"w": base + torch.randn(base.shape)}, tmp_path / "b.safetensors")
    for method in (SVD(rank=2), DeltaDQ(2, 8, 4, index="seeded")):
        out = tmp_path / "d"
        deltafmt.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors", out, method=method, force=True)
        assert all(cut_rows(term, 32) is None for term in deltafmt.torch.load(out, device="cpu")["w"].terms)


def changed(model: Any, folder: Path, *names: str) -> Path:
    """Return a delta that changes some tensors of a model."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "base.safetensors")
    for number, name in enumerate(names):
        change = 0.3 * torch.rand(state[name].shape, generator=torch.Generator().manual_seed(number))
        state[name] = state[name] + (change if state[name].is_floating_point() else 3)
    save_file(state, folder / "tuned.safetensors")
    deltafmt.pack(folder / "base.safetensors", folder / "tuned.safetensors", folder / "d", force=True, method=RTN(8))
    deltafmt.unpack(folder / "base.safetensors", folder / "d", folder / "out", force=True)
    return folder / "d"


class Attention(torch.nn.Module):
    """Attention of torch, whose input projection and output module are read and not called."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first)

    def forward(self, inputs_embeds: Any) -> Any:
        """Return the attention of rows to themselves."""
        return self.inner(inputs_embeds, inputs_embeds, inputs_embeds)[0]


def test_attention_of_torch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    names = ("inner.in_proj_weight", "inner.in_proj_bias", "inner.out_proj.weight", "inner.out_proj.bias")
    model = Attention(batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    before = model(x).detach()
    path = changed(model, tmp_path, *names)
    tuned = Attention(batch_first=True).eval()
    tuned.load_state_dict(load_file(next((tmp_path / "out").glob("*.safetensors"))))
    attach(model, {"d": path})
    with model.delta("d"):
        assert same(model(x), tuned(x))
    with model.delta(["d", None, "d"]):
        found = model(x)
    assert same(found, torch.stack([tuned(x)[0], before[1], tuned(x)[2]]))
    assert torch.equal(model(x).detach(), before)
    second = Attention(batch_first=False).eval()
    second.load_state_dict(load_file(tmp_path / "base.safetensors"))
    attach(second, {"d": path})
    with second.delta("d"):
        assert same(second(x.transpose(0, 1)), tuned(x).transpose(0, 1))
    with second.delta(["d", None, "d"]), pytest.raises(UsageError, match="positions before rows"):
        second(torch.randn(3, 3, 16))


def test_changed_buffers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()
    path = changed(model, tmp_path, "1.running_mean", "1.running_var", "1.weight", "1.num_batches_tracked")
    tuned = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()
    tuned.load_state_dict(load_file(next((tmp_path / "out").glob("*.safetensors"))))
    x = torch.randn(2, 8)
    base = model(x).detach()
    attach(model, {"d": path})
    with model.delta("d"):
        assert same(model(x), tuned(x))
    with model.delta([None, "d"]):
        assert same(model(x), torch.stack([base[0], tuned(x)[1]]))
    model.deltas.merge("d")
    assert same(model(x), tuned(x))
    assert model[1].num_batches_tracked == 3
    model.deltas.unmerge()
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model(x).detach(), base)


class Owner(torch.nn.Module):
    """A module with children and a parameter of its own, which may keep what it computes."""

    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.layer = torch.nn.Linear(8, 8)
        self.kept: list[Any] = []
        self.keeps = keeps

    def forward(self, x: Any, state: Any) -> Any:
        """Scale rows, add them to a state and run the inner module."""
        y = x * torch.exp(self.scale)
        state += y.sum(1)
        if self.keeps:
            self.kept.append(y)
        return self.layer(y) * self.scale + torch.zeros_like(y)


class Outer(torch.nn.Module):
    """A model with such a module inside."""

    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.owner = Owner(keeps=keeps)

    def forward(self, inputs_embeds: Any, state: Any) -> Any:
        """Run the module inside."""
        return self.owner(inputs_embeds, state)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_parameter_beside_modules(tmp_path: Path, *, keeps: bool) -> None:
    """Inner modules and a state that is written in place get each row's own values; what is kept is refused."""
    from safetensors.torch import load_file

    model, tuned = Outer(keeps=keeps).eval(), Outer().eval()
    path = changed(model, tmp_path, "owner.scale", "owner.layer.weight")
    tuned.load_state_dict(load_file(next((tmp_path / "out").glob("*.safetensors"))))
    x = torch.randn(3, 4, 8)
    states = [torch.zeros(3, 8) for _ in range(3)]
    with torch.no_grad():
        base, want = model(x, states[0]), tuned(x, states[1])
    attach(model, {"d": path})
    with model.delta(["d", None, "d"]):
        if keeps:
            with pytest.raises(UsageError, match=r"^owner keeps what it made of a delta's parameters"):
                model(x, states[2])
        else:
            assert same(model(x, states[2]), torch.stack([want[0], base[1], want[2]]))
            assert same(states[2], torch.stack([states[1][0], states[0][1], states[1][2]]))
    assert "forward" in model.owner.__dict__
    detach(model)
    assert "forward" not in model.owner.__dict__


def test_normalized_weights_are_refused(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(torch.nn.Conv1d(4, 4, 1))
    model = torch.nn.Sequential(layer)
    with pytest.raises(UsageError, match=r"^0, a Conv1d, keeps copies of its parameters"):
        attach(model, {"d": changed(model, tmp_path, "0.weight_v")})
