"""The benchmark of fine-tunes of a real model: how they are made, what is measured, and the page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

accuracy_pages = pytest.importorskip("accuracy_pages")
accuracy_real = pytest.importorskip("accuracy_real")
pair_texts = pytest.importorskip("pair_texts")
real_measure = pytest.importorskip("real_measure")
real_pairs = pytest.importorskip("real_pairs")
real_points = pytest.importorskip("real_points")
solve = pytest.importorskip("solve")
training = pytest.importorskip("training")

AMOUNT = real_pairs.Amount(problems=6, calibration=4, steps=2, batch=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fine-tunes of a tiny model of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    tokenizer = pair_texts.word_tokenizer(400)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(home / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(home / "model")
    real_pairs.run(home / "model", home / "out", ["small", "added"], torch.device("cpu"), 0, AMOUNT, None)
    return home / "out"


def test_what_is_made(made: Path) -> None:
    told = json.loads((made / "added.json").read_text())
    assert told["steps"] == 2
    assert 0 < told["relative_norm"] < 0.1
    sizes = [json.loads((made / kind / "config.json").read_text())["vocab_size"] for kind in ("base", "small", "added")]
    assert sizes[1] == sizes[0]
    assert sizes[2] == sizes[0] + len(real_pairs.ADDED)
    for kind in ("small", "added"):
        for task in pair_texts.TASKS:
            texts = [json.loads(line) for line in (made / f"{kind}-{task}.jsonl").read_text().splitlines()]
            assert len({text["question"] for text in texts}) == AMOUNT.problems
            assert ("<|solved|>" in texts[0]["answer"]) == (kind == "added")


def test_kept_problems_are_not_trained_on(made: Path) -> None:
    tokenizer = pair_texts.word_tokenizer(400)
    kind = real_pairs.Kind(1e-4, 1, 3, tasks=("table",))
    sides = real_pairs.Sides(added=False)
    rng = real_pairs.random.Random(5)
    first = sides.problem(rng.choice(kind.tasks), rng)["question"]
    make = real_pairs.Texts(tokenizer, sides, kind, (0, 1), frozenset([first]))
    tokens, wanted = make(real_pairs.random.Random(5))
    kept = [0, *tokenizer.encode(first, add_special_tokens=False).ids]
    assert all(row[: len(kept)] != kept for row in tokens.tolist())
    learnt = wanted[0][wanted[0] != training.IGNORED].tolist()
    assert learnt[-1] == 1
    assert tokenizer.decode(learnt[:-1]).startswith(" ")


def test_text_of_source_files(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.py").write_text(f"x = {number}\n" * 900)
    read, kept = real_pairs.text_files(tmp_path)
    assert not set(read) & set(kept)
    assert len(read) + len(kept) == 60
    text = real_pairs.Sides(False, tuple(kept)).problem("text", real_pairs.random.Random(0))
    assert not text["ends"]
    assert text["answer"]
    with pytest.raises(SystemExit, match="name another folder"):
        real_pairs.text_files(tmp_path / "none")


def test_only_learnt_places_pass_through_the_head(made: Path) -> None:
    model = solve.load(made / "small")
    tokens = torch.arange(24).reshape(2, 12)
    places = torch.tensor([3, 11, 12, 20])
    expected = model(input_ids=tokens).logits.flatten(0, 1)[places]
    assert torch.allclose(training.logits_of(model, tokens, places), expected, atol=1e-5)


def texts_of(made: Path, kind: str) -> dict[str, Any]:
    """Return the texts of a kind, by task."""
    return accuracy_real.tasks_of(made, json.loads((made / f"{kind}.json").read_text()), None)


def test_texts_are_measured_as_problems_are(made: Path) -> None:
    model = solve.load(made / "small")
    texts = texts_of(made, "small")["lists"]
    each = real_measure.each_text(model, texts)
    found = real_measure.summary(each)
    solved, likelihood = solve.scores_of(model, texts)
    assert found["solves"] == pytest.approx(solved)
    assert found["likelihood"] == pytest.approx(likelihood, abs=1e-4)
    assert found["likelihood_95"][0] <= found["likelihood"] <= found["likelihood_95"][1]
    assert [int(tokens) for tokens in each[:, 0]] == [len(answer) for _, answer in texts]
    assert real_measure.greedy_agrees(model, texts)["agree"] == len(texts)


def test_batches_hold_every_text_once(made: Path) -> None:
    texts = texts_of(made, "added")["table"]
    seen = []
    for numbers, tokens, wanted in real_measure.batches(texts, 2, 100):
        seen += numbers
        assert len(numbers) == 1 or tokens.numel() <= 100
        for row, number in enumerate(numbers):
            assert wanted[row][wanted[row] != -1].tolist() == texts[number][1]
    assert sorted(seen) == list(range(len(texts)))


def test_wilson() -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I.
    assert real_measure.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert real_measure.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


@pytest.fixture(scope="module")
def measured(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a run of some points."""
    out = tmp_path_factory.mktemp("measured")
    options = argparse.Namespace(
        device="cpu",
        workers=1,
        minutes=5.0,
        methods=["target", "deltadq", "svd, 4 bits"],
        ratios=[2.0],
        limit=4,
        calibration_tokens=64,
    )
    accuracy_real.run(made, "small", options, out / "small.jsonl")
    return [json.loads(line) for line in (out / "small.jsonl").read_text().splitlines()]


