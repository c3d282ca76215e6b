"""Serve several fine-tunes of one base in one batch, and print what that takes in memory.

The repository has one fine-tune, so it is packed twice, with two settings: two deltas stand for two fine-tunes. The
program runs on a GPU if there is one. Run it with ``python examples/serve.py``; ``docs/how-to/serve.md`` explains it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from deltafmt.methods import DeltaDQ

NANO = Path(__file__).resolve().parent / "nano"
BOS, PAD = 0, 2
PROBLEMS = 4
TOKENS = 56

# Rows of 128 columns are too short for random dropout, so nothing is dropped; 4 bits and 3.
DELTAS = {"math-4bit": DeltaDQ(2, 2, 4), "math-3bit": DeltaDQ(2, 2, 3)}


def ask(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Return the answers that a model generates, one for each question."""
    import torch

    rows = [[BOS, *tokenizer.encode(question, add_special_tokens=False).ids] for question in questions]
    longest = max(map(len, rows))
    padded = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=model.device)
    found = model.generate(padded, attention_mask=(padded != PAD).long(), max_new_tokens=TOKENS, do_sample=False)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in found[:, longest:].tolist()]


def main() -> None:
    """Run the example."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import deltafmt.transformers

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = (
        AutoModelForCausalLM.from_pretrained(NANO / "base", dtype=torch.bfloat16, trust_remote_code=False)
        .eval()
        .to(device)
    )
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    lines = (NANO / "eval.jsonl").read_text("utf-8").splitlines()[:PROBLEMS]
    problems = [json.loads(line) for line in lines]

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.deltafmt" for name in DELTAS}
        for name, method in DELTAS.items():
            packed = deltafmt.pack(NANO / "base", NANO / "math", files[name], method=method)
            print(f"{name}: {packed.size:,} bytes, {packed.ratio:.2f} times smaller than the fine-tune")

        model = deltafmt.transformers.attach(base, files)
        names = [None, *DELTAS]
        # One batch: every question to the base and to each fine-tune.
        rows = [(problem, name) for problem in problems for name in names]
        with model.delta([name for _, name in rows]):
            answers = ask(model, tokenizer, [problem["question"] for problem, _ in rows])

        solved = dict.fromkeys(names, 0)
        for (problem, name), answer in zip(rows, answers, strict=True):
            if name is None:
                print(f"\n{problem['question'].strip()}")
            right = answer == problem["answer"].strip()
            solved[name] += right
            print(f"  {name or 'base':10} {'right' if right else 'wrong'}  {answer[:70]!r}")

        weights = sum(parameter.nbytes for parameter in model.parameters())
        resident = model.deltas.residency.used
        print(f"\nsolved of {PROBLEMS}: " + ", ".join(f"{name or 'base'} {count}" for name, count in solved.items()))
        print(f"on {device}: base {weights:,} bytes, two deltas {resident:,}; as two models {2 * weights:,} more")
        deltafmt.transformers.detach(model)
    if solved[None] or not all(solved[name] for name in DELTAS):
        sys.exit("the base should solve none and the fine-tunes some")


if __name__ == "__main__":
    main()
