"""What the plugin for vLLM costs requests of the base, and how soon a delta that was not loaded gives a token.

    python benchmarks/vllm_serving.py [--models nano] [--requests 32] [--new 16] [--repeats 25]

Run it in the environment of ``make vllm``. Engines with and without the plugin, LoRA on in both, generate the same
texts in turn, one at a time; a ratio is the median of the rounds' ratios, so that what else the machine does weighs on
both, by the clock and by the seconds of the processor. Beside it stands the ratio of the quickest rounds. An engine
without LoRA is measured, too.

The time to a first token is that of a request of one token to an idle engine. Every delta has a file of its own, which
no request has asked for before: it is opened, checked, compared with the base, decoded and put into a slot, and another
delta leaves that slot.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Figure, report
from vllm_child import Adapter, Answer, Child, machine, models_folder, read_prompts

import deltafmt
from deltafmt.methods import DeltaDQ

OVERHEAD, FIRST = 1.02, 10.0
# Deltas and adapters that an engine mixes; all of the slots are taken where deltas are resident.
SLOTS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano", help="nano, or a folder in DELTAFMT_MODELS (nano)")
    parser.add_argument("--dtype", default="bfloat16", help="what the engines compute in (bfloat16)")
    parser.add_argument("--requests", type=int, default=32, help="requests of a batch (32)")
    parser.add_argument(
        "--new", type=int, default=16, help="tokens that each request generates; one alone, twice as many (16)"
    )
    parser.add_argument("--repeats", type=int, default=25, help="rounds; the median counts (25)")
    options = parser.parse_args()
    models = models_folder(options.models)
    prompts, _ = read_prompts(models, options.requests)
    slots = {"enable_lora": True, "max_loras": SLOTS, "max_lora_rank": 8, "dtype": options.dtype}
    with (
        tempfile.TemporaryDirectory() as folder,
        Child(models / "base", plugin=False, dtype=options.dtype) as plain,
        Child(models / "base", plugin=False, **slots) as lora,
        Child(models / "base", plugin=True, **slots) as served,
    ):
        path = Path(folder) / "delta.deltafmt"
        deltafmt.pack(models / "base", models / "math", path, method=DeltaDQ(2, 2, 4))
        figures = overheads(plain, lora, served, prompts, path, options)
        figures += firsts(served, prompts, path, options.repeats)
        size = path.stat().st_size
    name = f"vllm-serving-{options.models}"
    report(name, figures, vllm=machine(), models=options.models, dtype=options.dtype, delta_bytes=size)


def adapters(path: Path, first: int, count: int) -> list[Adapter]:
    """Return deltas, each with a file and a number of its own."""
    found = []
    for number in range(first, first + count):
        copied = path.with_name(f"{number}.deltafmt")
        shutil.copy(path, copied)
        found.append(Adapter(f"d{number}", number, str(copied)))
    return found


def overheads(
    plain: Child, lora: Child, served: Child, prompts: list[list[int]], path: Path, options: argparse.Namespace
) -> list[Figure]:
    """Return what requests take, beside those of an engine with LoRA and without the plugin."""
    deltas = adapters(path, 1, SLOTS)
    mixed = [deltas[number % SLOTS] for number in range(len(prompts))]
    base = [None] * len(prompts)

    def run(engine: Child, count: int, chosen: list[Adapter] | list[None]) -> Callable[[], Answer]:
        new = options.new if count > 1 else 2 * options.new
        return lambda: engine.generate(prompts[:count], chosen[:count], tokens=new, stop=False)

    figures = []
    many = len(prompts)
    cases: dict[str, tuple[Callable[[], Answer], Callable[[], Answer], float | None]] = {
        f"{many} of the base, no delta loaded": (run(served, many, base), run(lora, many, base), OVERHEAD),
        "1 of the base, no delta loaded": (run(served, 1, base), run(lora, 1, base), OVERHEAD),
        f"{many} of the base, {SLOTS} deltas in the slots": (run(served, many, base), run(lora, many, base), OVERHEAD),
        f"1 of the base, {SLOTS} deltas in the slots": (run(served, 1, base), run(lora, 1, base), OVERHEAD),
        f"{many} of {SLOTS} deltas": (run(served, many, mixed), run(lora, many, base), None),
        f"{many} of the base, neither plugin nor LoRA": (run(plain, many, base), run(lora, many, base), None),
        "1 of the base, neither plugin nor LoRA": (run(plain, 1, base), run(lora, 1, base), None),
    }
    for label, (ours, theirs, target) in cases.items():
        if "in the slots" in label:
            served.generate(prompts[:SLOTS], deltas, tokens=1)
        ours(), theirs()
        rounds = [(ours(), theirs()) if number % 2 else (theirs(), ours())[::-1] for number in range(options.repeats)]
        wall = statistics.median(mine.wall / other.wall for mine, other in rounds)
        cpu = statistics.median(mine.cpu / other.cpu for mine, other in rounds)
        best = min(mine.cpu for mine, _ in rounds) / min(other.cpu for _, other in rounds)
        speed = max(mine.tokens / mine.cpu for mine, _ in rounds)
        note = f"{best:.3f} of the quickest rounds, {speed:,.0f} tokens a second of the processor"
        figures.append(Figure(f"{label}, clock", wall, "x", target, at_most=True))
        figures.append(Figure(f"{label}, processor", cpu, "x", target, at_most=True, note=note))
    return figures


def firsts(served: Child, prompts: list[list[int]], path: Path, repeats: int) -> list[Figure]:
    """Return the milliseconds to a first token of the base, and how many more a delta that was not loaded takes."""
    prompt = prompts[:1]
    rounds = []
    for adapter in adapters(path, SLOTS + 1, 3 * repeats):
        base = served.generate(prompt, [None], tokens=1)
        delta = served.generate(prompt, [adapter], tokens=1)
        again = served.generate(prompt, [adapter], tokens=1)
        rounds.append((base, delta, again))
    figures = []
    for clock in ("wall", "cpu"):
        base, delta, again = (
            statistics.median(1000 * getattr(row[place], clock) for row in rounds) for place in range(3)
        )
        label = {"wall": "clock", "cpu": "processor"}[clock]
        more = statistics.median(1000 * (getattr(row[1], clock) - getattr(row[0], clock)) for row in rounds)
        quick, slow, held = (min(1000 * getattr(row[place], clock) for row in rounds) for place in range(3))
        figures.append(Figure(f"first token of the base, {label}", base, "ms", note=f"quickest {quick:.1f}"))
        figures.append(Figure(f"first token of a delta in a slot, {label}", again, "ms", note=f"quickest {held:.1f}"))
        note = f"{delta:.1f} ms in all; the quickest {slow:.1f}, {slow - quick:.1f} more"
        name = f"a delta not yet loaded takes more, {label}"
        figures.append(Figure(name, more, "ms", FIRST, at_most=True, note=note))
    return figures


if __name__ == "__main__":
    main()
