"""Accuracy of a checkpoint on word problems: the share whose whole worked solution is predicted.

Teacher forcing: a problem counts as solved when every token of its answer, and the end token after it, is the most
likely one given the true tokens before it; greedy decoding solves exactly those problems.

    python benchmarks/solve.py MODEL_FOLDER TOKENIZER.json EVAL.jsonl
"""

from __future__ import annotations

import json
import os
import sys
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
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


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
    import torch

    # Batches of like length waste little on padding.
    ordered = sorted(problems, key=lambda pair: len(pair[0]) + len(pair[1]))
    solved = 0
    with torch.no_grad():
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            length = max(len(question) + len(answer) for question, answer in batch)
            tokens = torch.full((len(batch), length), PAD)
            wanted = torch.full((len(batch), length), -1)
            for row, (question, answer) in enumerate(batch):
                end = len(question) + len(answer)
                tokens[row, :end] = torch.tensor(question + answer)
                wanted[row, len(question) - 1 : end - 1] = torch.tensor(answer)
            # Padding stands on the right, where a causal model does not look.
            guess = model(input_ids=tokens.to(model.device)).logits.argmax(-1).cpu()
            solved += int(((guess == wanted) | (wanted == -1)).all(1).sum())
    return solved / len(problems)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(f"{accuracy(*map(Path, sys.argv[1:])):.3f}")
