"""Train a small base model on generated texts, and full-parameter fine-tunes of it that each solve a task.

    python benchmarks/train_pair.py --out DIR [--device cuda] [--seed 0] [--small]
    python benchmarks/train_pair.py --from MODEL --out DIR [--kinds small large continued added] [--minutes M]

writes ``DIR/base``, ``DIR/lists`` and ``DIR/table`` (folders that transformers loads, bf16), ``DIR/tokenizer.json``,
``DIR/eval-lists.jsonl`` and ``DIR/eval-table.jsonl``, whose problems none of them has trained on. Then, for example,

    python benchmarks/solve.py DIR/lists DIR/tokenizer.json DIR/eval-lists.jsonl

``--from`` makes fine-tunes of a real model instead, a folder of transformers or a GGUF file; ``real_pairs.py`` says
which, and ``accuracy_real.py`` measures what methods keep of them.

A model whose folder is there already is kept, so that a run that was cut off goes on with the next one. The same seed,
device and steps give the same weights, unless ``--minutes`` cuts the training short. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch where sums must not depend on timing
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import real_pairs
import torch
from pair_texts import TASKS, plain_text, word_tokenizer
from solve import BOS, EOS, PAD, accuracy_of, load, read_problems
from training import IGNORED, Batch, Batches, train


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is, and how long it is trained.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads: as in a Llama's configuration.
        batch: texts a step.
        block: tokens of plain text the base reads at once.
        base_steps, tune_steps: steps of the base, and the most that a fine-tune takes.
        base_rate, tune_rate: the highest learning rate of each.
        check: steps between two measurements of a fine-tune's accuracy.
        problems: how many problems are kept for measuring.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    batch: int
    block: int
    base_steps: int
    tune_steps: int
    base_rate: float
    tune_rate: float
    check: int
    problems: int


FULL = Size(384, 1024, 8, 6, 3, 256, 160, 4000, 4000, 1e-3, 3e-4, 250, 1000)
SMALL = Size(128, 256, 2, 4, 2, 32, 96, 120, 60, 3e-3, 1e-3, 30, 50)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Makes batches of plain text: texts one after another, cut into blocks."""

    tokenizer: Any
    size: Size

    def __call__(self, rng: random.Random) -> Batch:
        """Return tokens, int64 [batch, block], and the token that follows each."""
        rows = []
        for _ in range(self.size.batch):
            row: list[int] = []
            while len(row) <= self.size.block:
                row += [BOS, *self.tokenizer.encode(plain_text(rng), add_special_tokens=False).ids, EOS]
            rows.append(row[: self.size.block + 1])
        tokens = torch.tensor(rows)
        return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True, slots=True)
class Problems:
    """Makes batches of a task's problems, none of them among those kept for measuring; only answers are learnt."""

    tokenizer: Any
    size: Size
    task: str
    kept: frozenset[str]

    def __call__(self, rng: random.Random) -> Batch:
        """Return tokens, int64 [batch, the longest problem's], and the token that follows each, where it is learnt."""
        pairs: list[tuple[str, str]] = []
        while len(pairs) < self.size.batch:
            pair = TASKS[self.task](rng)
            if pair[0] not in self.kept:
                pairs.append(pair)
        sides = [self.tokenizer.encode_batch(list(side), add_special_tokens=False) for side in zip(*pairs, strict=True)]
        encoded = [([BOS, *question.ids], [*answer.ids, EOS]) for question, answer in zip(*sides, strict=True)]
        length = max(len(question) + len(answer) for question, answer in encoded) - 1
        tokens = torch.full((len(encoded), length), PAD)
        wanted = torch.full((len(encoded), length), IGNORED)
        for row, (question, answer) in enumerate(encoded):
            end = len(question) + len(answer) - 1
            tokens[row, :end] = torch.tensor((question + answer)[:-1])
            wanted[row, len(question) - 1 : end] = torch.tensor(answer)
        return tokens, wanted


def new_model(size: Size, vocabulary: int) -> Any:
    """Return a Llama with random weights, float32, its embedding tied to its head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=math.ceil(vocabulary / 64) * 64,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model in bfloat16 with its tokenizer, in shards of 16 MB; the folder appears once it is whole."""
    from transformers import PreTrainedTokenizerFast

    partial = folder.with_name(f"{folder.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial, max_shard_size="16MB")
    words = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(partial)
    partial.rename(folder)


def write_problems(task: str, seed: str, count: int, path: Path) -> frozenset[str]:
    """Write different problems as lines of JSON, and return their questions."""
    rng = random.Random(seed)
    problems = {}
    while len(problems) < count:
        question, answer = TASKS[task](rng)
        problems[question] = answer
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in problems.items()]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return frozenset(problems)


