"""A decoding step of 16 deltas on a model that is cut over several GPUs, beside the same step on one.

    python benchmarks/tensor_parallel.py [--layers 8] [--deltas 16] [--repeats 30] [--gpus 1,2]

A Llama of Llama-2-7B's shapes with random weights, one token a row, 16 rows. Deltas are 1:32 k=4 with masks shared by
four rows, and random codes. The model is cut by transformers (``tp_plan="auto"``). Times are of whole calls of the
model, the host included (eager), and of replays of one captured call (graph); of these, it is also said which kernels
take the time. Logits on several GPUs are compared with those on one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Figure, report
from serving import LAYOUT, build, captured, once
from upload import LAYER, NO_DIGEST

import deltafmt.transformers as dft
from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry, Term

ROWS = 16
# Words in the names of kernels, by what they do; all others are norms, attention, activations and the like.
PARTS = {
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "sums over GPUs": ("nccl", "reduce_scatter", "all_reduce"),
    "deltas": ("gather_kernel",),
}
OTHERS = "other kernels"
TARGET = 1.8  # of the step with deltas, as a graph; what the base gets is the floor


def write_delta(path: Path, layers: int, seed: int) -> Path:
    """Write a delta of random codes and of scales that change the base's outputs by some percent."""
    rng = np.random.default_rng(seed)
    entries = []
    with path.open("wb") as file:
        writer = ContainerWriter(file, "hot")
        number = writer.layout_number(LAYOUT)
        for layer in range(layers):
            for name, shape in LAYER.items():
                buffers = {}
                for key, length in LAYOUT.buffer_lengths(*shape).items():
                    # 0x3B00 is 2**-9 in BF16.
                    data = rng.bytes(length) if key == "codes" else b"\x00\x3b" * (length // 2)
                    buffers[key] = writer.add(memoryview(data))
                writer.boundary()
                term = Term(number, LAYOUT, len(entries) * 7 + seed, buffers)
                base = BaseRef(NO_DIGEST, "BF16", shape)
                full = f"model.layers.{layer}.{name}.weight"
                entries.append(TensorEntry(full, "add", "BF16", shape, base, NO_DIGEST, terms=(term,)))
        writer.finish(sorted(entries, key=lambda entry: entry.name))
    return path


def load(folder: Path, gpus: int) -> Any:
    """Load the base on one GPU, or cut over all processes."""
    from transformers import LlamaForCausalLM

    cut = {"tp_plan": "auto"} if gpus > 1 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older spelling works in all releases
        model = LlamaForCausalLM.from_pretrained(
            folder / "base", dtype=torch.bfloat16, trust_remote_code=False, **cut
        ).eval()
    return model if gpus > 1 else model.to("cuda")


def median_of(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call in milliseconds, after some calls."""
    for _ in range(5):
        work()
    return statistics.median(once(work) for _ in range(repeats))


def parts_of(replay: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Return the milliseconds that kernels of each kind take in one replay of a graph, and how many kernels it has."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()
    times = {**dict.fromkeys(PARTS, 0.0), OTHERS: 0.0, "kernels": 0.0}
    for event in found.events():
        if event.device_type != DeviceType.CUDA:
            continue
        name = event.name.lower()
        kind = next((kind for kind, words in PARTS.items() if any(word in name for word in words)), OTHERS)
        times[kind] += event.time_range.elapsed_us() / 1000 / repeats
        times["kernels"] += 1 / repeats
    return times


def measure(folder: Path, gpus: int, repeats: int) -> None:
    """Measure in one of ``gpus`` processes; the first one writes what it found."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    model = load(folder, gpus)
    rank = int(os.environ.get("RANK", "0")) if gpus > 1 else 0
    print(f"{gpus} GPUs, process {rank}: loaded in {time.perf_counter() - start:.1f} s", flush=True)
    deltas = {path.stem: path for path in sorted(folder.glob("*.deltafmt"))}
    start = time.perf_counter()
    dft.attach(model, deltas, verify_base=False)
    names = [list(deltas)[row % len(deltas)] for row in range(ROWS)]
    ids = torch.randint(0, 32000, (ROWS, 1), generator=torch.Generator().manual_seed(0)).to(model.device)
    step = lambda: model(ids, use_cache=False).logits  # noqa: E731 - it is called in two ways
    found: dict[str, Any] = {}
    with torch.no_grad():
        base = step()
        found["base, eager"] = median_of(step, repeats)
        with model.delta(names):
            served = step()
            torch.cuda.synchronize()
            print(f"process {rank}: first step after {time.perf_counter() - start:.1f} s", flush=True)
            found["deltas, eager"] = median_of(step, repeats)
        for kind, rows in (("base", None), ("deltas", names)):
            try:
                with model.delta(rows):
                    replay = captured(step, "thread_local")
                    found[f"{kind}, graph"] = median_of(replay, repeats)
                    found[f"parts of {kind}"] = parts_of(replay)
            except RuntimeError as error:
                print(f"process {rank}: no graph of {kind}: {str(error).splitlines()[0]}", flush=True)
                break
    found["bytes of deltas"] = sum(
        value.nbytes for value in model.deltas.residency.acquire(list(deltas)).values.values()
    )
    if rank == 0:
        torch.save((base.float().cpu(), served.float().cpu()), folder / f"logits-{gpus}.pt")
        (folder / f"found-{gpus}.json").write_text(json.dumps(found))
    print(f"process {rank}: {found}", flush=True)
    if gpus > 1:
        os._exit(0)  # graphs that hold collectives may keep the process group from ending


def compare(folder: Path, gpus: list[int]) -> list[Figure]:
    """Compare what the runs found with the first one."""
    runs = {count: json.loads((folder / f"found-{count}.json").read_text()) for count in gpus}
    outputs = {count: torch.load(folder / f"logits-{count}.pt") for count in gpus}
    first = runs[gpus[0]]
    figures = []
    for count, run in runs.items():
        for name, value in run.items():
            if name.startswith("parts"):
                figures += [
                    Figure(f"{name}, graph: {part}, {count} GPUs", time, "" if part == "kernels" else "ms")
                    for part, time in value.items()
                ]
                continue
            if name.startswith("bytes"):
                figures.append(Figure(f"{name} on a GPU, {count} GPUs", value / 2**20, "MiB"))
                continue
            figures.append(Figure(f"{name}, {count} GPUs", value, "ms"))
            if count != gpus[0] and name in first:
                target = TARGET if name == "deltas, graph" else None
                figures.append(Figure(f"{name}, {count} GPUs", first[name] / value, "times faster", target))
    base, served = outputs[gpus[0]]
    changed = float((served - base).norm() / base.norm())
    figures.append(Figure("change of the logits by the deltas", changed, "of the base's"))
    for count in gpus[1:]:
        for name, one, other in zip(("base", "deltas"), outputs[gpus[0]], outputs[count], strict=True):
            figures.append(Figure(f"logits of {name}, {count} GPUs", float((one - other).norm() / one.norm()), "apart"))
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (8)")
    parser.add_argument("--deltas", type=int, default=16, help="deltas of the mixed batch (16)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each; the median counts (30)")
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs; the first is compared with (1,2)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpus = [int(word) for word in options.gpus.split(",")]
    if options.folder is not None:
        measure(options.folder, gpus[0], options.repeats)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(options.layers)
        model.save_pretrained(folder / "base")
        del model
        torch.cuda.empty_cache()
        for number in range(options.deltas):
            write_delta(folder / f"d{number:02}.deltafmt", options.layers, number)
        for count in gpus:
            runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            mine = [__file__, "--folder", folder, "--gpus", str(count), "--repeats", str(options.repeats)]
            subprocess.run([sys.executable, *runner, *mine], check=True)
        figures = compare(folder, gpus)
    device = torch.cuda.get_device_name()
    report("tensor_parallel", figures, layers=options.layers, deltas=options.deltas, device=device)


if __name__ == "__main__":
    main()
