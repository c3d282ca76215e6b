"""What the first use of something costs: of a process, of a layout, and of a further delta of a known layout.

    python benchmarks/first_use.py [--layers 32] [--deltas 8] [--no-warmup]

A Llama of Llama-2-7B's shapes with random weights; deltas are 1:32 k=4 with masks shared by four rows, in the page
cache. The first request of a delta is compared with a later request of the same delta: the difference is what its first
use costs, from the request to the last kernel. ``--no-warmup`` leaves out the warm-up, whose kernels are then compiled
in the first request.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from common import Figure, report
from serving import LAYOUT, build, once
from upload import write_bytes, write_delta

import deltafmt.torch as dt
import deltafmt.transformers as dft

FIRST_LOAD = """
import json, sys, time
start = time.perf_counter()
import torch
import deltafmt.torch as dt
from deltafmt.runtime.upload import prepare
imported = time.perf_counter()
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
context = time.perf_counter()
if sys.argv[2] == "prepared":
    prepare(torch.device("cuda", 0))
prepared = time.perf_counter()
delta = dt.load(sys.argv[1])
torch.cuda.synchronize()
loaded = time.perf_counter()
del delta
again = dt.load(sys.argv[1])
torch.cuda.synchronize()
second = time.perf_counter()
print(json.dumps([imported - start, context - imported, prepared - context, loaded - prepared, second - loaded]))
"""


def first_load(path: Path, how: str) -> list[float]:
    """Return the milliseconds of a fresh process: imports, CUDA's context, preparation, first load, second load."""
    command = [sys.executable, "-c", FIRST_LOAD, str(path), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [1e3 * float(seconds) for seconds in json.loads(done.stdout.splitlines()[-1])]


class Compilations:
    """Counts what Triton compiles, rather than finds in its cache."""

    def __init__(self) -> None:
        self.names: list[str] = []
        triton.knobs.compilation.listener = self._note

    def _note(self, **known: Any) -> None:
        if not known["cache_hit"]:
            self.names.append(str(known["src"].name))


def first_requests(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """Measure requests of deltas that were never served."""
    seen = Compilations()
    model = build(options.layers)
    path = write_delta(folder / "0.deltafmt", LAYOUT, options.layers, "hot")
    names = [f"d{number}" for number in range(3 * options.deltas + 16)]
    files = [shutil.copy(path, folder / f"{name}.deltafmt") for name in names]
    figures = []
    start = time.perf_counter()
    if not options.no_warmup:
        done = dt.warmup([path])
        figures.append(
            Figure("warm-up", time.perf_counter() - start, "s", note=f"{done.compiled} compiled, {done.cached} cached")
        )
    start = time.perf_counter()
    dft.attach(model, {names[0]: files[0]}, verify_base=False, warmup=not options.no_warmup)
    attached = time.perf_counter() - start
    figures.append(Figure("attach of the first delta", attached, "s", note="with kernels loaded and buffers pinned"))
    start = time.perf_counter()
    for name, file in zip(names[1:], files[1:], strict=True):
        model.deltas.add(name, file)
    adding = (time.perf_counter() - start) / (len(names) - 1) * 1e3
    figures.append(Figure("attach of a further delta", adding, "ms", note="the index is read, the names are matched"))
    one, many, prompt = (torch.randint(0, 32000, shape, device="cuda") for shape in ((1, 1), (16, 1), (1, 512)))
    later = iter(names[1:])

    def request(ids: torch.Tensor, delta: str | list[str | None]) -> float:
        def ask() -> None:
            with model.delta(delta):
                model(ids, use_cache=False)

        return once(ask)

    with torch.no_grad():
        base = statistics.median(once(lambda: model(one, use_cache=False)) for _ in range(10))
        begun = len(seen.names)
        first = request(one, names[0])
        figures.append(Figure("first request of the process", first, "ms", note=f"the base alone takes {base:.1f}"))
        for ids, label in ((one, "one token"), (prompt, "a prompt of 512"), (many, "16 rows, 15 a known delta's")):
            rows = ids.shape[0]
            costs = []
            for _ in range(options.deltas):
                name = next(later)
                wanted: str | list[str | None] = name if rows == 1 else [name, *[names[0]] * (rows - 1)]
                begin = request(ids, wanted)
                costs.append(begin - statistics.median(request(ids, wanted) for _ in range(3)))
            note = f"first {costs[0]:.1f}, least {min(costs):.1f}"
            name = f"first use of a further delta, {label}"
            figures.append(Figure(name, statistics.median(costs), "ms", 8, True, note))
        entering = []
        for _ in range(options.deltas // 2):
            name = next(later)

            def enter(name: str = name) -> None:
                with model.delta(name):
                    pass

            entering.append(once(enter))
        figures.append(Figure("of that, to enter the block", statistics.median(entering), "ms"))
    found = seen.names[begun:]
    target = None if options.no_warmup else 0
    figures.append(Figure("kernels compiled in requests", len(found), "", target, True, ", ".join(sorted(set(found)))))
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (32)")
    parser.add_argument("--deltas", type=int, default=8, help="deltas whose first use is measured (8)")
    parser.add_argument("--no-warmup", action="store_true", help="serve without a warm-up")
    options = parser.parse_args()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() and os.access(shared, os.W_OK) else None) as name:
        folder = Path(name)
        figures = first_requests(options, folder)
        large = write_bytes(folder / "large.deltafmt", 1 << 30)
        for how, target in (("at once", 300), ("prepared", None)):
            runs = [first_load(large, how) for _ in range(3)]
            imports, context, ready, first, second = (statistics.median(column) for column in zip(*runs, strict=True))
            note = f"imports {imports:.0f}, context {context:.0f}, preparation {ready:.0f}, second load {second:.0f}"
            figures.append(Figure(f"first load of a process, 1 GiB, {how}", first, "ms", target, True, note))
    report("first-use", figures, layers=options.layers, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
