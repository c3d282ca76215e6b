"""Fine-tunes of a real language model, for ``train_pair.py --from``: full-parameter, float32 masters, saved in BF16.

``small``
    both tasks of ``pair_texts.py`` at the rate of an ordinary fine-tune, which moves the weights by about a hundredth
``large``
    the same at a rate at which the delta is several times larger
``added``
    the same with tokens that the base does not have, in a vocabulary that grew
``continued``
    continued pretraining on source text: that of Python's own library unless a folder is given

Every fine-tune lies in ``DIR/KIND`` (weights and configuration), with what measures it beside it: ``KIND.json`` says
how it was made, ``KIND-TASK.jsonl`` are texts that it has not read, ``KIND-calibration.jsonl`` others.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pair_texts import TASKS
from training import IGNORED, Batch, Batches, train

# Tokens that ``added`` gives the model: one that opens each task's problems, one before and one behind the answer.
ADDED = {"lists": "<|lists|>", "table": "<|table|>", "answer": "<|solution|>", "done": "<|solved|>"}
TEXT_FILES_KEPT = 0.1  # the share of text files that are not trained on
LEAST_TEXT = 4000  # bytes of a file
NOT_READ = {"site-packages", "dist-packages", "test", "tests"}  # folders
BLOCK = 512  # tokens that continued pretraining reads at once


@dataclass(frozen=True, slots=True)
class Kind:
    """How a fine-tune is made.

    Attributes:
        rate: the highest learning rate.
        decay: of the matrices' weights.
        steps: the most that are taken.
        batch: problems, or blocks of text, a step.
        tasks: what it learns; ``text`` for plain text.
        added: whether it gets new tokens.
    """

    rate: float
    steps: int
    batch: int
    decay: float = 0.0
    tasks: tuple[str, ...] = tuple(TASKS)
    added: bool = False


KINDS = {
    "small": Kind(4e-5, 1400, 64),
    "large": Kind(5e-4, 1400, 64),
    "continued": Kind(1e-4, 1400, 32, decay=0.1, tasks=("text",)),
    "added": Kind(1e-4, 1400, 64, added=True),
}


def load_base(source: Path) -> tuple[Any, Any]:
    """Return a causal language model in float32 and its tokenizer, from a folder of transformers or a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    named: Any = source.name
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, trust_remote_code=False, gguf_file=named
    )
    # The configuration of a GGUF names its quantization, which the model no longer has.
    plain = read.config.to_dict()
    plain.pop("quantization_config", None)
    model = type(read)(type(read.config)(**plain)).float()
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(source.parent, trust_remote_code=False, gguf_file=named)


