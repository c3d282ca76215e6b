"""Packing with a calibration text: what is gathered, what the methods make of it, what an interrupt leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import Cli, refused

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.calibration import chain_run
from deltafmt.calibration.run import RunOptions, calibrate_folder
from deltafmt.errors import UsageError
from deltafmt.methods import GPTQ, RTN, SparseGPT
from deltafmt.methods.gptq_solver import gptq
from deltafmt.methods.sparsegpt_solver import sparsegpt
from deltafmt.pipeline.calibrate import Calibration
from tiny_models import new_model, shake

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

NAME = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def write_models(folder: Path, kind: str = "llama", tokenizer: Path | None = None) -> None:
    """Write a base and a fine-tune."""
    options = {"vocab_size": 1024} if tokenizer else {}
    for name, seed in (("base", 0), ("ft", 10)):
        model = new_model(kind, **options)
        if seed:
            shake(model, seed, 0.05)
        model.save_pretrained(folder / name)
    if tokenizer:
        shutil.copy(tokenizer, folder / "ft" / "tokenizer.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with base, fine-tune and text."""
    from conftest import NANO

    folder = tmp_path_factory.mktemp("calibrated")
    write_models(folder, tokenizer=NANO / "tokenizer.json")
    lines = (NANO / "eval.jsonl").read_text("utf-8").splitlines()
    (folder / "text.jsonl").write_text("\n".join(lines[:20]))
    (folder / "short.txt").write_text("1 + 1")
    return folder


