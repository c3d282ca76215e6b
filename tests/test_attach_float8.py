"""FP8 models: what transformers makes of a checkpoint is what deltas are taken from, and FP8 modules are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import deltafmt
from conftest import Tensors, read_folder, write_folder
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.methods import RTN
from deltafmt.transformers import attach
from fp8_files import FORMS, fp8, is_projection, with_settings
from situations import situation
from tiny_models import ids, logits, new_model, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

FORM = FORMS["transformers"]


class Pair(NamedTuple):
    """Folders of a base in FP8 and in BF16, and of an FP8 fine-tune; the values; the delta; the unpacked folder."""

    base: Path
    plain: Path
    finetuned: Path
    values: Tensors
    delta: Path
    unpacked: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("float8")
    meant = []
    for name in ("base", "ft"):
        model = new_model("llama")
        if name == "ft":
            shake(model, 7, 0.05)
        model.to(torch.bfloat16).save_pretrained(folder / f"{name}-bf16")
        stored, values = fp8(read_folder(folder / f"{name}-bf16"), FORM)
        config = (folder / f"{name}-bf16" / "config.json").read_bytes()
        write_folder(folder / name, stored, files={"config.json": with_settings(config, FORM)})
        meant.append(values)
    deltafmt.pack(folder / "base", folder / "ft", folder / "d.deltafmt", method=RTN(4))
    deltafmt.unpack(folder / "base", folder / "d.deltafmt", folder / "out")
    config = (folder / "out" / "config.json").read_bytes()
    write_folder(folder / "plain", meant[0], files={"config.json": config})
    return Pair(folder / "base", folder / "plain", folder / "ft", meant[0], folder / "d.deltafmt", folder / "out")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def expected(pair: Pair) -> Any:
    return logits(load(pair.unpacked).float(), ids(2, 6))


def apart(found: Any, expected: Any) -> float:
    """Return the distance of outputs. The unpacked model's weights are rounded to BF16; base plus delta is not."""
    return float(torch.linalg.norm(found - expected))


@situation("`attach`: an FP8 model that transformers has dequantized")
def test_a_model_that_was_dequantized(pair: Pair, expected: Any) -> None:
    pytest.importorskip("accelerate")
    model = load(pair.base)
    held = model.state_dict()
    for name, tensor in pair.values.items():
        assert held[name].view(torch.uint8).numpy().tobytes() == tensor.data, name
    attach(model.float(), {"one": pair.delta})
    assert not model.deltas.unchecked["one"]
    base = logits(model, ids(2, 6))
    with model.delta("one"):
        found = logits(model, ids(2, 6))
    assert apart(found, expected) < 0.05 * apart(base, expected)


class OnCpu(FP8Linear):
    """transformers' FP8 module, without its kernel, which needs a GPU."""

    def forward(self, input: Any) -> Any:  # noqa: A002 - the name that torch uses
        """Multiply with the values."""
        scales = self.weight_scale_inv.repeat_interleave(16, 0).repeat_interleave(16, 1)
        weight = (self.weight.float() * scales).to(torch.bfloat16)
        return torch.nn.functional.linear(input, weight.to(input.dtype), self.bias)


def with_modules(pair: Pair) -> Any:
    """Return the base with FP8 modules, as transformers loads it on a GPU."""
    stored = read_folder(pair.base)
    model = load(pair.plain).float()
    for name in [name for name in stored if is_projection(name)]:
        codes, scales = stored[name], stored[f"{name}_scale_inv"]
        module = OnCpu(codes.shape[1], codes.shape[0], block_size=(16, 16))
        weight = torch.frombuffer(bytearray(codes.data), dtype=torch.float8_e4m3fn).reshape(codes.shape)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        module.weight_scale_inv = torch.nn.Parameter(torch.from_numpy(scales.floats().copy().reshape(scales.shape)))
        model.set_submodule(name.removesuffix(".weight"), module)
    return model


@situation("`attach`: a model of FP8 modules")
def test_fp8_modules_are_served(pair: Pair, expected: Any) -> None:
    model = with_modules(pair)
    attach(model, {"one": pair.delta})
    assert not model.deltas.unchecked["one"]
    with model.delta(["one", None]):
        found = logits(model, ids(2, 6))
    assert apart(found[0], expected[0]) < 0.05 * apart(found[1], expected[1])
    with pytest.raises(UsageError, match=r"cannot be merged: the model holds it as torch\.float8_e4m3fn"):
        model.deltas.merge("one")


def test_other_codes_or_scales_are_another_base(pair: Pair) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for attribute in ("weight", "weight_scale_inv"):
        model = with_modules(pair)
        held = getattr(model.get_submodule(name.removesuffix(".weight")), attribute)
        held.data.view(torch.uint8).reshape(-1)[0] ^= 1
        with pytest.raises(WrongBaseError, match=f'tensor "{name}" differs'):
            attach(model, {"one": pair.delta})


def test_codes_of_a_plain_base_are_not_compared(pair: Pair, tmp_path: Path) -> None:
    deltafmt.pack(pair.plain, pair.finetuned, tmp_path / "d.deltafmt", method=RTN(4))
    model = with_modules(pair)
    attach(model, {"one": tmp_path / "d.deltafmt"})
    assert all(is_projection(name) for name in model.deltas.unchecked["one"])
    assert len(model.deltas.unchecked["one"]) == 14