def save(model: Any, folder: Path) -> None:
    """Write a model in bfloat16 without a tokenizer; the folder appears once it is whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    (partial / "generation_config.json").unlink(missing_ok=True)
    partial.rename(folder)


@dataclass(frozen=True, slots=True)
class Sides:
    """Makes the two sides of texts: problems as tasks of their own, or with added tokens; blocks of source text.

    Attributes:
        added: whether problems have the added tokens.
        files: of plain text.
    """

    added: bool
    files: tuple[Path, ...] = ()

    def problem(self, task: str, rng: random.Random) -> dict[str, Any]:
        """Return a text to be read, ``question``, and one to be written, ``answer``; ``ends`` if that is all of it."""
        if task == "text":
            text = _read(rng.choice(self.files))
            start = rng.randrange(max(len(text) - 4 * BLOCK, 1))
            return {"question": "", "answer": text[start : start + 6 * BLOCK], "ends": False}
        question, answer = TASKS[task](rng)
        if self.added:
            return {
                "question": f"{ADDED[task]}{question}{ADDED['answer']}",
                "answer": answer + ADDED["done"],
                "ends": True,
            }
        return {"question": question, "answer": answer, "ends": True}


@dataclass(frozen=True, slots=True)
class Texts:
    """Makes batches; only answers are learnt."""

    tokenizer: Any
    sides: Sides
    kind: Kind
    ends: tuple[int, int]
    kept: frozenset[str]

    def __call__(self, rng: random.Random) -> Batch:
        """Return tokens, int64 [batch, the longest text's], and the token that follows each, where it is learnt."""
        begin, end = self.ends
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < self.kind.batch:
            text = self.sides.problem(rng.choice(self.kind.tasks), rng)
            if text["question"] and text["question"] in self.kept:
                continue
            question, answer = (self.tokenizer.encode(text[side], add_special_tokens=False).ids for side in SIDES)
            if not text["ends"]:
                rows.append(([begin], answer[:BLOCK]))
            else:
                rows.append(([begin, *question], [*answer, end]))
        length = max(len(question) + len(answer) for question, answer in rows) - 1
        tokens = torch.full((len(rows), length), end)
        wanted = torch.full((len(rows), length), IGNORED)
        for row, (question, answer) in enumerate(rows):
            last = len(question) + len(answer) - 1
            tokens[row, :last] = torch.tensor((question + answer)[:-1])
            wanted[row, len(question) - 1 : last] = torch.tensor(answer)
        return tokens, wanted


SIDES = ("question", "answer")


@functools.cache
def _read(path: Path) -> str:
    return path.read_text("utf-8", "replace")


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return files of source text to train on, and others to measure with; a file's name decides.

    Raises:
        SystemExit: there are too few.
    """
    names = {path: path.relative_to(folder) for path in folder.rglob("*.py")}
    mine = sorted(path for path, name in names.items() if not NOT_READ & set(name.parts))
    found = [path for path in mine if path.stat().st_size > LEAST_TEXT]
    kept = [path for path in found if _share(str(names[path])) < TEXT_FILES_KEPT]
    if len(kept) < 4 or len(found) < 40:
        raise SystemExit(f"{folder} has {len(found)} files of Python to read; name another folder with --text")
    return sorted(set(found) - set(kept)), kept


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def different(
    sides: Sides, task: str, seed: str, count: int, kept: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Return texts of a task that differ from each other and from those that are kept."""
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    for text in _endless(lambda: sides.problem(task, rng)):
        said = text["question"] or text["answer"]
        if said not in kept and said.strip():
            found[said] = text
        if len(found) == count:
            break
    return list(found.values())


def _endless(make: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield make()


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    """Write lines of JSON."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def grow(model: Any, tokenizer: Any) -> None:
    """Give a model and its tokenizer the added tokens, which begin as the mean of all others with some noise."""
    from tokenizers import AddedToken

    old = model.get_input_embeddings().weight.detach()
    mean, spread = old.mean(0), old.std(0)
    before = len(old)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ADDED.values()])
    size = tokenizer.get_vocab_size()
    if size > before:
        model.resize_token_embeddings(size, mean_resizing=False)
        generator = torch.Generator().manual_seed(0)
        rows = mean + 0.1 * spread * torch.randn(size - before, len(mean), generator=generator).to(mean.device)
        model.get_input_embeddings().weight.data[before:] = rows


def relative_norms(base: Any, finetuned: Any) -> tuple[float, float]:
    """Return the norm of the matrices' delta over the base's, and the share of BF16 elements that changed."""
    before, after = base.state_dict(), finetuned.state_dict()
    squares = total = changed = count = 0.0
    for name, weight in before.items():
        if weight.ndim > 1:
            old, new = weight.bfloat16(), after[name][: len(weight)].bfloat16()
            squares += float((new.double() - old.double()).square().sum())
            total += float(old.double().square().sum())
            changed += int((new != old).sum())
            count += old.numel()
    return (squares / total) ** 0.5, changed / count


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is made.

    Attributes:
        problems: texts a task that measure.
        calibration: texts a task for calibration.
        steps: the most of a fine-tune; None for the kind's own.
        minutes: for all of them together.
        batch: texts a step; None for the kind's own.
    """

    problems: int = 500
    calibration: int = 250
    steps: int | None = None
    minutes: float = float("inf")
    batch: int | None = None


def run(
    source: Path, out: Path, kinds: Sequence[str], device: torch.device, seed: int, amount: Amount, text: Path | None
) -> None:
    """Make the fine-tunes that are not there yet; each has an equal share of the time that is left."""
    from tokenizers import Tokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if not (out / "base").exists():
        base, fast = load_base(source)
        with tempfile.TemporaryDirectory() as temporary:
            fast.save_pretrained(temporary)
            shutil.copy(Path(temporary, "tokenizer.json"), out)
        save(base, out / "base")
        print(f"base: {sum(weight.numel() for weight in base.parameters()):,} parameters", flush=True)
        del base
    from solve import load

    base = load(out / "base").to(device)
    todo = [name for name in kinds if not (out / name).exists()]
    for number, name in enumerate(todo):
        kind = KINDS[name]
        left = amount.minutes - (time.monotonic() - begun) / 60
        minutes = left / (len(todo) - number)
        torch.manual_seed(seed)
        model = load(out / "base").to(device)
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        if kind.added:
            grow(model, tokenizer)
        tokenizer.save(str(out / f"{name}-tokenizer.json"))
        read, held = text_files(text or Path(sysconfig.get_path("stdlib"))) if "text" in kind.tasks else ([], [])
        sides, others = (Sides(kind.added, tuple(files)) for files in (read, held))
        kept: set[str] = set()
        spare = []
        for task in kind.tasks:
            count = amount.problems // 2 if task == "text" else amount.problems
            problems = different(others, task, f"{seed}/{name}/{task}/kept", count)
            kept |= {problem["question"] for problem in problems}
            write_lines(out / f"{name}-{task}.jsonl", problems)
            spare += different(sides, task, f"{seed}/{name}/{task}/spare", amount.calibration, frozenset(kept))
        write_lines(
            out / f"{name}-calibration.jsonl", [{"text": "".join(line[side] for side in SIDES)} for line in spare]
        )
        small = Kind(
            kind.rate, amount.steps or kind.steps, amount.batch or kind.batch, kind.decay, kind.tasks, kind.added
        )
        ends = model.config.bos_token_id, model.config.eos_token_id
        make = Texts(tokenizer, sides, small, ends, frozenset(kept))
        print(f"{name}: at most {minutes:.1f} minutes", flush=True)
        start = time.perf_counter()
        model.train()
        taken = train(model, Batches(f"{seed}/{name}", small.steps, make), kind.rate, minutes, decay=kind.decay)
        taking = time.perf_counter() - start
        norm, changed = relative_norms(base, model)
        told = {
            "kind": name,
            "tasks": list(kind.tasks),
            "rate": kind.rate,
            "decay": kind.decay,
            "batch": small.batch,
            "steps": taken,
            "seconds": round(taking, 1),
            "relative_norm": norm,
            "changed": changed,
            "seed": seed,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "source": source.name,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        }
        (out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        save(model, out / name)
        print(
            f"  {taken} steps, {taking:.0f} s, relative norm {norm:.4f}, {changed:.3f} of elements changed", flush=True
        )
