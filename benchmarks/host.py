"""What deltas cost the host in a decoding step, and when a delta is first used; measured without a GPU.

    python benchmarks/host.py [--layers 8] [--deltas 16]

A Llama that is 64 wide, so that its products take no time, one token in each of 16 rows. Modules are grouped and
launches are repeated as on a GPU, but the driver's function is one that does nothing: the deltas' products are missing.
Calls of Python are counted exactly; times are of the thread's processor time.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Figure, report
from transformers import LlamaConfig, LlamaForCausalLM

import deltafmt
import deltafmt.transformers as dft
from deltafmt.kernels import recorded_launches
from deltafmt.kernels.recorded_launches import BoundLaunches, Launch, Place, RecordedLaunches
from deltafmt.methods import DeltaDQ
from deltafmt.runtime import product_group
from deltafmt.runtime.served_modules import ServedModules

ROWS = 16


def build(layers: int) -> Any:
    """Return a narrow Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=layers, vocab_size=128
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def write_delta(folder: Path, model: Any) -> Path:
    """Pack a fine-tune whose linear modules have changed."""
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    path = folder / "delta.deltafmt"
    deltafmt.pack(folder / "base", folder / "tuned", path, method=DeltaDQ(1, 32, 4, share=4))
    return path


class AsOnGpu(ExitStack):
    """Group modules and repeat launches as on a GPU, with a driver's function that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        does_nothing = ctypes.cast(ctypes.CDLL(None).isalpha, ctypes.c_void_p).value  # 1 is no letter: no error
        group, refresh = ServedModules._group_known, ServedModules._refresh  # noqa: SLF001 - this package's

        def grouped(served: Any, sites: Any) -> None:
            real, served._device = served._device, torch.device("cuda")  # noqa: SLF001
            with mock.patch.object(ServedModules, "_make_group", lambda _, made: groups.append(made)):
                groups: list[Any] = []
                group(served, sites)
            served._device = real  # noqa: SLF001
            for made in groups:
                served._make_group(made)  # noqa: SLF001

        def refreshed(served: Any) -> None:
            real, served._device = served._device, torch.device("cuda")  # noqa: SLF001
            refresh(served)
            served._device = real  # noqa: SLF001

        def bind_product(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: Any, segments: Any) -> BoundLaunches:
            tiles = (1, 1, None)
            places = [Place(0, "x"), Place(5, "order", tiles), Place(6, "tiles", tiles)]
            places += [Place(1 + number, "y", number) for number in range(len(outputs))]
            launch = Launch(1, (1, 1, 1), 128, 0, np.zeros(40, np.uint64), tuple(places))
            return BoundLaunches(RecordedLaunches([launch], [], len(outputs)), outputs, x, segments, table)

        for target, name, value in (
            (ServedModules, "_group_known", grouped),
            (ServedModules, "_refresh", refreshed),
            (product_group, "multiply_recorded_", lambda *_: True),
            (product_group, "bind_product", bind_product),
            (recorded_launches, "_launcher", lambda: does_nothing),
            (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),  # noqa: SLF001
            (torch._C, "_cuda_getDevice", lambda: None),  # noqa: SLF001
        ):
            self.enter_context(mock.patch.object(target, name, value, create=True))


def calls_of(work: Callable[[], object]) -> int:
    """Return how many functions a piece of work calls."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def took(work: Callable[[], object]) -> float:
    """Return the milliseconds of the processor that this thread needs for a piece of work."""
    start = time.thread_time()
    work()
    return (time.thread_time() - start) * 1e3


def steps(models: Sequence[Any], names: Sequence[str], repeats: int) -> list[Figure]:
    """Compare a step of the base alone with steps of a model with deltas."""
    ids = torch.randint(0, 128, (ROWS, 1))
    plain, served = ((lambda model=model: model(ids, use_cache=False)) for model in models)
    figures = []
    rows: Any
    for label, rows in ((f"{len(names)} deltas", list(names)), ("one delta", names[0]), ("every row the base", None)):
        with torch.no_grad(), models[1].delta(rows):
            for _ in range(3):
                plain()
                served()
            pairs = [(took(plain), took(served)) for _ in range(repeats)]
            base, more = calls_of(plain), calls_of(served)
        least = [min(pair[side] for pair in pairs) for side in (0, 1)]
        extra = statistics.median(pair[1] - pair[0] for pair in pairs)
        note = f"{base:,} of the base's; {extra:.2f} ms more, {least[1]:.2f} beside {least[0]:.2f} at best"
        figures.append(Figure(f"a step, {label}: calls of Python", more - base, "", note=note))
    return figures


def first_uses(model: Any, names: Sequence[str]) -> list[Figure]:
    """Measure what a further delta of a known layout costs once its bytes are there."""
    deltas = model.deltas
    times, counts = [], []
    for number, name in enumerate(names):
        version = deltas.known(name)
        lease = deltas.residency.acquire([version.key])

        def assign(version: Any = version, lease: Any = lease) -> None:
            deltas.served.assign(version.key, lease.values[version.key], version.found.binding)

        if number % 2:
            times.append(took(assign))
        else:
            counts.append(calls_of(assign))
        lease.release()
    tensors = len(deltas.known(names[0]).file.needed)
    note = f"{tensors} tensors; {statistics.median(times):.1f} ms, {min(times):.1f} at best"
    return [Figure("a delta gets its slot: calls of Python", statistics.median(counts), "", note=note)]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (8)")
    parser.add_argument("--deltas", type=int, default=16, help="deltas of the mixed batch (16)")
    parser.add_argument("--repeats", type=int, default=100, help="timed steps of each (100)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, AsOnGpu():
        folder = Path(name)
        models = [build(options.layers) for _ in range(2)]
        path = write_delta(folder, build(options.layers))
        names = [f"d{number}" for number in range(max(options.deltas, 12))]
        files = {one: shutil.copy(path, folder / f"{one}.deltafmt") for one in names}
        dft.attach(models[1], files, verify_base=False)
        figures = first_uses(models[1], names) + steps(models, names[: options.deltas], options.repeats)
    report("host", figures, layers=options.layers, deltas=options.deltas)


if __name__ == "__main__":
    main()
