"""Calibrated methods on a real fine-tune, each block reading what the fine-tune gives it or what is stored.

    python benchmarks/calibrated.py MODELS_FOLDER [--pair wordmath] [--limit 300] [--tokens 8192] [SETTING ...]

The second half of the pair's problems is the calibration text, the first ``--limit`` ones are solved. Beside the share
that is solved: the mean log-likelihood of a token of their answers, and the error of the last hidden states relative to
the fine-tune's own, |H - H'| / |H'| over all tokens. A SETTING is as ``accuracy.py`` has it. Needs torch and
transformers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Figure, report
from points import method_of
from solve import PAD, Problem, batches, load, read_problems, scores_of

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint

SETTINGS = (
    "sparsegpt",
    "sparsegpt:nm=2:16,bits=3",
    "sparsegpt:nm=1:8,bits=2",
    "sparsegpt:nm=1:16,bits=4",
    "gptq:bits=1",
    "delta-come:bits_per_weight=0.5",
)


class Judge:
    """Compares models with the fine-tune on problems.

    Args:
        finetuned: its folder.
        problems: tokens of questions and answers.
    """

    def __init__(self, finetuned: Path, problems: list[Problem]) -> None:
        self.problems = problems
        self.expected = list(self._hidden(load(finetuned)))

    def _hidden(self, model: Any) -> Iterator[Any]:
        """Give the last hidden states of each batch's tokens."""
        import torch

        for tokens, _ in batches(self.problems):
            with torch.no_grad():
                yield model.model(input_ids=tokens).last_hidden_state[tokens != PAD]

    def judge(self, folder: Path) -> tuple[float, float, float]:
        """Return a model's share of problems solved, mean log-likelihood and error of hidden states."""
        model = load(folder)
        lost = whole = 0.0
        for hidden, expected in zip(self._hidden(model), self.expected, strict=True):
            lost += float((hidden - expected).square().sum())
            whole += float(expected.square().sum())
        return *scores_of(model, self.problems), (lost / whole) ** 0.5


def measure(folder: Path, settings: list[str], limit: int, tokens: int, rules: list[str]) -> list[Figure]:
    """Pack with every setting, one way and the other, unpack and compare; three figures each."""
    base, finetuned, tokenizer = folder / "base", folder / "math", folder / "tokenizer.json"
    lines = (folder / "eval.jsonl").read_text("utf-8").splitlines()
    half = len(lines) // 2
    if limit > half:
        raise SystemExit(f"--limit {limit}: the text begins with problem {half}")
    judge = Judge(finetuned, read_problems(tokenizer, folder / "eval.jsonl", limit))
    for name in (finetuned, base):
        share, likelihood, error = judge.judge(name)
        print(f"{name.name} itself  solves {share:.3f}  {likelihood:.5f}  {error:.4f}", flush=True)
    weights = Checkpoint(finetuned).file_bytes
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.jsonl"
        text.write_text("\n".join(lines[half:]), "utf-8")
        for setting in settings:
            for sequential in (False, True):
                delta, model = Path(temporary) / "packed.deltafmt", Path(temporary) / "unpacked"
                how = deltafmt.Calibration(text, tokens, device="cpu", tokenizer=tokenizer, sequential=sequential)
                start = time.perf_counter()
                size = deltafmt.pack(
                    base,
                    finetuned,
                    delta,
                    method=method_of(setting),
                    rules=[(pattern, None) for pattern in rules],
                    calibration=how,
                    force=True,
                ).size
                taken = time.perf_counter() - start
                deltafmt.unpack(base, delta, model, force=True)
                share, likelihood, error = judge.judge(model)
                name = f"{setting}{' --sequential' if sequential else ''}"
                note = f"{size:,} bytes, {weights / size:.2f} times smaller, packed in {taken:.1f} s"
                figures += [
                    Figure(f"{name}: solves", share, "of 1", note=note),
                    Figure(f"{name}: mean log-likelihood", likelihood, "nats"),
                    Figure(f"{name}: error of the hidden states", error, "of 1"),
                ]
                print(f"{name}  {note}  solves {share:.3f}  {likelihood:.5f}  {error:.4f}", flush=True)
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS_FOLDER", help="folder that holds the pair's folder")
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="METHOD", help="such as gptq:bits=2")
    parser.add_argument("--pair", default="wordmath", help="name of the pair's folder (wordmath)")
    parser.add_argument("--limit", type=int, default=300, help="problems to solve (300)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that are read (8192)")
    parser.add_argument("--exact", action="append", default=[], metavar="PATTERN", help="store these whole")
    options = parser.parse_intermixed_args()
    for setting in options.settings:
        method_of(setting)
    figures = measure(options.models / options.pair, options.settings, options.limit, options.tokens, options.exact)
    report("calibrated", figures, limit=options.limit, tokens=options.tokens, exact=options.exact)


if __name__ == "__main__":
    main()
