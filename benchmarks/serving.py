"""A decoding step of a whole model with deltas attached, beside the base's own step, as a user of ``attach`` has it.

    python benchmarks/serving.py [--layers 8] [--deltas 16] [--repeats 30] [--profile] [--static]

A Llama of Llama-2-7B's shapes with random weights, one token a row. Deltas are 1:32 k=4 with masks shared by four rows.
Times are of whole calls of the model, host included; the graph's are of replays of one captured call. ``--static``
measures a step of ``generate(cache_implementation="static")`` instead, which transformers compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from common import Figure, report
from transformers import LlamaConfig, LlamaForCausalLM
from upload import write_delta

import deltafmt.transformers as dft
from deltafmt.terms.nm.layout import NMLayout

Names = Sequence[str | None] | str | None

LAYOUT = NMLayout(1, 32, 4, "seeded", "midtread", 4)


def build(layers: int) -> LlamaForCausalLM:
    """Return a model of Llama-2-7B's shapes with fewer layers."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=layers,
        vocab_size=32000,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).bfloat16().eval()


def once(work: Callable[[], object]) -> float:
    """Return the milliseconds of one call, awaited."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def captured(work: Callable[[], object], errors: str = "global") -> Callable[[], None]:
    """Return the replay of one captured call; with the errors ``thread_local``, other threads may go on meanwhile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=errors):
        work()
    return graph.replay


def in_turn(
    base: Callable[[], object],
    other: Callable[[], object],
    repeats: int,
    block: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> tuple[float, float, float]:
    """Return the median times of two calls, and the median of the ratios of neighbouring ones.

    The other call is in a block of its own, and not the first one there. In a block of another model, the base would
    be slower (``docs/how-to/serve.md``).
    """

    def in_block() -> float:
        with block():
            other()
            return once(other)

    for _ in range(5):
        base()
        in_block()
    pairs = [(once(base), in_block()) for _ in range(repeats)]
    return (
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[1] / pair[0] for pair in pairs),
    )


def compare(
    label: str, names: Names, targets: tuple[float, float], models: list[LlamaForCausalLM], options: argparse.Namespace
) -> list[Figure]:
    """Measure a step of the base beside one with deltas: called, and replayed as a graph."""
    ids = torch.randint(0, 32000, (16, 1), device="cuda")
    plain, served = ((lambda model=model: model(ids, use_cache=False).logits) for model in models)
    figures = []
    with torch.no_grad():
        eager = in_turn(plain, served, options.repeats, lambda: models[1].delta(names))
        replays = [captured(plain)]
        with models[1].delta(names):
            replays.append(captured(served))
            graph = in_turn(*replays, options.repeats)
        if options.profile and names is not None:
            profile = cProfile.Profile()
            with models[1].delta(names):
                profile.runcall(lambda: [served() for _ in range(20)])
            torch.cuda.synchronize()
            pstats.Stats(profile).sort_stats("tottime").print_stats(20)
    for kind, (base, step, ratio), target in zip(("eager", "graph"), (eager, graph), targets, strict=True):
        note = f"{step:.2f} ms beside {base:.2f}"
        figures.append(Figure(f"{label}, {kind}", ratio, "x base", target, True, note))
    return figures


def generated(label: str, names: Names, target: float, models: list[LlamaForCausalLM], repeats: int) -> Figure:
    """Measure a decoding step of ``generate`` with a static cache: the difference of a longer and a shorter call."""
    ids = torch.randint(3, 32000, (16, 16), device="cuda")
    mask = torch.ones_like(ids)
    short, long = 8, 40

    def call(model: LlamaForCausalLM, tokens: int, options: dict[str, Names]) -> float:
        def work() -> object:
            return model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                max_cache_len=64,
                cache_implementation="static",
                **options,
            )

        return once(work)

    def step(model: LlamaForCausalLM, options: dict[str, Names]) -> float:
        return (call(model, long, options) - call(model, short, options)) / (long - short)

    sides: list[tuple[LlamaForCausalLM, dict[str, Names]]] = [(models[0], {}), (models[1], {"delta": names})]
    for model, options in sides:
        for _ in range(3):
            call(model, long, options)
    pairs = [tuple(step(model, options) for model, options in sides) for _ in range(repeats)]
    base, served, ratio = (
        statistics.median(values)
        for values in ([p[0] for p in pairs], [p[1] for p in pairs], [p[1] / p[0] for p in pairs])
    )
    note = f"{served:.2f} ms beside {base:.2f}"
    return Figure(f"{label}, static cache", ratio, "x base", target, True, note)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (8)")
    parser.add_argument("--deltas", type=int, default=16, help="deltas of the mixed batch (16)")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each; the median counts (50)")
    parser.add_argument("--static", action="store_true", help="measure generate with a static cache")
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes")
    options = parser.parse_args()
    models = [build(options.layers) for _ in range(2)]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_delta(Path(folder) / "delta.deltafmt", LAYOUT, options.layers, "hot")
        names = [f"d{number}" for number in range(options.deltas)]
        dft.attach(models[1], dict.fromkeys(names, path), verify_base=False)
        cases: dict[str, tuple[Names, tuple[float, float]]] = {
            f"{options.deltas} deltas": ([names[row % len(names)] for row in range(16)], (1.25, 1.18)),
            "4 deltas": ([names[row % 4] for row in range(16)], (1.25, 1.18)),
            "one delta for all rows": (names[0], (1.25, 1.18)),
            "every row the base": (None, (1.05, 1.0)),
        }
        for label, (rows, targets) in cases.items():
            if options.static:
                figures.append(generated(label, rows, targets[1], models, options.repeats))
                print(*figures[-1].row(), flush=True)
            else:
                figures += compare(label, rows, targets, models, options)
    report("serving", figures, layers=options.layers, deltas=options.deltas, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
