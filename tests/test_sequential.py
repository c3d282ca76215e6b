"""Sequential calibration: what a block sees is what a plain pass gives behind the unpacked blocks before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import deltafmt
from conftest import NANO, Cli, raw, read_folder, refused, write_pair
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.methods import GPTQ, RTN, BitDelta, DeltaCoMe, DeltaDQ, Magnitude, Residual, SparseGPT
from deltafmt.pipeline.plan import make_plan
from deltafmt.pipeline.sequential import stored
from strategies import examples, generators, shapes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.calibration.load_model import load_model
from deltafmt.calibration.moment_store import MomentStore
from deltafmt.calibration.text import read_documents
from deltafmt.calibration.tokens import TOKENS, cut, load_encoder
from deltafmt.pipeline import sequential
from deltafmt.pipeline.calibrate import Calibration
from tiny_models import new_model, plainly, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

# Compressed in several ways: by moments, without, exactly, and exactly because packing would not be smaller.
RULES = [
    ("*.up_proj.weight", RTN(1)),
    ("*.fc2.weight", RTN(1)),
    ("*.k_proj.weight", None),
    ("*.v_proj.weight", Magnitude(density=1.0, value_dtype="F32")),
]


def write_models(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a base, a fine-tune and a text."""
    folder.mkdir(exist_ok=True)
    for name, seed in (("base", 0), ("ft", 10)):
        model = new_model(kind, vocab_size=1024)
        if seed:
            shake(model, seed, 0.05)
        model.to(dtype).save_pretrained(folder / name)
    shutil.copy(NANO / "tokenizer.json", folder)
    lines = (NANO / "eval.jsonl").read_text("utf-8").splitlines()
    (folder / "text.jsonl").write_text("\n".join(lines[:5]))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with base, fine-tune and text."""
    return write_models(tmp_path_factory.mktemp("sequential"), "llama")


def packed(home: Path, out: Path, method: Any = None, *, seen: bool = True, **options: Any) -> Any:
    how = Calibration(home / "text.jsonl", device="cpu", tokenizer=home / "tokenizer.json", sequential=seen)
    options["method"] = method or (None if "target_ratio" in options else GPTQ(1))
    return deltafmt.pack(home / "base", home / "ft", out, calibration=how, force=True, **options)


def gathered(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> dict[str, NDArray[np.float32]]:
    """Return the moments that are stored while something is done."""
    found: dict[str, NDArray[np.float32]] = {}
    real = MomentStore.on_module

    def keep(self: Any, name: str, weight_name: str, moments: Any) -> None:
        found[weight_name] = moments.matrix
        real(self, name, weight_name, moments)

    with monkeypatch.context() as patch:
        patch.setattr(MomentStore, "on_module", keep)
        work()
    return found


def behind(home: Path, unpacked: Path, taken: Callable[[str], bool]) -> dict[str, NDArray[np.float64]]:
    """Return the moments of a plain pass through the fine-tune with some parameters of the unpacked model."""
    model, other = (load_model(folder, torch.float32) for folder in (home / "ft", unpacked))
    encoder = load_encoder(home / "tokenizer.json", model.config)
    sequences = cut(read_documents(home / "text.jsonl"), encoder, model.config.max_position_embeddings, TOKENS)
    values = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if taken(name):
                parameter.copy_(values[name])
    return {f"{name}.weight": moments for name, moments in plainly(model, sequences).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_a_block_sees_what_the_unpacked_ones_before_it_give(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write_models(tmp_path, kind)
    out = tmp_path / "d.deltafmt"
    absent = "up_proj" if kind == "opt" else "fc2"
    rules = [rule for rule in RULES if absent not in rule[0]]
    found = gathered(monkeypatch, lambda: packed(home, out, rules=rules))
    with deltafmt.open(out) as opened:
        kept = {name for name in opened if opened[name].action == "replace" and len(opened[name].shape) > 1}
        assert any("v_proj" in name for name in kept)
        assert opened.metadata["calibration.sequential"] == "yes"
    deltafmt.unpack(home / "base", out, tmp_path / "unpacked")
    first, second = (f"{'model.decoder' if kind == 'opt' else 'model'}.layers.{number}." for number in (0, 1))

    def outer(name: str) -> bool:
        # What comes before the blocks; the tiny OPT has a projection between its embedding and them.
        return ".layers." not in name and "project_in" not in name and name != "lm_head.weight"

    asis = behind(home, tmp_path / "unpacked", lambda _name: False)
    wholly = plain = 0
    for belongs, taken in (
        (lambda name: "project_in" in name, outer),
        (lambda name: name.startswith(first), lambda name: outer(name) or "project_in" in name),
        (lambda name: name.startswith(second), lambda name: outer(name) or "project_in" in name or first in name),
        (lambda name: not name.startswith((first, second)) and "project_in" not in name, lambda _name: True),
    ):
        expected = behind(home, tmp_path / "unpacked", taken)
        for name in filter(belongs, found):
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], atol=2e-5 * scale, err_msg=name)
            wholly += 1
            plain += bool(np.abs(asis[name] - expected[name]).max() > 1e-3 * scale)
    assert wholly == len(found) >= 8
    assert plain == wholly, "the reference differs from a pass through the fine-tune itself"


def test_the_first_block_is_the_same_with_and_without(home: Path, tmp_path: Path) -> None:
    arrays: dict[bool, dict[str, Any]] = {}
    for seen in (False, True):
        out = tmp_path / f"{seen}.deltafmt"
        result = packed(home, out, SparseGPT(1, 8, 2), seen=seen, rules=RULES[:1], exclude=["*embed*"])
        assert result.sequential == seen
        with deltafmt.open(out) as opened:
            arrays[seen] = {name: {k: v.copy() for k, v in opened.buffers(name).items()} for name in opened}
            assert opened.metadata.get("calibration.sequential") == ("yes" if seen else None)
        again = packed(
            home, tmp_path / "again", SparseGPT(1, 8, 2), seen=seen, rules=RULES[:1], exclude=["*embed*"], threads=1
        )
        assert again.content_id == result.content_id
    same = {
        name: all(np.array_equal(array, arrays[True][name][key]) for key, array in buffers.items())
        for name, buffers in arrays[False].items()
        if ".layers." in name and "norm" not in name and "up_proj" not in name
    }
    assert all(equal == (".layers.0." in name) for name, equal in same.items())
    assert len(same) == 12


def test_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This model has a linear module before its blocks.
    home, tmp_path = write_models(tmp_path / "home", "opt"), tmp_path / "out"
    tmp_path.mkdir()
    whole, out = tmp_path / "whole.deltafmt", tmp_path / "d.deltafmt"
    packed(home, whole)
    real = sequential.Stages.__call__
    stages: list[str] = []
    stop: tuple[str, int] | None = None

    def call(self: Any, names: Any, awaited: Any) -> Any:
        stage = next((part for part in ("layers.0.", "layers.1.") if part in names[0]), "outer")
        if stage not in stages:
            stages.append(stage)
        for number, pair in enumerate(real(self, names, awaited)):
            if stop == (stage, number):
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(sequential.Stages, "__call__", call)
    for at, done in ((("outer", 0), []), (("layers.0.", 3), []), (("layers.1.", 0), ["layers.0."])):
        stop = at
        with pytest.raises(KeyboardInterrupt, match="the same command goes on where it stopped"):
            packed(home, out)
        left = tmp_path / ".d.deltafmt.sequential"
        assert {path.name for path in tmp_path.iterdir()} == {left.name, whole.name}
        assert not list(left.glob("stage*"))
        stop = None
        stages.clear()
        packed(home, out)
        assert stages == ["outer", *(name for name in ("layers.0.", "layers.1.") if name not in done)]
        assert out.read_bytes() == whole.read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {out.name, whole.name}
        out.unlink()

    # What another method has stored is not what this one will.
    stages.clear()
    stop = ("layers.1.", 0)
    with pytest.raises(KeyboardInterrupt):
        packed(home, out, GPTQ(2))
    stop = None
    stages.clear()
    packed(home, out)
    assert stages == ["outer", "layers.0.", "layers.1."]
    assert out.read_bytes() == whole.read_bytes()


def test_a_tied_copy_of_what_is_not_compressed_yet_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    home = write_models(tmp_path, "llama")
    for side in ("base", "ft"):
        path = home / side / "model.safetensors"
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, path, {"format": "pt"})
    out = tmp_path / "d.deltafmt"
    embedding = "model.embed_tokens.weight"
    for method, taken in ((GPTQ(1), False), (RTN(1), True)):
        rules = [("lm_head.weight", method)]
        found = gathered(monkeypatch, lambda rules=rules: packed(home, out, rules=rules))
        with deltafmt.open(out) as opened:
            assert opened[embedding].target == "lm_head.weight"
        deltafmt.unpack(home / "base", out, tmp_path / "unpacked", force=True)
        expected = behind(home, tmp_path / "unpacked", lambda name, taken=taken: taken and name == embedding)
        name = "model.layers.0.self_attn.q_proj.weight"
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5 * np.abs(expected[name]).max())


def test_a_target_is_measured_without_and_gathered_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d.deltafmt"
    candidates = [SparseGPT(1, 8, 2), GPTQ(1), DeltaCoMe("2@8+4@3"), RTN(2)]
    result = packed(home, out, target_ratio=8, candidates=candidates)
    assert result.size <= result.choice.target
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    rules = [(chosen.plan.tensor.name, chosen.plan.method) for chosen in result.choice.tensors]
    assert len({repr(method) for _, method in rules}) > 2
    packed(home, tmp_path / "ruled.deltafmt", DeltaDQ(), rules=rules)
    with deltafmt.open(out) as opened, deltafmt.open(tmp_path / "ruled.deltafmt") as ruled:
        assert opened.metadata["calibration.sequential"] == "yes"
        for name in opened:
            for key, array in opened.buffers(name).items():
                np.testing.assert_array_equal(array, ruled.buffers(name)[key], err_msg=name)
    without = packed(home, tmp_path / "without.deltafmt", target_ratio=8, candidates=candidates, seen=False)
    assert [(chosen.plan.tensor.name, chosen.plan.method) for chosen in without.choice.tensors] == rules
    assert without.content_id != result.content_id
    # Where the choice falls on what uses no moments, there is nothing to gather again.
    plain = packed(home, tmp_path / "plain.deltafmt", target_ratio=5, candidates=[RTN(3)])
    assert (plain.sequential, plain.calibration_tokens > 0) == (False, True)


def test_the_command(home: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "d.deltafmt"
    pair = (home / "base", home / "ft", "-o", out)
    text = ("--calibration", home / "text.jsonl", "--tokenizer", home / "tokenizer.json", "--calibration-device", "cpu")
    method = ("--method", "gptq", "--bits", "1")
    found = cli("pack", *pair, *method, *text, "--sequential")
    assert found.code == 0, found
    assert "tokens, each block on the outputs of the compressed blocks before it" in found.out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    direct = packed(home, tmp_path / "direct.deltafmt")
    assert out.read_bytes() == direct.path.read_bytes()
    again = cli("pack", *pair, *method, *text, "--sequential", "--force", "--json").json()
    assert again["sequential"] is True
    assert cli("pack", *pair, *method, *text, "--force", "--json").json()["sequential"] is False
    assert cli("verify", out, "--base", home / "base").code == 0
    refused(cli("pack", *pair, "--force", "--sequential"), 2, "--sequential needs --calibration FILE")

    # An encoder and decoder is run as a whole.
    write_models(tmp_path / "t5", "t5")
    pair = (tmp_path / "t5" / "base", tmp_path / "t5" / "ft", "-o", tmp_path / "t5.deltafmt")
    words = "T5ForConditionalGeneration cannot be run block by block", "which sequential calibration needs"
    refused(cli("pack", *pair, *method, *text, "--calibration-length", "60", "--sequential"), 2, *words)
    assert not list(tmp_path.glob("*t5.*"))


def test_errors_while_a_stage_is_packed_are_those_of_packing(home: Path, tmp_path: Path, cli: Cli) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(home / "base", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, path, {"format": "pt"})
    text = ("--calibration", home / "text.jsonl", "--tokenizer", home / "tokenizer.json", "--sequential")
    found = cli("pack", tmp_path / "base", home / "ft", "-o", tmp_path / "d", "--method", "gptq", *text)
    refused(found, 2, 'tensor "model.layers.0.mlp.up_proj.weight": the delta at row 3, column 3 is nan', "--exclude")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


METHODS = (
    RTN(2),
    BitDelta("row"),
    DeltaDQ(2, 8, 2),
    Residual(rank=2, n=1, m=4),
    Magnitude(density=0.1, bits=2),
    SparseGPT(1, 4, 2),
)


@examples(25)
@given(
    generators(), shapes(40, 90), st.integers(0, 3), st.sampled_from(METHODS), st.sampled_from(["BF16", "F16", "F32"])
)
def test_what_a_stage_shows_is_what_is_unpacked(
    tmp_path_factory: pytest.TempPathFactory,
    rng: np.random.Generator,
    shape: tuple[int, int],
    grown: int,
    method: Any,
    dtype: str,
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    base = rng.standard_normal(shape, np.float32)
    tuned = rng.standard_normal((shape[0] + grown, shape[1]), np.float32)
    tuned[: shape[0]] = base + 0.1 * rng.standard_normal(shape, np.float32)
    pair = write_pair(folder, {"w": raw(base, dtype)}, {"w": raw(tuned, dtype)})
    out = folder / "d.deltafmt"
    with Checkpoint(pair.base) as before, Checkpoint(pair.finetuned) as after:
        (plan,) = make_plan(before, after, method)
        how = replace(method) if not isinstance(method, SparseGPT) else method.dropout
        deltafmt.pack(pair.base, pair.finetuned, out, method=how)
        deltafmt.unpack(pair.base, out, folder / "unpacked")
        with deltafmt.open(out) as opened:
            if opened["w"].action == "add":
                values = read_folder(folder / "unpacked")["w"].floats()
                np.testing.assert_array_equal(stored(plan, opened), values)
