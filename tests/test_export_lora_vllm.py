"""Adapters for vLLM: factors alone, a tied head with its own, and what is left out is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Cli, read_file, refused
from deltafmt.errors import UsageError
from deltafmt.methods import SVD
from deltafmt.pipeline.lora_for_vllm import RANKS, check_rank, max_lora_rank
from lora_files import PREFIX


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> Path:
    path = tmp_path_factory.mktemp("delta") / "svd.deltafmt"
    deltafmt.pack(nano / "base", nano / "math", path, method=SVD(rank=12))
    return path


def test_only_factors_are_written_and_the_tied_head_has_its_own(delta: Path, nano: Path, tmp_path: Path) -> None:
    result = deltafmt.export_lora(delta, tmp_path / "out", base=nano / "base", reader="vllm")
    tensors, _ = read_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert all(".lora_" in name for name in tensors)
    assert (result.rank, result.max_lora_rank, result.saved) == (12, 16, [])
    # 9 norms are left out, and each moved by some percent.
    assert len(result.left_out) == 9
    assert all(share is not None and 0.001 < share < 0.2 for share in result.left_out.values())
    pairs = {}
    for name in ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"):
        pairs[name[-1]] = tensors[PREFIX + name].floats()
    embedding = (pairs["B"] @ pairs["A"]).T
    head = tensors[PREFIX + "lm_head.lora_B.weight"].floats() @ tensors[PREFIX + "lm_head.lora_A.weight"].floats()
    np.testing.assert_allclose(head, embedding, rtol=1e-5, atol=1e-7)
    with deltafmt.open(delta) as opened:
        np.testing.assert_allclose(head, opened.delta("model.embed_tokens.weight"), rtol=1e-4, atol=1e-6)


def test_the_command_names_what_is_left_out_and_the_rank(delta: Path, nano: Path, tmp_path: Path, cli: Cli) -> None:
    out = cli("export-lora", delta, "-o", tmp_path / "out", "--base", nano / "base", "--for", "vllm").out
    assert "left out, as vLLM loads no vectors: model.layers.0.input_layernorm.weight (moved by " in out
    assert "vLLM loads it with --enable-lora --max-lora-rank 16" in out
    without = cli("export-lora", delta, "-o", tmp_path / "o", "--for", "vllm", "--plan", "--json").json()
    assert without["max_lora_rank"] == 16
    assert set(without["left_out"].values()) == {None}


def test_matrices_that_are_stored_whole_and_large_ranks_are_refused(
    nano: Path, tmp_path: Path, cli: Cli, delta: Path
) -> None:
    path = tmp_path / "whole.deltafmt"
    deltafmt.pack(nano / "base", nano / "math", path, method=SVD(rank=4), exclude=["*down_proj*"])
    found = cli("export-lora", path, "-o", tmp_path / "out", "--for", "vllm")
    refused(found, 2, '"model.layers.0.mlp.down_proj.weight" changes by no factors of its module')
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="the largest rank is 513, and vLLM takes up to 512"):
        check_rank("x", 513)
    with pytest.raises(UsageError, match="reader 'peft' is not vllm"):
        deltafmt.export_lora(delta, tmp_path / "out", reader="peft")
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 300, 512, 513)] == [1, 8, 8, 320, 512, None]
    assert list(RANKS) == sorted(RANKS)
