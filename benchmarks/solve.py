"""Accuracy of a checkpoint on word problems: the share whose whole worked solution is predicted.

Teacher forcing: a problem counts as solved when every token of its answer, and the end token after it, is the most
likely one given the true tokens before it; greedy decoding solves exactly those problems.

    python benchmarks/solve.py MODEL_FOLDER TOKENIZER.json EVAL.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOS, EOS, PAD = 0, 1, 2
BATCH = 100

Problem = tuple[list[int], list[int]]


def accuracy(model_folder: Path, tokenizer_file: Path, problems_file: Path, limit: int | None = None) -> float:
    """Return the share of problems that a checkpoint solves, 0 to 1.

    Args:
        model_folder: a folder that transformers loads as a causal language model.
        tokenizer_file: a ``tokenizer.json``.
        problems_file: lines of JSON with ``question`` and ``answer``.
        limit: use the first problems only.
    """
    return accuracy_of(load(model_folder), read_problems(tokenizer_file, problems_file, limit))


def load(model_folder: Path) -> Any:
    """Load a causal language model in float32, quietly."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, trust_remote_code=False).eval()


def read_problems(tokenizer_file: Path, problems_file: Path, limit: int | None = None) -> list[Problem]:
    """Return the tokens of problems, question and answer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    encoded = []
    for line in problems_file.read_text("utf-8").splitlines()[:limit]:
        problem = json.loads(line)
        question = [BOS, *tokenizer.encode(problem["question"], add_special_tokens=False).ids]
        answer = [*tokenizer.encode(problem["answer"], add_special_tokens=False).ids, EOS]
        encoded.append((question, answer))
    return encoded


def accuracy_of(model: Any, problems: list[Problem]) -> float:
    """Return the share of problems that a loaded model solves, 0 to 1."""
    return scores_of(model, problems)[0]


def batches(problems: list[Problem]) -> Iterator[tuple[Any, Any]]:
    """Iterate over problems as tensors, [batch, length]: their tokens, and the wanted next token or -1.

    Padding stands on the right, where a causal model does not look.
    """
    import torch

    # Batches of like length waste little on padding.
    ordered = sorted(problems, key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        length = max(len(question) + len(answer) for question, answer in batch)
        tokens = torch.full((len(batch), length), PAD)
        wanted = torch.full((len(batch), length), -1)
        for row, (question, answer) in enumerate(batch):
            end = len(question) + len(answer)
            tokens[row, :end] = torch.tensor(question + answer)
            wanted[row, len(question) - 1 : end - 1] = torch.tensor(answer)
        yield tokens, wanted


def scores_of(model: Any, problems: list[Problem]) -> tuple[float, float]:
    """Return the share of problems that a loaded model solves, and the mean log-likelihood of the answers' tokens."""
    import torch

    solved = count = 0
    total = 0.0
    with torch.no_grad():
        for tokens, wanted in batches(problems):
            logits = model(input_ids=tokens.to(model.device)).logits
            target = wanted.to(model.device)
            solved += int(((logits.argmax(-1) == target) | (target == -1)).all(1).sum())
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), target.flatten(), ignore_index=-1, reduction="sum"
            )
            total -= float(loss)
            count += int((wanted != -1).sum())
    return solved / len(problems), total / count


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(f"{accuracy(*map(Path, sys.argv[1:])):.3f}")
