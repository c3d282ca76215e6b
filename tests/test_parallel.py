"""A model that transformers has cut over two processes gives, with deltas, what the unpacked fine-tunes give."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import deltafmt
from deltafmt.methods import DARE, RTN, SVD, BitDelta, DeltaDQ
from tiny_models import close, generate, ids, logits, new_model, shake

pytestmark = [
    pytest.mark.filterwarnings("default"),  # transformers' own
    pytest.mark.skipif(
        tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17), reason="parameters do not say their part"
    ),
]

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {**SIZES, "tie_word_embeddings": True}),
}
# All kinds of terms, of which the second half of columns and of rows is not where whole words begin.
METHODS = {
    "one": (DeltaDQ(4, 16, 4), [("*embed*", RTN(4))]),
    "two": (
        DeltaDQ(3, 8, 3, index="fixed", share=1, scale_group=4),
        [("*.0.*", RTN(4, scale_group=8)), ("*.1.*o_proj*", BitDelta("column"))],
    ),
    "three": (
        DARE(0.7),
        [
            ("*.0.*", SVD(rank=3)),
            ("*.1.*down_proj*", BitDelta()),
            ("*.1.*o_proj*", None),  # stored whole
            ("*.1.*up_proj*", None),
        ],
    ),
}
SELECTIONS: list[Any] = [
    *METHODS,
    "one",  # by now it is known which modules share an input
    None,
    ["one", "two", None, "three"],
    [{"one": 0.5, "two": 0.25}, "three", {"three": 2.0}, "one"],
]


def write(name: str, folder: Path) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Write a base, the deltas of three fine-tunes, and what these unpack to."""
    kind, changes = MODELS[name]
    new_model(kind, **changes).save_pretrained(folder / "base")
    deltas, unpacked = {}, {}
    for number, (tuned_name, (method, rules)) in enumerate(METHODS.items()):
        tuned = new_model(kind, **changes)
        shake(tuned, 10 + number, 0.05)
        tuned.save_pretrained(folder / tuned_name)
        deltas[tuned_name] = folder / f"{tuned_name}.deltafmt"
        unpacked[tuned_name] = folder / f"{tuned_name}-unpacked"
        deltafmt.pack(folder / "base", folder / tuned_name, deltas[tuned_name], method=method, rules=rules, seed=number)
        deltafmt.unpack(folder / "base", deltas[tuned_name], unpacked[tuned_name])
    return folder / "base", deltas, unpacked


def ask(folder: Path, questions: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Start two processes, and return what each of them answers."""
    torch.save(questions, folder / "questions.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    script = Path(__file__).with_name("parallel_ranks.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, folder],
            env={
                **shared,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text
    return [torch.load(folder / f"answers-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write all models."""
    return {name: write(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="module")
def answers(written: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ask two processes everything at once, because starting them takes longest."""
    questions: dict[str, tuple[Any, ...]] = {
        name: ("served", base, deltas, SELECTIONS) for name, (base, deltas, _) in written.items()
    }
    base, deltas, _ = written["llama"]
    questions |= {what: (what, base, deltas) for what in ("detached", "changed", "wrong")}
    narrow = tmp_path_factory.mktemp("narrow")
    changes = {**SIZES, "intermediate_size": 80}
    new_model("llama", **changes).save_pretrained(narrow / "base")
    tuned = new_model("llama", **changes)
    shake(tuned, 1, 0.05)
    tuned.save_pretrained(narrow / "tuned")
    deltafmt.pack(narrow / "base", narrow / "tuned", narrow / "d.deltafmt", method=DeltaDQ(4, 16, 4))
    questions["refused"] = ("refused", narrow / "base", {"d": narrow / "d.deltafmt"})
    return ask(tmp_path_factory.mktemp("ranks"), questions)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_unpacked_fine_tunes(
    name: str, written: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    base, _, unpacked = written[name]
    tokens = ids(4, 6)
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = {key: load(folder, dtype=torch.float32).eval() for key, folder in unpacked.items()}
    models["base"] = load(base, dtype=torch.float32).eval()
    want = {key: logits(model, tokens) for key, model in models.items()}
    attached = deltafmt.transformers.attach(models["base"], written[name][1])
    want_text = generate(models["one"], tokens)
    for found in (one[name] for one in answers):
        assert close(found["base"], want["base"])
        assert found["same"]
        assert found["trained"]
        assert not any(found["unchecked"].values())
        assert not found["unused"]
        assert torch.equal(found["text"], want_text)
        for names, output in zip(SELECTIONS, found["outputs"], strict=True):
            if isinstance(names, list):
                assert close(output, logits(attached, tokens, delta=names)), names
                for row, one in enumerate(names):
                    if not isinstance(one, dict):
                        assert close(output[row], want[one or "base"][row]), one
            else:
                assert close(output, want[names or "base"]), names


def test_each_process_holds_its_part_alone(answers: list[dict[str, Any]]) -> None:
    layer = "model.layers.0"
    for rank, one in enumerate(answers):
        shapes = one["llama"]["shapes"]
        assert shapes[f"{layer}.self_attn.q_proj.weight[{32 * rank}:{32 * rank + 32}, 0:64]"] == [(32, 64)]
        assert shapes[f"{layer}.mlp.down_proj.weight[0:64, {48 * rank}:{48 * rank + 48}]"] == [(64, 48)]
        assert shapes["model.embed_tokens.weight"] == [(96, 64)]
        # The change of a bias that is added behind a sum is the first process's.
        assert (f"{layer}.mlp.down_proj.bias[0:64]" in shapes) == (rank == 0)
        assert (f"{layer}.mlp.up_proj.bias[{48 * rank}:{48 * rank + 48}]") in shapes


def test_detaching_leaves_the_model_as_it_was(answers: list[dict[str, Any]]) -> None:
    for one in answers:
        found = one["detached"]
        assert (found["same"], found["changed"], found["left"]) == (True, True, [])


def test_a_model_that_changes_is_followed(answers: list[dict[str, Any]]) -> None:
    for one in answers:
        assert one["changed"]["replaced"]
        assert one["changed"]["written"].endswith("attach them to the model as it is now")
        assert 'tensor "model.layers.1.self_attn.o_proj.weight" differs' in one["changed"]["written"]


def test_what_is_refused(answers: list[dict[str, Any]]) -> None:
    way_out = "load the model whole in each process, without tp_plan, or unpack the delta and load that"
    for one in answers:
        assert "cannot be merged into a model that is cut over processes" in one["detached"]["merge"]
        assert one["changed"]["read"] == (
            f'the model reads the weight of "model.layers.0.self_attn.q_proj" without calling it, and has it cut over '
            f"processes; {way_out}"
        )
        assert one["wrong"]["error"].startswith(
            'delta "one": wrong base LlamaForCausalLM: tensor "model.layers.1.mlp.down_proj.weight" differs'
        )
        starts = "columns 0 to 40", "columns 40 to 80"
        assert one["refused"]["error"] in [
            f'tensor "model.layers.0.mlp.down_proj.weight" cannot be cut over so many processes: {columns} are not '
            f"whole groups of 16; take fewer, or {way_out}"
            for columns in starts
        ]
