"""Many deltas over a budget for few: random requests from several threads, each row compared with its own fine-tune.

    python benchmarks/soak.py [--deltas 1000] [--resident 16] [--requests 4000] [--threads 8] [--minutes M]

A small Llama and as many different deltas of it, of four methods. A request has one to four rows, and each row a prompt
and a delta (or the base); its logits must be those of the unpacked checkpoint. Latencies are of whole requests, waiting
included: those that found all their deltas on the device, and those that did not.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import WORKER_THREADS, Figure, report
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import deltafmt
import deltafmt.transformers as dft
from deltafmt.methods import DARE, RTN, BitDelta, DeltaDQ
from deltafmt.methods.base import Method

METHODS: tuple[Method, ...] = (DeltaDQ(4, 16, 4), RTN(4), BitDelta(), DARE(0.75))
PROMPTS, TOKENS, WAIT = 8, 12, 120.0
Names = list[str | None]


@dataclass(slots=True)
class Seen:
    """What the threads have seen.

    Attributes:
        wrong: rows whose logits are not those of their fine-tune.
        worst: the largest difference of a right row, as a share of the logits' spread.
        hits, misses: the seconds of requests that found all deltas on the device, and of the others.
        errors: what went wrong otherwise.
    """

    wrong: int = 0
    rows: int = 0
    worst: float = 0.0
    hits: list[float] = field(default_factory=list)
    misses: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def build() -> LlamaForCausalLM:
    """Return the base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def pack(folder: Path, number: int) -> None:
    """Make one fine-tune, pack it, and keep the delta and the unpacked weights."""
    torch.manual_seed(1000 + number)
    base = load_file(folder / "base" / "model.safetensors")
    changed = {name: value + 0.2 * value.std(correction=0) * torch.randn_like(value) for name, value in base.items()}
    tuned = folder / f"tuned-{number}.safetensors"
    save_file(changed, tuned)
    delta = folder / f"{number}.deltafmt"
    deltafmt.pack(folder / "base" / "model.safetensors", tuned, delta, method=METHODS[number % len(METHODS)], threads=1)
    tuned.unlink()
    deltafmt.unpack(folder / "base" / "model.safetensors", delta, folder / f"unpacked-{number}", threads=1)


def expected(model: LlamaForCausalLM, folder: Path, number: int | None, prompts: torch.Tensor) -> torch.Tensor:
    """Return the logits of the prompts' last tokens by an unpacked fine-tune, or by the base."""
    path = folder / "base" if number is None else folder / f"unpacked-{number}"
    model.load_state_dict(load_file(next(path.glob("*.safetensors"))))
    with torch.no_grad():
        return model(prompts).logits[:, -1].float().cpu()


def client(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    right: dict[str | None, torch.Tensor],
    requests: int,
    seed: int,
    deadline: float,
    seen: Seen,
) -> None:
    """Ask for random deltas until a time of ``time.monotonic``, and compare every row."""
    choose = random.Random(seed)
    names = list(right)
    for _ in range(requests):
        if time.monotonic() > deadline:
            return
        rows: Names = choose.choices(names, k=choose.randint(1, 4))
        asked = choose.choices(range(PROMPTS), k=len(rows))
        found_all = set(rows) - {None} <= set(model.deltas.residency.resident())
        start = time.perf_counter()
        try:
            with model.delta(rows, wait=WAIT):
                logits = model(prompts[asked]).logits[:, -1].float().cpu()
        except Exception as error:  # noqa: BLE001 - every error is counted, and ends the client
            seen.errors.append(f"{type(error).__name__}: {error}")
            return
        (seen.hits if found_all else seen.misses).append(time.perf_counter() - start)
        for row, (name, prompt) in enumerate(zip(rows, asked, strict=True)):
            wanted = right[name][prompt]
            off = float((logits[row] - wanted).abs().max() / wanted.std())
            seen.rows += 1
            if off > 0.02:
                seen.wrong += 1
            else:
                seen.worst = max(seen.worst, off)


