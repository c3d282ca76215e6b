"""Experts of an engine: the tokens of a delta get the fine-tune's experts, all others keep the base's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import deltafmt
from deltafmt.methods import DeltaDQ
from deltafmt.vllm import seam
from deltafmt.vllm.base import EngineBase
from deltafmt.vllm.choice import BASE, Choice
from deltafmt.vllm.experts import backend, refusal
from deltafmt.vllm.loading import load_delta
from deltafmt.vllm.served import ServedModel
from fake_vllm import RoutedExperts, classes, config

pytestmark = pytest.mark.usefixtures("classes")
__all__ = ["classes"]

EXPERTS, HIDDEN, INNER, CHOSEN = 4, 32, 48, 2


class Method:
    """Computes all experts in one call, and writes to what it is given, as kernels do."""

    is_monolithic = False

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return the weighted sums."""
        found = weighted(layer.matrices, x.clone(), topk_weights, topk_ids)
        x.zero_()
        return found


def weighted(matrices: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each token's experts, the obvious way."""
    rows = []
    for token, given in enumerate(x):
        total = torch.zeros(HIDDEN)
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            inner = functional.silu(matrices[expert, "w1"] @ given) * (matrices[expert, "w3"] @ given)
            total = total + weight * (matrices[expert, "w2"] @ inner)
        rows.append(total)
    return torch.stack(rows)


class Model(nn.Module):
    """One layer of experts, which takes the matrices of a checkpoint one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = experts = RoutedExperts()
        self.experts.w13_weight = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER, HIDDEN), requires_grad=False)
        self.experts.w2_weight = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER), requires_grad=False)
        experts.quant_method, experts.matrices = Method(), {}
        experts.activation = SimpleNamespace(value="silu")
        experts.apply_router_weight_on_input = False
        experts.local_num_experts = experts.global_num_experts = EXPERTS
        experts.moe_config = SimpleNamespace(has_bias=False, moe_parallel_config=SimpleNamespace(tp_size=1, tp_rank=0))

    def load_weights(self, weights: Any) -> None:
        """Give each matrix to the loader of its stack."""
        for name, loaded in weights:
            _, expert, matrix, _ = name.split(".")
            held = self.experts.w2_weight if matrix == "w2" else self.experts.w13_weight
            given = {"shard_id": matrix, "expert_id": int(expert), "return_success": True}
            assert held.weight_loader(param=held, loaded_weight=loaded[None].unbind()[0], weight_name=name, **given)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """Write a checkpoint, and return its matrices by expert."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return {(int(name.split(".")[1]), name.split(".")[2]): value for name, value in tensors.items()}


def test_the_tokens_of_a_delta_get_the_experts_of_the_fine_tune(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    base = {
        f"experts.{expert}.{matrix}.weight": torch.randn(shape, generator=generator)
        for expert in range(EXPERTS)
        for matrix, shape in shapes.items()
    }
    # One expert stays as it is, and one matrix of another.
    tuned = {
        name: value if name.startswith("experts.1.") or name == "experts.2.w2.weight" else value * 1.2
        for name, value in base.items()
    }
    matrices = checkpoint(tmp_path / "base", base)
    checkpoint(tmp_path / "tuned", tuned)
    path = tmp_path / "x.deltafmt"
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", path, method=DeltaDQ(n=2, m=2, bits=8))
    model = Model()
    served = ServedModel(model, EngineBase(tmp_path / "base").shapes(), Choice(2, torch.device("cpu"), 16), config())
    model.experts.matrices = matrices
    for layer in served.layers.values():
        assert not isinstance(layer, str), layer
        layer.ran = True
    delta = load_delta(str(path), served, EngineBase(tmp_path / "base"))
    served.put(1, delta.parts, delta.tensors)
    served.choice.show([BASE, 1, BASE, 1, 1], [])
    x = torch.randn(5, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(5)])
    weights = torch.rand(5, CHOSEN, generator=generator)
    found = model.experts.quant_method.apply(model.experts, x.clone(), weights, ids)
    plain = weighted(matrices, x, weights, ids)
    changed = {(int(name.split(".")[1]), name.split(".")[2]): value for name, value in tuned.items()}
    expected = weighted(changed, x, weights, ids)
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(found[[1, 3, 4]], expected[[1, 3, 4]], rtol=0.02, atol=0.5)
    assert ((found - expected)[[1, 3, 4]].norm() / (plain - expected)[[1, 3, 4]].norm()) < 0.05
    served.clear(1)
    assert torch.equal(model.experts.quant_method.apply(model.experts, x.clone(), weights, ids), plain)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("local_num_experts", 2, "shared out over processes"),
        ("apply_router_weight_on_input", True, "weigh or shift"),
        ("activation", "swigluoai", "the activation swigluoai"),
    ],
)
def test_experts_that_cannot_be_computed_once_more_are_refused(name: str, value: object, reason: str) -> None:
    layer = Model().experts
    assert refusal(layer, torch.device("cpu")) == ""
    assert "on the CPU alone" in refusal(layer, torch.device("cuda"))
    setattr(layer, name, value)
    assert reason in refusal(layer, torch.device("cpu"))


@pytest.mark.parametrize(
    ("has_triton", "lora", "asked"), [(False, True, False), (True, True, True), (False, False, False)]
)
def test_kernels_of_experts_are_those_without_lora_where_there_is_no_triton(
    has_triton: bool, lora: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "name", lambda *_: has_triton)
    given = SimpleNamespace(is_lora_enabled=lora)
    assert backend(lambda config: config.is_lora_enabled, given) is asked
    assert given.is_lora_enabled is lora
