"""What ``accuracy_real.py`` measures of a model: what it solves and says, and the errors of its matrices."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from solve import load
from training import logits_of

Weights = dict[str, torch.Tensor]
Texts = list[tuple[list[int], list[int]]]
Record = dict[str, Any]
LARGE, SMALL = 24576, 4096  # tokens of a batch on a GPU; on a processor, and where gradients are taken
SAMPLES = 1000  # of the bootstrap
NORMAL = 1.96
POWER = 30  # steps of an iteration
TEXT_TOKENS = 512  # of a plain text that are measured


def read_texts(tokenizer_file: Path, problems: Path, begin: int, end: int, limit: int | None) -> Texts:
    """Return the tokens of texts, what is read and what is to be written."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    found = []
    for line in problems.read_text("utf-8").splitlines()[:limit]:
        text = json.loads(line)
        sides = [tokenizer.encode(text[side], add_special_tokens=False).ids for side in ("question", "answer")]
        answer = [*sides[1], end] if text["ends"] else sides[1][:TEXT_TOKENS]
        found.append(([begin, *sides[0]], answer))
    return found


def batches(texts: Texts, pad: int, most: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Iterate over batches of like length and at most so many tokens.

    Gives the texts' numbers, their tokens, and the wanted next tokens or -1, int64 [batch, length]. Padding stands on
    the right, where a causal model does not look.
    """
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])), reverse=True)
    while order:
        length = sum(map(len, texts[order[0]]))
        numbers, order = order[: max(most // length, 1)], order[max(most // length, 1) :]
        tokens = torch.full((len(numbers), length), pad)
        wanted = torch.full((len(numbers), length), -1)
        for row, i in enumerate(numbers):
            question, answer = texts[i]
            whole = len(question) + len(answer)
            tokens[row, :whole] = torch.tensor(question + answer)
            wanted[row, len(question) - 1 : whole - 1] = torch.tensor(answer)
        yield numbers, tokens, wanted


@torch.no_grad()
def each_text(model: Any, texts: Texts) -> np.ndarray:
    """Return for each text: tokens, those that are the most likely ones, and the sum of log-likelihoods, float64."""
    found = np.zeros((len(texts), 3))
    for numbers, tokens, wanted in batches(
        texts, model.config.eos_token_id, LARGE if model.device.type == "cuda" else SMALL
    ):
        places = (wanted.flatten() != -1).nonzero().flatten()
        rows = places // wanted.shape[1]
        target = wanted.flatten()[places].to(model.device)
        logits = logits_of(model, tokens.to(model.device), places.to(model.device)).float()
        right = (logits.argmax(-1) == target).double().cpu()
        likelihood = -torch.nn.functional.cross_entropy(logits, target, reduction="none").double().cpu()
        for column, values in enumerate((torch.ones_like(right), right, likelihood)):
            sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, rows, values)
            found[numbers, column] = sums.numpy()
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's interval of 95% for a share of so many."""
    middle, square = share + NORMAL**2 / (2 * count), NORMAL**2 / count
    half = NORMAL * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)


def summary(each: np.ndarray, finetuned: np.ndarray | None = None) -> Record:
    """Return what a model does on the texts of a task, with intervals."""
    tokens, right, likelihood = each.T
    solved = float((tokens == right).mean())
    picks = np.random.default_rng(0).integers(0, len(each), (SAMPLES, len(each)))

    def interval(values: np.ndarray) -> list[float]:
        means = values[picks].sum(1) / tokens[picks].sum(1)
        return [round(float(bound), 6) for bound in np.quantile(means, (0.025, 0.975))]

    record = {
        "solves": round(solved, 5),
        "solves_95": [round(bound, 4) for bound in wilson(solved, len(each))],
        "agrees": round(float(right.sum() / tokens.sum()), 6),
        "likelihood": round(float(likelihood.sum() / tokens.sum()), 6),
        "likelihood_95": interval(likelihood),
    }
    if finetuned is not None:
        lost = finetuned[:, 2] - likelihood
        record |= {"lost": round(float(lost.sum() / tokens.sum()), 6), "lost_95": interval(lost)}
    return record


@torch.no_grad()
def greedy_agrees(model: Any, texts: Texts) -> Record:
    """Return how many texts greedy decoding solves, how many teacher forcing solves, and on how many both agree."""
    end = model.config.eos_token_id
    each = each_text(model, texts)
    forced = each[:, 0] == each[:, 1]
    width = max(len(question) for question, _ in texts)
    tokens = torch.tensor([[end] * (width - len(question)) + question for question, _ in texts])
    mask = torch.tensor([[0] * (width - len(question)) + [1] * len(question) for question, _ in texts])
    longest = max(len(answer) for _, answer in texts)
    out = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )[:, width:].tolist()
    decoded = np.array([row[: len(answer)] == answer for row, (_, answer) in zip(out, texts, strict=True)])
    return {
        "texts": len(texts),
        "greedy": int(decoded.sum()),
        "forced": int(forced.sum()),
        "agree": int((decoded == forced).sum()),
    }


def strongest(gram: torch.Tensor) -> float:
    """Return about the largest eigenvalue of a Gram matrix, from below, by power iteration."""
    vector = torch.ones(len(gram), device=gram.device)
    for _ in range(POWER):
        vector = gram @ (vector / vector.norm())
    return float(vector.norm())