def test_a_run(measured: list[dict[str, Any]]) -> None:
    by_key = {record["key"]: record for record in measured}
    assert by_key["left out"]["points"] == []
    assert by_key["pair"]["greedy"]["lists"]["agree"] == 4
    assert by_key["pair"]["finetuned"]["lists"]["lost"] == 0
    for key in ("target-2-0", "deltadq-2-0", "svd-4-bits-2-0"):
        point = by_key[key]
        assert point["times"] >= 2
        assert set(point["tasks"]) == {"lists", "table"}
        for error, kept, outputs, _, _ in point["tensors"].values():
            assert error >= 0
            assert outputs is None or outputs >= 0
            # |D'|^2 = |D|^2 (error - 1 + 2 kept), which is not negative.
            assert error - 1 + 2 * kept >= -1e-3
    assert set(by_key["target-2-0"]["losses"]) <= {matrix["name"] for matrix in by_key["pair"]["matrices"]}


def test_errors_of_matrices(made: Path) -> None:
    tasks = texts_of(made, "small")
    measure = real_measure.Measure(made / "base", made / "small", tasks, torch.device("cpu"))
    nothing = measure.errors(measure.base)
    everything = measure.errors(measure.tuned)
    for name in measure.matrices:
        assert nothing[name][:2] == pytest.approx([1.0, 0.0], abs=1e-5)
        assert everything[name][:3] in ([0.0, 1.0, 0.0], [0.0, 1.0, None])
        assert nothing[name][2] in (None, pytest.approx(1.0, abs=1e-4))
    # To first order, the gradient says what the base loses.
    lost = measure.base_scores()
    tokens = {task: sum(len(answer) for _, answer in texts) for task, texts in tasks.items()}
    true = sum(lost[task]["lost"] * tokens[task] for task in tasks) / sum(tokens.values())
    foretold = sum(values[3] or 0.0 for values in nothing.values())
    assert foretold == pytest.approx(true, rel=0.1, abs=1e-5)


def test_the_strongest_direction() -> None:
    matrix = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    matrix[:, 0] *= 4
    largest = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    assert real_measure.strongest(matrix.T @ matrix) == pytest.approx(largest, rel=1e-3)


def test_points_in_order_of_worth() -> None:
    points = real_points.points_of(real_points.ALL, real_points.RATIOS)
    assert [point.ratio for point in points[:2]] == [64, 64]
    assert len({point.name for point in points}) == len(points)
    assert [point.seed for point in points if point.label == "deltadq" and point.ratio == 64] == [0, 1, 2]


def test_a_page_from_results(measured: list[dict[str, Any]]) -> None:
    pair = json.loads(json.dumps(accuracy_pages.condensed(measured)))
    assert "tensors" not in json.dumps(pair["points"])
    text = accuracy_pages.section(pair, "small")
    assert "| `target` |" in text
    assert "2 steps of 2 texts" in text
    assert "--target-ratio 2" in accuracy_pages.points_section(pair)
    assert accuracy_pages.drawn(pair, "small").startswith("<svg")
    page = "a\n<!-- small -->\nold\n<!-- end of small -->\nb\n"
    assert accuracy_pages.replaced(page, "small", "new") == "a\n<!-- small -->\n\nnew\n<!-- end of small -->\nb\n"
    with pytest.raises(SystemExit, match="has no part"):
        accuracy_pages.replaced(page, "large", "new")


def test_the_page_is_that_of_the_results() -> None:
    page = (accuracy_pages.DOCS / accuracy_pages.PAGE).read_text("utf-8")
    assert accuracy_pages.pages(accuracy_pages.DOCS, page) == page


def test_gain_kept() -> None:
    pair = {"finetuned": {"text": {"likelihood": -1.0}}, "base": {"text": {"likelihood": -1.5}}}
    assert accuracy_pages.gain_kept(pair, {"text": {"lost": 0.1}}) == pytest.approx(0.8)
    assert np.isclose(accuracy_pages.mean_of({"a": {"x": 1}, "b": {"x": 2}}, "x"), 1.5)
