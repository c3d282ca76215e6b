"""Continuous batching with a delta for each request, beside the base alone: tokens a second of 64 requests.

    python benchmarks/continuous.py [--device cuda] [--layers 8] [--requests 64] [--deltas 16] [--new 128] [--repeats 5]

A Llama of Llama-2-7B's shapes with random weights; ``--small`` takes one that a CPU runs in seconds. Both models run
transformers' ``generate_batch`` with the same settings, in turn; the base is a model without attached deltas. Times are
of whole calls, host included. The prompts of each call are new, so that no keys and values are found in the cache.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import Figure, report
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from upload import write_delta

import deltafmt
import deltafmt.transformers as dft
from deltafmt.methods import DeltaDQ
from deltafmt.terms.nm.layout import NMLayout

LAYOUT = NMLayout(1, 32, 4, "seeded", "midtread", 4)
TARGET = 0.8


def config(options: argparse.Namespace) -> LlamaConfig:
    """Return the configuration of the model."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    if options.small:
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "vocab_size": 512}
    return LlamaConfig(num_hidden_layers=options.layers, attn_implementation=options.attention, **sizes)


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config(options)).eval()
    return model if options.small else model.bfloat16()


def write(folder: Path, options: argparse.Namespace) -> Path:
    """Write a delta of the model's shapes."""
    if not options.small:
        return write_delta(folder / "delta.deltafmt", LAYOUT, options.layers, "hot")
    model = build(options).cpu()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    method = DeltaDQ(1, 32, 4)
    deltafmt.pack(folder / "base", folder / "tuned", folder / "delta.deltafmt", method=method)
    return folder / "delta.deltafmt"


def prompts(options: argparse.Namespace, seed: int) -> list[list[int]]:
    """Return prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    high = 512 if options.small else 32000
    lengths = [options.prompt // 2 + number % options.prompt for number in range(options.requests)]
    return [torch.randint(3, high, (length,), generator=generator).tolist() for length in lengths]


class Runner:
    """Calls of ``generate_batch`` of one model, with a manager that is kept between them."""

    def __init__(self, model: Any, names: list[str | None] | None, options: argparse.Namespace) -> None:
        self.model = model
        self.options = options
        self.more = {} if names is None else {"delta": names}

    def __call__(self, seed: int) -> float:
        """Return the tokens a second of one call."""
        options = self.options
        generation = GenerationConfig(max_new_tokens=options.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        sizes = ContinuousBatchingConfig(num_blocks=2 * options.requests, max_batch_tokens=options.batch_tokens)
        if options.graphs and not self.more:
            sizes.use_cuda_graph = True
        texts = prompts(options, seed)
        start = time.perf_counter()
        found = self.model.generate_batch(
            texts,
            generation_config=generation,
            continuous_batching_config=sizes,
            persistent_manager=True,
            **self.more,
        )
        taken = time.perf_counter() - start
        errors = {output.error for output in found.values()}
        if errors != {None} or len(found) != options.requests:
            raise SystemExit(f"requests failed: {errors}")
        return sum(len(output.generated_tokens) for output in found.values()) / taken


def profiled(work: Runner) -> None:
    """Print where the time of the generation thread goes."""
    profile = cProfile.Profile()
    run = threading.Thread.run

    def watched(self: threading.Thread) -> None:
        profile.runcall(run, self)

    threading.Thread.run = watched  # type: ignore[method-assign]
    try:
        work(99)
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
    pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model is")
    parser.add_argument("--small", action="store_true", help="a model of 128 columns in float32")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (8)")
    parser.add_argument("--requests", type=int, default=64, help="requests of a call (64)")
    parser.add_argument("--deltas", type=int, default=16, help="deltas that the requests take in turn (16)")
    parser.add_argument("--prompt", type=int, default=64, help="middle of the prompts' lengths, in tokens (64)")
    parser.add_argument("--new", type=int, default=128, help="tokens that each request generates (128)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step at most (2048)")
    parser.add_argument("--attention", default="sdpa", help="transformers' implementation of attention (sdpa)")
    parser.add_argument("--graphs", action="store_true", help="let the base alone use CUDA graphs")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each; the median counts (5)")
    parser.add_argument("--profile", action="store_true", help="print where the time of the loop goes")
    options = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    plain, served = build(options), build(options)
    names = [f"d{number}" for number in range(options.deltas)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), options)
        dft.attach(served, dict.fromkeys(names, path), verify_base=False)
        cases: dict[str, list[str | None] | None] = {
            f"{options.deltas} deltas": [names[number % len(names)] for number in range(options.requests)],
            "one delta": [names[0]] * options.requests,
            "every request the base": [None] * options.requests,
        }
        base = Runner(plain, None, options)
        figures = []
        for label, rows in cases.items():
            work = Runner(served, rows, options)
            served.destroy_cached_continuous_batching_manager()
            for seed in range(2):
                base(seed), work(seed)
            pairs = [(base(seed), work(seed)) for seed in range(2, 2 + options.repeats)]
            ratio = statistics.median(ours / theirs for theirs, ours in pairs)
            theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            note = f"{ours:,.0f} tokens/s beside {theirs:,.0f}"
            figures.append(Figure(f"{options.requests} requests, {label}", ratio, "x base", TARGET, note=note))
            if options.profile:
                profiled(work)
        for model in (plain, served):
            model.destroy_cached_continuous_batching_manager()
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    report("continuous", figures, layers=options.layers, deltas=options.deltas, small=options.small, device=device)


if __name__ == "__main__":
    main()