class Measure:
    """Measures models of one pair on one device.

    Args:
        base, finetuned: folders of the checkpoints.
        tasks: texts by task.
        device: where.
    """

    def __init__(self, base: Path, finetuned: Path, tasks: Mapping[str, Texts], device: torch.device) -> None:
        self.tasks = dict(tasks)
        self.device = device
        self.model = load(finetuned).to(device)
        self.base, self.tuned = self._read(base), self._read(finetuned)
        self.matrices = [
            name
            for name, weight in self.tuned.items()
            if weight.ndim == 2
            and name in self.base
            and len(weight) >= len(self.base[name])
            and weight.shape[1] == self.base[name].shape[1]
            and not self._delta(self.tuned, name).eq(0).all()
        ]
        self.finetuned = self._each()
        self.moments, self.gradient, self.fisher = self._learn()

    def _read(self, folder: Path) -> Weights:
        from safetensors.torch import load_file

        weights: Weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path, device=str(self.device))
        return weights

    def _delta(self, weights: Weights, name: str) -> torch.Tensor:
        rows = len(self.base[name])
        return weights[name][:rows].float() - self.base[name].float()

    def _set(self, weights: Weights, factor: float = 1.0) -> None:
        """Give the model weights, of which the matrices' deltas are multiplied by a factor."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, weight in weights.items():
                state[name].copy_(weight)
                if factor != 1 and name in self.matrices:
                    base = self.base[name].float()
                    state[name][: len(base)].copy_((base + factor * self._delta(weights, name)).to(weight.dtype))

    def _each(self) -> dict[str, np.ndarray]:
        return {task: each_text(self.model, texts) for task, texts in self.tasks.items()}

    def scores(self, each: Mapping[str, np.ndarray]) -> Record:
        """Return the measures of every task."""
        return {task: summary(values, self.finetuned[task]) for task, values in each.items()}

    def base_scores(self) -> Record:
        """Return the measures of the base; new rows are the fine-tune's."""
        weights = {name: weight.clone() for name, weight in self.tuned.items()}
        for name, weight in self.base.items():
            weights[name][: len(weight)] = weight
        self._set(weights)
        return self.scores(self._each())

    def _learn(self) -> tuple[Weights, Weights, Weights]:
        """Return moments of the inputs, the gradient and mean squared gradients of batches, by the matrix's name."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        moments: Weights = {}
        kept: list[torch.Tensor] = []

        def add(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            rows = rows[kept[-1]] if len(rows) == len(kept[-1]) else rows
            moments[name] = moments.get(name, 0) + rows.T @ rows

        hooks = [
            module.register_forward_pre_hook(functools.partial(add, names[id(module.weight)]))
            for module in self.model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        parameters = {name: weight for name, weight in self.model.named_parameters() if name in set(self.matrices)}
        gradient = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
        fisher = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
        count = tokens_read = 0
        for texts in self.tasks.values():
            for _, tokens, wanted in batches(texts, self.model.config.eos_token_id, SMALL):
                last = wanted.shape[1] - (wanted != -1).flip(1).int().argmax(1)
                kept.append((torch.arange(tokens.shape[1]) < last[:, None]).flatten().to(self.device))
                places = (wanted.flatten() != -1).nonzero().flatten()
                logits = logits_of(self.model, tokens.to(self.device), places.to(self.device)).float()
                target = wanted.flatten()[places].to(self.device)
                loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
                found = torch.autograd.grad(loss, list(parameters.values()))
                for name, values in zip(parameters, found, strict=True):
                    gradient[name] -= values
                    fisher[name] += values.square() / len(places)
                count += 1
                tokens_read += len(places)
        for hook in hooks:
            hook.remove()
        return (
            moments,
            {name: values / tokens_read for name, values in gradient.items()},
            {name: values / tokens_read * count for name, values in fisher.items()},
        )

    def described(self) -> list[Record]:
        """Return what is the same for all files: every matrix's shape, norms and spectrum.

        ``strongest`` is the share of a delta's squares in one direction; ``rank`` is |D|^4 over the sum of the
        singular values' fourth powers; ``outputs`` is |D X|^2.
        """
        found = []
        for name in self.matrices:
            delta, base = self._delta(self.tuned, name), self.base[name].float()
            row: Record = {
                "name": name,
                "shape": list(delta.shape),
                "base": float(base.norm()),
                "delta": float(delta.norm()),
            }
            gram = delta.T @ delta
            row["strongest"] = strongest(gram) / row["delta"] ** 2
            row["rank"] = row["delta"] ** 4 / float(gram.square().sum())
            if name in self.moments:
                row["outputs"] = float(((delta @ self.moments[name]) * delta).sum())
            found.append({key: _short(value) if isinstance(value, float) else value for key, value in row.items()})
        return found

    @torch.no_grad()
    def errors(self, weights: Weights) -> dict[str, list[float | None]]:
        """Return the errors of every matrix, as the module's docstring lists them."""
        found: dict[str, list[float | None]] = {}
        for name in self.matrices:
            true = self._delta(self.tuned, name)
            lost = true - self._delta(weights, name)
            squares = float(true.square().sum())
            rows = len(true)
            outputs = None
            if name in self.moments:
                inputs = self.moments[name]
                outputs = float(((lost @ inputs) * lost).sum() / ((true @ inputs) * true).sum())
            values = [
                float(lost.square().sum()) / squares,
                float(((true - lost) * true).sum()) / squares,
                outputs,
                float((self.gradient[name][:rows] * lost).sum()),
                float((self.fisher[name][:rows] * lost.square()).sum()),
            ]
            found[name] = [None if value is None else _short(value) for value in values]
        return found

    def of(self, folder: Path, factors: tuple[float, ...]) -> Record:
        """Return the measures of an unpacked model."""
        weights = self._read(folder)
        self._set(weights)
        record: Record = {"tasks": self.scores(self._each()), "tensors": self.errors(weights)}
        for factor in factors:
            self._set(weights, factor)
            record.setdefault("scaled", {})[f"{factor:g}"] = self.scores(self._each())
        return record


def _short(value: float) -> float:
    return float(f"{value:.5g}")
