"""How soon a delta can be used on a device: reading, checksums, copies and views, beside a plain pinned copy.

    python benchmarks/upload.py [--device cuda] [--threads N] [--slot-mib 2] [--pinned-mib 64] [--repeats 9] [--small]

The files have the shapes of a Llama-2-7B's linear layers and random bytes; they lie in /dev/shm where that exists, so
that the page cache is what is read from. The floor copies as many bytes from one pinned buffer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import Figure, report

import deltafmt
import deltafmt.torch as dt
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.format.constants import ZSTD_CHUNK
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.kernels.xxh3.digests import are_loaded
from deltafmt.kernels.xxh3.digests import can_run as has_checksums
from deltafmt.runtime import upload
from deltafmt.runtime.checks import check_terms
from deltafmt.terms.nm.index.codecs import INDEX_CODECS
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS

HOT = NMLayout(1, 32, 4)
COLD = NMLayout(2, 64, 4, "rank", share=4)
LAYER = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
BLOCK = 1 << 26
NO_DIGEST = bytes(32)
SCALE = b"\x80\x3c"  # of 2**-6 in BF16


def random_index(rng: np.random.Generator, layout: NMLayout, columns: int) -> bytes:
    """Return the words of one tile of a rank index."""
    drawn = np.argsort(rng.random((TILE_ROWS, layout.groups(columns), layout.m)), axis=2)[:, :, : layout.n]
    out = np.zeros((1, layout.index_words(columns), 32), np.uint32)
    INDEX_CODECS[layout.index].encode(np.sort(drawn, axis=2).astype(np.uint8), layout, out)
    return out.tobytes()


def write_delta(path: Path, layout: NMLayout, layers: int, profile: str) -> Path:
    """Write a delta of random bytes, with scales that a delta may have."""
    rng = np.random.default_rng(0)
    block = memoryview(rng.bytes(BLOCK))
    tiles = {columns: random_index(rng, layout, columns) for columns in (4096, 11008) if layout.index == "rank"}
    entries = []
    with path.open("wb") as file:
        writer = ContainerWriter(file, profile)
        number = writer.layout_number(layout)
        for layer in range(layers):
            for name, shape in LAYER.items():
                buffers = {}
                for key, length in layout.buffer_lengths(*shape).items():
                    start = int(rng.integers(BLOCK - length))
                    data = block[start : start + length]
                    if key == "index":
                        data = memoryview(tiles[shape[1]] * (length // len(tiles[shape[1]])))
                    if key == "scales":
                        data = memoryview(SCALE * (length // len(SCALE)))
                    buffers[key] = writer.add(data)
                writer.boundary()
                seed = len(entries) if layout.index == "seeded" else 0
                term = Term(number, layout, seed, buffers)
                base = BaseRef(NO_DIGEST, "BF16", shape)
                full = f"model.layers.{layer}.{name}.weight"
                entries.append(TensorEntry(full, "add", "BF16", shape, base, NO_DIGEST, terms=(term,)))
        writer.finish(entries)
    return path


def write_bytes(path: Path, nbytes: int) -> Path:
    """Write a file of matrices that replace the base's, for the speed in the long run."""
    block = memoryview(np.random.default_rng(1).bytes(min(BLOCK, nbytes)))
    entries = []
    with path.open("wb") as file:
        writer = ContainerWriter(file, "hot")
        for number in range(nbytes // len(block)):
            ref = writer.add(block)
            writer.boundary()
            entries.append(TensorEntry(f"t.{number:04}", "replace", "U8", (len(block),), digest=NO_DIGEST, data=ref))
        writer.finish(entries)
    return path


class Clock:
    """Times of work whose result is on a device.

    Args:
        device: where.
        repeats: of each measurement; the median counts.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def __call__(self, work: Callable[[], object]) -> float:
        """Return the median time of some calls in milliseconds, each to the end of what it started."""
        taken = []
        for _ in range(self.repeats + 1):
            self.settle()
            start = time.perf_counter()
            result = work()
            self.settle()
            taken.append(time.perf_counter() - start)
            del result  # its memory is there for the next
        return statistics.median(taken[1:]) * 1e3

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def floor(clock: Clock, nbytes: int) -> float:
    """Return the time of one copy of as many bytes from a buffer that is pinned if the device is a GPU."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=clock.device.type == "cuda").fill_(1)
    target = torch.empty(nbytes, dtype=torch.uint8, device=clock.device).fill_(0)
    return clock(lambda: target.copy_(source, non_blocking=True))


def measure(folder: Path, clock: Clock, options: argparse.Namespace) -> list[Figure]:
    """Measure everything."""
    device, count = clock.device, options.threads
    hot = write_delta(folder / "hot.deltafmt", HOT, 2 if options.small else 32, "hot")
    cold = write_delta(folder / "cold.deltafmt", COLD, 1 if options.small else 32, "cold")
    large = write_bytes(folder / "large.deltafmt", (1 << 26) if options.small else (1 << 30))
    name = "model.layers.0.mlp.up_proj.weight"
    with deltafmt.open(hot) as known:
        tensors = [known[tensor] for tensor in known]

    def load(path: Path, **more: object) -> dt.DeviceDelta:
        return dt.load(path, device, threads=count, pinned_bytes=int(options.pinned_mib * 2**20), **more)

    def use(delta: dt.DeviceDelta) -> object:
        """Do a little with one tensor on the device."""
        return delta[name].terms[0].buffers["codes"][0, 0].sum()

    def use_all(**more: object) -> object:
        delta = load(hot, **more)
        views = [delta[tensor] for tensor in delta]
        return use(delta), views

    start = time.perf_counter()
    load(hot)
    clock.settle()
    first = (time.perf_counter() - start) * 1e3
    while has_checksums(device) and not are_loaded(device):
        time.sleep(0.01)  # the first load has started to compile the kernels that take checksums
    size, large_size = hot.stat().st_size, large.stat().st_size
    copied = floor(clock, size)
    verified = clock(lambda: load(hot))
    with mock.patch.object(upload, "can_unlock", return_value=False):
        locked = clock(lambda: load(hot))
    large_floor = floor(clock, large_size)
    large_taken = clock(lambda: load(large))
    cold_taken = clock(lambda: load(cold))
    hot_delta, cold_delta = load(hot), load(cold)
    for delta in (hot_delta, cold_delta):
        dict(delta)  # make the views
    checked = clock(lambda: check_terms("hot", hot_delta))
    positions = clock(lambda: check_terms("cold", cold_delta))
    with Container(cold) as container:
        raw = sum(section.raw_length for section in container.sections)
    gigabytes = size / 1e9
    # On a CPU the copy is the smallest part of the work, and there is nothing to reach.
    soon, share = (6.0, 0.85) if device.type == "cuda" else (None, None)
    return [
        Figure("floor: one pinned copy of the same bytes", copied, "ms", note=f"{size / copied / 1e6:.1f} GB/s"),
        Figure("load", verified, "ms", note=f"{size / verified / 1e6:.1f} GB/s, {gigabytes:.3f} GB"),
        Figure(
            "load with the interpreter's lock",
            locked,
            "ms",
            note=f"{size / locked / 1e6:.1f} GB/s, without compiled loops",
        ),
        Figure("load, verify=False", clock(lambda: load(hot, verify=False)), "ms"),
        Figure("load and first use", clock(lambda: use(load(hot))), "ms", soon, True, "a tiny kernel, synchronized"),
        Figure("the same, views of all tensors made", clock(use_all), "ms", note=f"{len(tensors)} tensors"),
        Figure("the same, entries known", clock(lambda: use_all(known=known)), "ms", soon, True),
        Figure(
            "checks of what is attached: scales", checked, "ms", note="beside load, for every delta that is attached"
        ),
        Figure("checks of what is attached: scales and positions", positions, "ms", note="of the cold file"),
        Figure("first load of the process", first, "ms", note="with the pinning of buffers and the start of threads"),
        Figure("floor of a large file", large_floor, "ms", note=f"{large_size / large_floor / 1e6:.1f} GB/s"),
        Figure("load of a large file", large_taken, "ms", note=f"{large_size / large_taken / 1e6:.1f} GB/s"),
        Figure("share of a pinned copy's speed", large_floor / large_taken, "", share, note="large file"),
        Figure("load of a cold file", cold_taken, "ms", note=f"{raw / cold_taken / 1e6:.1f} GB/s once decoded"),
        Figure("host memory pinned", dt.free_buffers() / 2**20, "MiB", 64, at_most=True),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads that read (up to 14)")
    parser.add_argument("--slot-mib", type=float, help="size of a pinned buffer (2, or 8)")
    parser.add_argument("--pinned-mib", type=float, default=upload.PINNED_BYTES / 2**20, help="all pinned buffers (64)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each; the median counts (9)")
    parser.add_argument("--small", action="store_true", help="small files, to see that it runs")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"upload.py: torch finds no CUDA device for --device {options.device}")
    if options.slot_mib:
        upload.BUFFER_BYTES = upload.LOCKED_BUFFER_BYTES = int(options.slot_mib * 2**20) // ZSTD_CHUNK * ZSTD_CHUNK
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() and os.access(shared, os.W_OK) else None) as folder:
        device = torch.device(options.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # by this name the checksum kernels know it
        clock = Clock(device, 2 if options.small else options.repeats)
        figures = measure(Path(folder), clock, options)
    card = torch.cuda.get_device_name(clock.device) if clock.device.type == "cuda" else "cpu"
    print(f"device: {card}")
    threads = options.threads or min(upload.DEFAULT_THREADS, len(os.sched_getaffinity(0)))
    name = "upload-small" if options.small else "upload"
    report(
        name,
        figures,
        device=card,
        threads=threads,
    )


if __name__ == "__main__":
    main()
