"""What choosing methods for a target costs, and how close foretold losses are to measured ones.

    python benchmarks/targets.py [PAIR_FOLDER] [--ratio R] [--measured]

PAIR_FOLDER holds ``base`` and ``math``, such as ``MODELS/wordmath``. Without it, a pair of 100 million random
parameters in the shapes of a Llama is written to a temporary folder. ``--measured`` also packs and decodes every
candidate for every tensor, as targets did before losses had a closed form; that takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import WORKER_THREADS, Figure, report

from deltafmt.methods.base import Method
from deltafmt.pipeline import alternatives, losses
from deltafmt.pipeline.budget import plan_for_target
from deltafmt.pipeline.plan import Plan

LAYERS, WIDE, INNER, TOKENS = 12, 768, 2048, 20_000


def write_pair(folder: Path) -> None:
    """Write a base and a fine-tune of some 100 million random parameters in BF16."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    attention = {f"self_attn.{name}_proj": (WIDE, WIDE) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (INNER, WIDE), "mlp.up_proj": (INNER, WIDE), "mlp.down_proj": (WIDE, INNER)}
    shapes = {"model.embed_tokens.weight": (TOKENS, WIDE)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in (attention | mlp).items()}
    base = {name: torch.randn(shape, generator=generator).mul_(0.02) for name, shape in shapes.items()}
    finetuned = {}
    for name, tensor in base.items():
        rows, columns = tensor.shape
        strong = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
        noise = torch.randn(tensor.shape, generator=generator)
        finetuned[name] = (tensor.bfloat16().float() + 5e-4 * (noise + strong)).bfloat16()
    for name, tensors in (("base", base), ("math", finetuned)):
        (folder / name).mkdir()
        save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / name / "model.safetensors")


def planned(folder: Path, ratio: float) -> tuple[float, float]:
    """Return the processor's seconds and the score of a plan with one thread."""
    start = time.process_time()
    choice = plan_for_target(folder / "base", folder / "math", target_ratio=ratio, threads=1)
    return time.process_time() - start, choice.loss


def compared(folder: Path, ratio: float) -> list[Figure]:
    """Return what measuring everything takes, and how far foretold losses are off."""
    off: list[float] = []

    def both(plan: Plan, methods: Any, seed: int, common: int, sample: Any) -> list[float]:
        found = losses.measure(plan, methods, seed, None, common, sample)
        start = time.process_time()
        foretold = losses.foretell(plan, methods, seed, common, sample)
        spent.append(time.process_time() - start)
        kept: list[Method | None] = list(methods)
        off.extend(abs(a / b - 1) for a, b, method in zip(foretold, found, kept, strict=True) if method and b)
        return found

    spent: list[float] = []
    before = alternatives.foretell
    alternatives.foretell = both  # type: ignore[assignment]
    try:
        taken, loss = planned(folder, ratio)
    finally:
        alternatives.foretell = before
    return [
        Figure("plan, every candidate packed", taken - sum(spent), "s of a processor"),
        Figure("its score", loss, ""),
        Figure("foretold against measured, median", 100 * float(np.median(off)), "%"),
        Figure("foretold against measured, 99% of all", 100 * float(np.quantile(off, 0.99)), "%"),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path, nargs="?", metavar="PAIR_FOLDER", help="folder of base and math")
    parser.add_argument("--ratio", type=float, default=32.0, help="times smaller (default 32)")
    parser.add_argument("--measured", action="store_true", help="also pack every candidate for every tensor")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="targets-") as temporary:
        folder: Path = options.pair or Path(temporary)
        if options.pair is None:
            write_pair(folder)
        taken, loss = planned(folder, options.ratio)
        start = time.perf_counter()
        plan_for_target(folder / "base", folder / "math", target_ratio=options.ratio, threads=WORKER_THREADS)
        waited = time.perf_counter() - start
        figures = [
            Figure("plan", taken, "s of a processor"),
            Figure(f"plan, {WORKER_THREADS} threads", waited, "s", 6, at_most=True),
            Figure("its score", loss, ""),
        ]
        figures += compared(folder, options.ratio) if options.measured else []
    report("targets", figures, pair=str(options.pair or "synthetic"), ratio=options.ratio)


if __name__ == "__main__":
    main()
