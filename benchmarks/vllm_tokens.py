"""A batch of the base and six deltas of five kinds in vLLM, beside vLLM with each unpacked checkpoint.

    python benchmarks/vllm_tokens.py [--models wordmath] [--dtype bfloat16] [--problems 50]

Run it in the environment of ``make vllm``. ``--models`` is ``nano`` or a folder in DELTAFMT_MODELS. Three things are
counted: rows of the batch whose tokens are those of the unpacked checkpoint; rows of the base whose tokens and
log-probabilities keep every bit beside deltas; and what an adapter of ``export-lora --for vllm`` loses.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, report
from vllm_child import Adapter, Child, machine, models_folder, read_prompts, texts_of

import deltafmt
from deltafmt.methods import DARE, SVD, BitDelta, DeltaDQ, Residual
from deltafmt.methods.base import Method

METHODS: dict[str, Method] = {
    "deltadq 2:2": DeltaDQ(2, 2, 4),
    "deltadq 4:16": DeltaDQ(4, 16, 4),
    "residual": Residual(),
    "svd": SVD(bits_per_weight=2.0),
    "dare": DARE(),
    "bitdelta": BitDelta(),
}
# The share of rows that must have the checkpoint's tokens. The wide deltas of the small models solve nothing, and their
# tokens hang on the last bit.
TARGETS = {"wordmath": 349 / 350}
# Steps in which rows are compared bit by bit.
STEPS = 32
Texts = list[list[int]]


def equal(mine: Texts, theirs: Texts) -> int:
    """Return the number of rows with the same tokens."""
    return sum(one == other for one, other in zip(mine, theirs, strict=True))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano", help="nano, or a folder in DELTAFMT_MODELS (nano)")
    parser.add_argument("--dtype", default="bfloat16", help="what the engines compute in (bfloat16)")
    parser.add_argument("--problems", type=int, default=50, help="prompts, each given to the base and every delta (50)")
    options = parser.parse_args()
    models = models_folder(options.models)
    prompts, wanted = read_prompts(models, options.problems)
    with tempfile.TemporaryDirectory() as made:
        run(models, prompts, wanted, Path(made), options)


def run(models: Path, prompts: Texts, wanted: list[str], folder: Path, options: argparse.Namespace) -> None:
    """Pack, generate and compare."""
    base = models / "base"
    adapters: list[Adapter | None] = [None]
    for number, (name, method) in enumerate(METHODS.items(), 1):
        path = folder / f"{number}.deltafmt"
        deltafmt.pack(base, models / "math", path, method=method)
        deltafmt.unpack(base, path, folder / f"{number}")
        adapters.append(Adapter(name, number, str(path)))
    svd = list(METHODS).index("svd") + 1
    exported = deltafmt.export_lora(folder / f"{svd}.deltafmt", folder / "lora", base=base, reader="vllm")
    lora = Adapter("svd, exported", len(adapters), str(folder / "lora"))

    rows = [prompt for prompt in prompts for _ in adapters]
    chosen = adapters * len(prompts)
    settings: dict[str, Any] = {"dtype": options.dtype}
    slots = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": exported.max_lora_rank}
    with Child(base, plugin=True, **slots, **settings) as engine:
        mixed = engine.generate(rows, chosen)
        beside = engine.generate(rows, chosen, tokens=STEPS, stop=False)
        adapted = engine.generate(prompts, [lora] * len(prompts)).texts
    with Child(base, plugin=False, **settings) as engine:
        alone = engine.generate(rows, [None] * len(rows), tokens=STEPS, stop=False)
        expected: list[Texts] = [engine.generate(prompts, [None] * len(prompts)).texts]
        for number in range(1, len(adapters)):
            engine.load(folder / f"{number}")
            expected.append(engine.generate(prompts, [None] * len(prompts)).texts)

    step = len(adapters)
    same, figures = 0, []
    target = TARGETS.get(options.models)
    for place, adapter in enumerate(adapters):
        mine = mixed.texts[place::step]
        count = equal(mine, expected[place])
        same += count
        solved, theirs = (
            sum(text == answer for text, answer in zip(texts_of(models, texts), wanted, strict=True))
            for texts in (mine, expected[place])
        )
        note = f"{solved} solved, {theirs} by the checkpoint" if adapter else ""
        figures.append(Figure(adapter.name if adapter else "base", count, f"of {len(prompts)}", note=note))
    exact = sum(
        beside.texts[row] == alone.texts[row] and beside.logprobs[row] == alone.logprobs[row]
        for row in range(0, len(rows), step)
    )
    differ = equal(beside.texts[1::step], alone.texts[1::step])
    texts = texts_of(models, adapted)
    solved = sum(text == answer for text, answer in zip(texts, wanted, strict=True))
    figures += [
        Figure("rows with the checkpoint's tokens", same, f"of {len(rows)}", target and int(len(rows) * target)),
        Figure("rows of the base that keep every bit", exact, f"of {len(prompts)}", len(prompts)),
        Figure("rows of a delta with the base's tokens", differ, f"of {len(prompts)}", note="a check of the check"),
        Figure(
            "svd as an adapter of export-lora",
            equal(adapted, expected[svd]),
            f"of {len(prompts)}",
            note=f"{solved} solved; left out: {len(exported.left_out)} norms and biases",
        ),
    ]
    report(
        f"vllm-tokens-{options.models}-{options.dtype}",
        figures,
        vllm=machine(),
        models=options.models,
        dtype=options.dtype,
    )


if __name__ == "__main__":
    main()