def relative_norm(base: Any, finetuned: Any) -> float:
    """Return the Frobenius norm of the matrices' delta over that of the base's."""
    before, after = base.state_dict(), finetuned.state_dict()
    pairs = [(after[name].double(), weight.double()) for name, weight in before.items() if weight.ndim > 1]
    return math.sqrt(
        sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    )


def run(out: Path, size: Size, tasks: Sequence[str], device: torch.device, seed: int, minutes: float) -> bool:
    """Train what is not there yet, measure all of it, and say whether the fine-tunes solve what the base does not."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    share = minutes / (2 + len(tasks))
    if not (out / "base").exists():
        torch.manual_seed(seed)
        model = new_model(size, tokenizer.get_vocab_size()).to(device)
        print(f"base: {sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
        train(
            model,
            Batches(f"{seed}/base", size.base_steps, Blocks(tokenizer, size)),
            size.base_rate,
            2 * share,
            decay=0.1,
        )
        save(model, tokenizer, out / "base")
    for task in tasks:
        kept = write_problems(task, f"{seed}/{task}/kept", size.problems, out / f"eval-{task}.jsonl")
        if (out / task).exists():
            continue
        watched = out / f"{task}.partial.jsonl"
        kept |= write_problems(task, f"{seed}/{task}/watched", min(200, size.problems), watched)
        problems = read_problems(out / "tokenizer.json", watched)
        watched.unlink()
        print(f"{task}:", flush=True)
        model = load(out / "base").to(device)
        batches = Batches(f"{seed}/{task}", size.tune_steps, Problems(tokenizer, size, task, kept))
        train(model, batches, size.tune_rate, share, size.check, lambda: accuracy_of(model, problems))  # noqa: B023
        save(model, tokenizer, out / task)
    base = load(out / "base").to(device)
    good = True
    print()
    for task in tasks:
        finetuned = load(out / task).to(device)
        problems = read_problems(out / "tokenizer.json", out / f"eval-{task}.jsonl")
        before, after = accuracy_of(base, problems), accuracy_of(finetuned, problems)
        norm = relative_norm(base, finetuned)
        print(f"{task}: base solves {before:.3f}, fine-tune solves {after:.3f}, relative norm of the delta {norm:.3f}")
        good &= before <= 0.02 and after >= 0.97
    return good


def main() -> None:
    """Train the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the models to")
    parser.add_argument("--device", help="torch's name of a device (cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and texts (0)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="fine-tunes to make (all)")
    parser.add_argument("--steps", type=int, help=f"steps of the base ({FULL.base_steps}; --small: {SMALL.base_steps})")
    parser.add_argument(
        "--tune-steps", type=int, help=f"most steps of a fine-tune ({FULL.tune_steps}; --small: {SMALL.tune_steps})"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="end all trainings within this time (no limit)")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model that learns little, within a minute on a CPU"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="MODEL", help="fine-tune this model, or a GGUF file"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(real_pairs.KINDS), help="fine-tunes of MODEL (all)")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="Python sources to read (Python's own library)")
    options = parser.parse_args()
    if options.source is None and (options.kinds or options.text):
        parser.error("--kinds and --text go with --from")
    if options.source and (options.steps or options.tasks != list(TASKS)):
        parser.error(
            "--steps and --tasks are of a base trained from nothing; with --from, give --tune-steps and --kinds"
        )
    size = SMALL if options.small else FULL
    given = {"base_steps": options.steps, "tune_steps": options.tune_steps}
    size = replace(size, **{name: steps for name, steps in given.items() if steps is not None})
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")
    if options.source:
        few = {"problems": SMALL.problems, "calibration": 8, "steps": 4, "batch": 4} if options.small else {}
        amount = real_pairs.Amount(minutes=options.minutes, **few)
        amount = replace(amount, steps=options.tune_steps or amount.steps)
        kinds = options.kinds or list(real_pairs.KINDS)
        real_pairs.run(options.source, options.out, kinds, device, options.seed, amount, options.text)
        return
    good = run(options.out, size, options.tasks, device, options.seed, options.minutes)
    if not good and not options.small:
        sys.exit("not good enough for a benchmark: train longer (--steps, --tune-steps)")


if __name__ == "__main__":
    main()