def moments_of(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    calibrate_folder(
        home / "ft",
        home / "text.jsonl",
        lambda _name, weight, moments: found.__setitem__(weight, moments.matrix),
        tokenizer=home / "ft" / "tokenizer.json",
        options=RunOptions("cpu"),
    )
    return found


def packed(home: Path, out: Path, method: Any, **options: Any) -> Any:
    calibration = Calibration(
        home / "text.jsonl", device="cpu", tokenizer=home / "ft" / "tokenizer.json", **options.pop("how", {})
    )
    return deltafmt.pack(home / "base", home / "ft", out, method=method, calibration=calibration, force=True, **options)


def true_delta(home: Path, name: str) -> Any:
    from safetensors.numpy import load_file

    files = (load_file(home / side / "model.safetensors") for side in ("base", "ft"))
    base, finetuned = (file[name].astype(np.float32) for file in files)
    return finetuned - base


def test_what_is_stored_is_what_the_solvers_find(home: Path, tmp_path: Path) -> None:
    moments = moments_of(home)
    # Sums of products are symmetric but for rounding; the store keeps the upper triangle.
    hessian = np.triu(moments[NAME]) + np.triu(moments[NAME], 1).T
    delta = true_delta(home, NAME)
    out = tmp_path / "d.deltafmt"
    for method, expected in (
        (GPTQ(3, scale_group=16), lambda m: gptq(delta, hessian, m.quantizer).quantized.dense()),
        (GPTQ(1), lambda m: gptq(delta, hessian, m.quantizer, refits=2).quantized.dense()),
        (
            GPTQ(4, "asymmetric", act_order=True, damping=0.1),
            lambda m: gptq(delta, hessian, m.quantizer, act_order=True, damping=0.1).quantized.dense(),
        ),
    ):
        result = packed(home, out, method)
        with deltafmt.open(out) as opened:
            np.testing.assert_array_equal(opened.delta(NAME), expected(method))
            nearest = opened.delta(EMBEDDING)
        assert result.uncalibrated == [EMBEDDING]
        assert result.notes == {}
        deltafmt.pack(home / "base", home / "ft", out, method=method.nearest, force=True)
        with deltafmt.open(out) as opened:
            np.testing.assert_array_equal(opened.delta(EMBEDDING), nearest)
            assert not np.array_equal(opened.delta(NAME), expected(method))

    method = SparseGPT(4, 8, 2, share=2)
    packed(home, out, method)
    arrays = sparsegpt(delta, hessian, method.layout, rule="mse", refits=2).arrays
    from deltafmt.terms.nm import codec as nm

    with deltafmt.open(out) as opened:
        np.testing.assert_array_equal(opened.delta(NAME), nm.dense(method.layout, arrays, delta.shape[1]))
        dropped = opened.delta(EMBEDDING)
    deltafmt.pack(home / "base", home / "ft", out, method=method.dropout, force=True)
    with deltafmt.open(out) as opened:
        np.testing.assert_array_equal(opened.delta(EMBEDDING), dropped)
    with pytest.raises(UsageError, match="index 'seeded' cannot hold positions"):
        SparseGPT(index="seeded")


def test_the_command(home: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "d.deltafmt"
    pair = (home / "base", home / "ft", "-o", out)
    text = ("--calibration", home / "text.jsonl", "--tokenizer", home / "ft" / "tokenizer.json")
    found = cli("pack", *pair, "--method", "gptq", "--bits", "2", *text, "--calibration-device", "cpu")
    assert found.code == 0, found
    assert "calibrated with " in found.out
    assert f"not calibrated: {EMBEDDING} (the text gave no second moments of its inputs)" in found.out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    with deltafmt.open(out) as opened:
        assert opened.metadata["method"].startswith("gptq k=2")
        assert opened.metadata["calibration.length"] == "2048"
        assert opened.metadata["calibration.text"].startswith("blake3:")
    first = out.read_bytes()
    threads = ("--threads", "1")
    again = cli("pack", *pair, "--method", "gptq", "--bits", "2", *text, *threads, "--force", "--json").json()
    assert again["calibration_tokens"] > 0
    assert again["uncalibrated"] == [EMBEDDING]
    assert out.read_bytes() == first
    assert cli("verify", out, "--base", home / "base").code == 0

    out.unlink()
    short = ("--calibration", home / "short.txt", *text[2:])
    for arguments, code, words in (
        (("--method", "gptq"), 2, ("method gptq needs", "; --calibration FILE")),
        (("--rule", "*.mlp.*", "sparsegpt"), 2, ("method sparsegpt needs", "; --calibration FILE")),
        (("--target-ratio", "4", "--candidate", "gptq"), 2, ("method gptq needs", "; --calibration FILE")),
        (("--method", "rtn", *text), 2, ("method rtn reads no calibration text",)),
        (("--method", "gptq", "--calibration-length", "9"), 2, ("--calibration-length needs --calibration",)),
        (("--method", "gptq", *short), 2, ("tokens where at least 48 are needed", "down_proj")),
        (("--method", "gptq", *text, "--calibration-tokens", "0"), 2, ("0 calibration tokens",)),
        (("--method", "gptq", *text, "--calibration-length", "1"), 2, ("a calibration length of 1",)),
        (("--method", "gptq", *text, "--calibration-device", "tpu"), 2, ("calibration device 'tpu'",)),
        (("--method", "gptq", "--calibration", tmp_path / "none"), 5, ("cannot read", "none")),
        (("--method", "gptq", *text, "--damping", "-1"), 2, ("damping -1.0",)),
        (("--method", "sparsegpt", *text, "--refits", "-1"), 2, ("refits -1",)),
    ):
        refused(cli("pack", *pair, *arguments), code, *words)
        assert not list(tmp_path.iterdir()), arguments


def test_singular_moments_are_told(home: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "d.deltafmt"
    line = json.dumps({"text": "1 " * 60})
    (tmp_path / "same.jsonl").write_text(line)
    text = ("--calibration", tmp_path / "same.jsonl", "--tokenizer", home / "ft" / "tokenizer.json")
    pair = (home / "base", home / "ft", "-o", out)
    found = cli("pack", *pair, "--method", "gptq", *text, "--damping", "0", "--calibration-device", "cpu")
    assert found.code == 0, found
    assert "singular second moments: damping raised from 0 to " in found.out


def test_activations_that_are_not_finite_are_named(home: Path, tmp_path: Path, cli: Cli) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "ft"
    shutil.copytree(home / "ft", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = np.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = ("--calibration", home / "text.jsonl", "--tokenizer", home / "ft" / "tokenizer.json")
    found = cli("pack", home / "base", folder, "-o", tmp_path / "d", "--method", "gptq", *text)
    refused(found, 2, 'activations that enter "model.layers.0.self_attn.q_proj" are not finite')
    assert [path.name for path in tmp_path.iterdir()] == ["ft"]


def test_an_interrupted_calibration_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "d.deltafmt", tmp_path / "whole.deltafmt"
    packed(home, whole, GPTQ(2))
    real = chain_run.ChainRun._block
    blocks: list[int] = []
    stop_at = 1

    def block(self: Any, number: int, *rest: Any) -> Any:
        if number == stop_at:
            raise KeyboardInterrupt
        blocks.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(chain_run.ChainRun, "_block", block)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on where it stopped"):
        packed(home, out, GPTQ(2))
    assert blocks == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.deltafmt.calibration", "whole.deltafmt"]
    stop_at = -1
    packed(home, out, GPTQ(2))
    assert blocks == [0, 1]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.deltafmt", "whole.deltafmt"]

    # What was gathered serves another method of the same matrices, and no other text.
    def interrupt(name: str, _size: int) -> None:
        if name:
            raise KeyboardInterrupt

    blocks.clear()
    with pytest.raises(KeyboardInterrupt):
        packed(home, out, GPTQ(2), progress=interrupt)
    assert blocks == [0, 1]
    packed(home, out, GPTQ(3), how={})
    assert blocks == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        packed(home, out, GPTQ(2), progress=interrupt)
    packed(home, out, GPTQ(2), how={"length": 40})
    assert blocks == [0, 1] * 3


def test_a_folder_of_that_name_is_not_taken(home: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".d.deltafmt.calibration"
    mine.mkdir()
    (mine / "precious").write_text("")
    with pytest.raises(UsageError, match="is not the folder of a calibration; remove it"):
        packed(home, tmp_path / "d.deltafmt", GPTQ(2))
    assert (mine / "precious").is_file()


def test_rows_of_inputs_are_no_columns(tmp_path: Path, home: Path) -> None:
    write_models(tmp_path, "gpt2", home / "ft" / "tokenizer.json")
    calibration = Calibration(home / "text.jsonl", device="cpu", tokenizer=home / "ft" / "tokenizer.json", length=64)
    with pytest.raises(UsageError, match="second moments for none of the matrices to be compressed, such as"):
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "d", method=GPTQ(), calibration=calibration)
    assert RTN(1).describe().endswith("unbiased")
