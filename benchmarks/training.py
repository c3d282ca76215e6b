"""How the benchmarks' models are trained: batches that follow from a seed, and the loop over them."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Batch = tuple[torch.Tensor, torch.Tensor]
IGNORED = -100  # the target that cross entropy skips
ENOUGH = 0.995  # a fine-tune that solves this share twice in a row is done
WARM_UP = 100
# Kinds of models whose logits are the last hidden states times the head, and nothing else.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")
WORKERS = 4  # processes that make batches


@dataclass(frozen=True, slots=True)
class Batches(torch.utils.data.Dataset[Batch]):
    """The batches of one training; each follows from the seed and its number alone, whichever process makes it."""

    seed: str
    steps: int
    make: Callable[[random.Random], Batch]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.make(random.Random(f"{self.seed}/{step}"))


def logits_of(model: Any, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return a causal language model's logits [places, vocabulary] at some of a batch's places, counted row by row.

    Only these pass through the head if nothing happens behind it, which with a large vocabulary saves most of the work.
    """
    if model.config.model_type in PLAIN_HEADS:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden.flatten(0, 1)[places])
    return model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[places]


def train(
    model: Any,
    batches: Batches,
    rate: float,
    minutes: float,
    check: int = 0,
    measure: Callable[[], float] | None = None,
    decay: float = 0.0,
) -> int:
    """Train all of a model's weights: AdamW, warm-up, then a cosine down to a tenth of the rate.

    Args:
        model: a causal language model in float32; computes in bfloat16 on a GPU.
        batches: what it reads.
        rate: the highest learning rate.
        minutes: the schedule ends after this time, if it has not ended by its steps.
        check: steps between two calls of ``measure``.
        measure: the share of problems solved; twice in a row at least ENOUGH ends the training.
        decay: of the matrices' weights, times the rate.

    Returns:
        The steps that were taken.
    """
    device = model.device
    on_gpu = device.type == "cuda"
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    rest = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu)
    workers = min(WORKERS, len(os.sched_getaffinity(0)) - 1) if on_gpu else 0
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=on_gpu)
    start = time.perf_counter()
    last = 0.0
    taken = 0
    for step, (tokens, wanted) in enumerate(loader):
        done = max(step / batches.steps, (time.perf_counter() - start) / (60 * minutes))
        if done >= 1:
            print(f"  stopped after {minutes:.1f} minutes")
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARM_UP, 0.55 + 0.45 * math.cos(math.pi * done))
        learnt = (wanted.flatten() != IGNORED).nonzero().flatten()
        targets = wanted.flatten()[learnt].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = logits_of(model, tokens.to(device, non_blocking=True), learnt.to(device, non_blocking=True))
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken = step + 1
        if (step + 1) % (check or 250) and step + 1 < batches.steps:
            continue
        said = f"  step {step + 1:5} of {batches.steps}, {time.perf_counter() - start:4.0f} s, loss {loss.item():.4f}"
        if measure is None:
            print(said, flush=True)
            continue
        share = measure()
        print(f"{said}, solves {share:.3f}", flush=True)
        if min(share, last) >= ENOUGH:
            break
        last = share
    return taken
