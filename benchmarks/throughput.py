"""Speed and memory of pack, unpack and verify on a synthetic pair, beside the time to only read and subtract.

    python benchmarks/throughput.py [--gib 1] [--folder FOLDER]

Everything is warm: files are in the page cache. The floors read both sides in blocks and subtract them into
a buffer that is used again, once with positioned reads and once through a populated memory map, with one thread and
with as many as pack uses. GB are 10**9 bytes of the fine-tune.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import WORKER_THREADS, Child, Figure, deltafmt_child, report, seconds
from numpy.typing import NDArray
from synthetic import llama_specs, write_pair

import deltafmt
from deltafmt import core
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.terms.floats import widen

BLOCK = 4 << 20
GIB = 1 << 30
POPULATE = getattr(mmap, "MADV_POPULATE_READ", 22)
SETTINGS_THREADS = (1, 2, 5)
Block = tuple[int, int]


class Files:
    """The weight files of both sides, opened for the floors; a block is (file, offset)."""

    def __init__(self, base: Path, finetuned: Path) -> None:
        self.pairs = []
        self.maps = []
        for left in sorted(base.glob("*.safetensors")):
            paths = left, finetuned / left.name
            handles = [os.open(path, os.O_RDONLY) for path in paths]
            self.pairs.append(handles)
            self.maps.append([mmap.mmap(handle, 0, prot=mmap.PROT_READ) for handle in handles])
        self.blocks = [
            (number, offset)
            for number, (handle, _) in enumerate(self.pairs)
            for offset in range(0, os.fstat(handle).st_size - BLOCK + 1, BLOCK)
        ]
        self._local = threading.local()

    def close(self) -> None:
        """Close everything."""
        for handles, maps in zip(self.pairs, self.maps, strict=True):
            for handle, mapped in zip(handles, maps, strict=True):
                mapped.close()
                os.close(handle)

    def subtract(self, sides: list[NDArray[np.uint16]]) -> None:
        """Subtract into this thread's buffer."""
        if not hasattr(self._local, "delta"):
            self._local.delta = np.empty(BLOCK // 2, np.float32)
        if core.native is None:
            np.subtract(widen(sides[1], "BF16"), widen(sides[0], "BF16"), out=self._local.delta)
        else:
            core.native.subtract(sides[1], "BF16", sides[0], "BF16", self._local.delta)

    def by_reads(self, block: Block) -> None:
        """Read a block of both sides into this thread's buffers, and subtract."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = [np.empty(BLOCK // 2, np.uint16) for _ in range(2)]
        number, offset = block
        for handle, buffer in zip(self.pairs[number], self._local.buffers, strict=True):
            os.preadv(handle, [memoryview(buffer)], offset)
        self.subtract(self._local.buffers)

    def by_map(self, block: Block) -> None:
        """Populate a block of both sides in the memory map, subtract, and unmap the pages again."""
        number, offset = block
        sides = []
        for mapped in self.maps[number]:
            with contextlib.suppress(OSError):  # an older kernel: pages come with a fault each
                mapped.madvise(POPULATE, offset, BLOCK)
            sides.append(np.frombuffer(mapped, np.uint16, BLOCK // 2, offset))
        self.subtract(sides)
        for mapped in self.maps[number]:
            mapped.madvise(mmap.MADV_DONTNEED, offset, BLOCK)

    def all_blocks(self, work: Callable[[Block], None], threads: int) -> None:
        """Do every block with so many threads."""
        if threads == 1:
            for block in self.blocks:
                work(block)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, self.blocks):
                pass


def floors(base: Path, finetuned: Path, nbytes: int, repeats: int) -> tuple[list[Figure], float]:
    """Return the floors, and the time of the fastest that uses as many threads as pack."""
    files = Files(base, finetuned)
    figures, times = [], []
    try:
        for name, work in (("preadv", files.by_reads), ("memory map", files.by_map)):
            for threads in sorted({1, WORKER_THREADS}):
                files.all_blocks(work, threads)
                taken = seconds(lambda w=work, t=threads: files.all_blocks(w, t), repeats)
                figures.append(Figure(f"floor: {name}, {threads} threads", nbytes / taken / 1e9, "GB/s"))
                if threads == WORKER_THREADS:
                    times.append(taken)
    finally:
        files.close()
    return figures, min(times)


def warm(*folders: Path) -> None:
    """Bring every file into the page cache."""
    for folder in folders:
        for path in folder.iterdir():
            with open(path, "rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass


@contextlib.contextmanager
def memory_folder(fallback: Path) -> Iterator[Path]:
    """Give a folder on memory-backed storage, if there is any."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else fallback) as folder:
        yield Path(folder)


def speeds(base: Path, finetuned: Path, work: Path, repeats: int) -> list[Figure]:
    """Measure pack, unpack and verify beside the floors."""
    checkpoint = Checkpoint(finetuned)
    nbytes = checkpoint.nbytes
    warm(base, finetuned)
    figures, floor = floors(base, finetuned, nbytes, repeats)
    delta = work / "speed.deltafmt"

    def pack() -> None:
        deltafmt.pack(base, finetuned, delta, force=True)

    pack()
    taken = seconds(pack, repeats)
    figures += [
        Figure("pack, in process", nbytes / taken / 1e9, "GB/s", 1.0),
        Figure("pack, times the fastest floor", taken / floor, "x", 3.0, at_most=True),
    ]
    child = deltafmt_child("pack", base, finetuned, "-o", delta, "--force")
    figures.append(Figure("pack, whole process", nbytes / child.seconds / 1e9, "GB/s", 1.0))
    with memory_folder(work) as shared:
        out = shared / "unpacked"

        def unpack() -> None:
            deltafmt.unpack(base, delta, out, force=True)

        unpack()
        taken = seconds(unpack, repeats)
        figures.append(Figure("unpack, in process", nbytes / taken / 1e9, "GB/s", 0.7, note="replaces a folder"))
        shutil.rmtree(out)
        child = deltafmt_child("unpack", base, delta, "-o", out)
        figures.append(Figure("unpack, whole process", nbytes / child.seconds / 1e9, "GB/s", 0.7))
    deltafmt.verify(delta)
    taken = seconds(lambda: deltafmt.verify(delta), repeats)
    figures.append(Figure("verify", nbytes / taken / 1e9, "GB/s", note="of fine-tuned bytes, without the base"))
    taken = seconds(lambda: deltafmt.verify(delta, base), repeats)
    figures.append(Figure("verify --base", nbytes / taken / 1e9, "GB/s"))
    figures.append(Figure("delta file", delta.stat().st_size, "bytes", note=f"fine-tune: {nbytes:,}"))
    figures += same_bytes(base, finetuned, work)
    return figures


def same_bytes(base: Path, finetuned: Path, work: Path) -> list[Figure]:
    """Pack with several numbers of threads and count the different files that this gives."""
    digests = set()
    for threads in SETTINGS_THREADS:
        delta = work / "threads.deltafmt"
        deltafmt.pack(base, finetuned, delta, force=True, threads=threads)
        with open(delta, "rb") as file:
            digests.add(hashlib.file_digest(file, "sha256").hexdigest())
    text = ", ".join(map(str, SETTINGS_THREADS))
    return [Figure(f"different files from {text} threads", len(digests), "", 1, at_most=True)]


def memory(base: Path, finetuned: Path, work: Path, label: str) -> list[Figure]:
    """Measure the peak resident memory of pack and unpack as processes."""
    largest = max(tensor.nbytes for tensor in Checkpoint(finetuned).tensors.values())
    delta = work / "memory.deltafmt"
    with memory_folder(work) as shared:
        children: dict[str, Child] = {
            "pack": deltafmt_child("pack", base, finetuned, "-o", delta, "--force"),
            "unpack": deltafmt_child("unpack", base, delta, "-o", shared / "unpacked"),
        }
    limit = (300e6 + 3 * largest) / 1e6
    return [
        Figure(f"{name}, peak memory, {label}", child.peak_bytes / 1e6, "MB", limit, at_most=True)
        for name, child in children.items()
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of a side (1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts (3)")
    parser.add_argument("--folder", type=Path, help="keep the pairs here and use them again")
    parser.add_argument("--no-speed", action="store_true", help="measure memory only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        figures = []
        for gib in (options.gib, options.gib / 4):
            folder = (options.folder or work) / f"{gib:g}-gib"
            folder.mkdir(parents=True, exist_ok=True)
            pair = write_pair(folder, llama_specs(int(gib * GIB)))
            if gib == options.gib and not options.no_speed:
                figures += speeds(*pair, work, options.repeats)
            figures += memory(*pair, work, f"{gib:g} GiB a side")
    report("throughput", figures, gib=options.gib, repeats=options.repeats)


if __name__ == "__main__":
    main()