def held() -> tuple[int, int, int]:
    """Return the bytes that the GPU holds, the process's open files, and its resident bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1]) if Path("/proc/self/statm").exists() else 0
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    device = 0
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - 32 MiB for each thread that has multiplied
        device = torch.cuda.memory_allocated()
    return device, files, pages * resource.getpagesize()


def run(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    right: dict[str | None, torch.Tensor],
    options: argparse.Namespace,
    seed: int,
    requests: int,
    deadline: float,
) -> Seen:
    """Run all clients to their end, and put together what they have seen."""
    each = [Seen() for _ in range(options.threads)]
    arguments = [
        (model, prompts, right, requests // options.threads, seed + number, deadline, seen)
        for number, seen in enumerate(each)
    ]
    threads = [threading.Thread(target=client, args=one) for one in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Seen(
        sum(one.wrong for one in each),
        sum(one.rows for one in each),
        max(one.worst for one in each),
        [taken for one in each for taken in one.hits],
        [taken for one in each for taken in one.misses],
        [text for one in each for text in one.errors],
    )


def latencies(label: str, taken: list[float]) -> list[Figure]:
    """Return the median, the 95th and the 99th percentile in milliseconds."""
    if not taken:
        return []
    found = np.percentile(taken, (50, 95, 99)) * 1e3
    note = f"{len(taken):,} requests"
    return [
        Figure(f"{label}, {name}", float(value), "ms", note=note)
        for name, value in zip(("median", "95%", "99%"), found, strict=True)
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deltas", type=int, default=1000, help="deltas attached (1000)")
    parser.add_argument("--resident", type=int, default=16, help="deltas that the budget has room for (16)")
    parser.add_argument(
        "--requests", type=int, default=4_000, help="requests of all threads together (4000, which have 10,000 rows)"
    )
    parser.add_argument("--threads", type=int, default=8, help="threads that ask at the same time (8)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="ask for nothing more after so long (no limit)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        build().save_pretrained(folder / "base")
        numbers = range(options.deltas)
        with ProcessPoolExecutor(WORKER_THREADS) as pool:
            list(pool.map(pack, [folder] * options.deltas, numbers, chunksize=8))
        prompts = torch.randint(0, 128, (PROMPTS, TOKENS), device=device)
        scratch = build().to(device)
        right = {f"d{number}": expected(scratch, folder, number, prompts) for number in numbers}
        answers: dict[str | None, torch.Tensor] = {**right, None: expected(scratch, folder, None, prompts)}
        paths = {f"d{number}": folder / f"{number}.deltafmt" for number in numbers}
        model = scratch
        # What the process makes once, such as the constants of checksums, is made before anything is counted.
        dft.attach(model, {"d0": paths["d0"]})
        with model.delta("d0"):
            pass
        dft.detach(model)
        before, _, _ = held()
        print(f"{options.deltas} deltas are packed, unpacked and answered for", flush=True)
        largest = max(path.stat().st_size for path in paths.values())
        dft.attach(model, paths, budget=options.resident * largest)
        print("they are attached; the requests begin", flush=True)
        deadline = time.monotonic() + 60 * options.minutes
        first = run(model, prompts, answers, options, 1, options.requests // 10, deadline)
        _, files, resident = held()
        seen = run(model, prompts, answers, options, 2, options.requests, deadline)
        device_bytes, files_after, resident_after = held()
        used = model.deltas.residency.used
        dft.detach(model)
        after, _, _ = held()
    for text in (first.errors + seen.errors)[:5]:
        print(text)
    figures = [
        Figure("wrong rows", first.wrong + seen.wrong, "", 0, True, f"of {first.rows + seen.rows:,}"),
        Figure("requests that failed", len(first.errors) + len(seen.errors), "", 0, True),
        Figure("largest difference of a right row", seen.worst, "of the logits' spread", 0.02, True),
        Figure(
            "bytes of deltas on the device", used, "bytes", options.resident * largest, True, f"of {device_bytes:,}"
        ),
        Figure("bytes left on the device after detach", after - before, "bytes", 0, True),
        Figure("open files more than after the first tenth", files_after - files, "", 0, True),
        Figure("memory more than after the first tenth", (resident_after - resident) / 1e6, "MB", 64, True),
        *latencies("all deltas on the device", seen.hits),
        *latencies("with loading", seen.misses),
    ]
    report("soak", figures, deltas=options.deltas, requests=options.requests, threads=options.threads, device=device)


if __name__ == "__main__":
    main()
