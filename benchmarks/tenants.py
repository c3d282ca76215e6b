"""One wide matrix, 16 deltas of one token each: the kernel of every kind of layout, and BitDelta's beside them.

    python benchmarks/tenants.py [--bitdelta binary_gemm_kernel.py] [--jobs 12]

Every figure is a CUDA graph of products of 12288x4096 with 8 sets of 16 deltas, more than the second-level cache holds.
Codes and activations are random. ``--bitdelta`` names the file with BitDelta's published Triton kernel
(FasterDecoding/BitDelta, bitdelta/binary_gemm_kernel.py). ``--jobs`` processes compile the kernels beforehand.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import Figure, report
from gpu import DEVICE, milliseconds, random_operand, sparse_slots

from deltafmt.kernels.products import matmul_
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout

RATIO_128 = tuple(NMLayout(1, 32, 4, "seeded", "midtread", share) for share in (1, 4))
# Deltas of other kinds than nm: the least share of the copy's speed, and by how much BitDelta's kernel must be slower.
PACKED = {
    "lowbit k=1": (LowbitLayout(1, "midrise"), 0.20, 5.0),
    "lowbit k=2": (LowbitLayout(2, "midrise"), 0.35, None),
    "lowbit k=4": (LowbitLayout(4), 0.60, None),
    "lowbit k=4, groups of 128": (LowbitLayout(4, "midtread", "BF16", 128), None, None),
    "lowrank 128 BF16": (LowRankLayout(128, "BF16"), None, None),
    "lowrank 1024 k=2, groups of 128": (LowRankLayout(1024, Coding(2, "asymmetric", "BF16", 128)), None, None),
    "sparse 1:8 k=4": (SparseLayout(Coding(4, "midtread"), 4), None, None),
}


class Tenants:
    """Products of one 12288x4096 matrix with 16 tenants, one token each; 8 copies, more than the cache holds."""

    tenants, rows, columns = 16, 12288, 4096

    def __init__(self, copies: int = 8) -> None:
        self.copies = copies
        self.x = torch.randn(self.tenants, self.columns, device=DEVICE).bfloat16()
        self.y = torch.zeros(self.tenants, self.rows, device=DEVICE, dtype=torch.bfloat16)
        self.segments = Segments.of(list(range(self.tenants)), self.tenants, DEVICE)

    def of_peer(self, path: Path) -> float:
        """Return the milliseconds of BitDelta's kernel, per tenant."""
        spec = importlib.util.spec_from_file_location("binary_gemm_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
        x = self.x[:, None].half()
        shape = (self.copies, self.tenants, self.columns // 32, self.rows)
        packed = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=DEVICE)
        peer.binary_bmm(x, packed[0])
        return self.each(lambda: [peer.binary_bmm(x, one) for one in packed])

    def of_layout(self, layout: TermLayout) -> float:
        """Return the milliseconds of our kernel, per tenant."""
        tables = []
        for copy in range(self.copies):
            table = OperandTable(self.tenants, [self.rows], self.columns, DEVICE)
            for slot in range(self.tenants):
                table.put(slot, [(random_operand(layout, self.rows, self.columns, copy * 99 + slot),)])
            table.layout_tables(slice(0, 1))
            tables.append(table)
        return self.each(lambda: [matmul_([self.y], self.x, table, self.segments) for table in tables])

    def each(self, function: Callable[[], object]) -> float:
        """Return the milliseconds that a function of all copies and tenants takes for one."""
        return milliseconds(function) / self.copies / self.tenants

    def bytes_of(self, layout: TermLayout) -> int:
        """Return what a product reads of one tenant's delta."""
        return sum(
            layout.buffer_lengths(self.rows, self.columns, sparse_slots(layout, self.rows, self.columns)).values()
        )


def measure_tenants(path: Path | None, copy_speed: float) -> Iterator[Figure]:
    """One wide matrix, 16 tenants of one token: each kind, and BitDelta's kernel where its file is given."""
    made = Tenants()
    theirs = made.of_peer(path) if path else None
    if theirs:
        yield Figure("BitDelta's kernel, 12288x4096, 16 tenants", theirs * made.tenants * 1000, "us")
    for layout in RATIO_128:
        time = made.of_layout(layout)
        yield Figure(f"1:32 k=4 v={layout.share}, 12288x4096, 16 tenants", time * made.tenants * 1000, "us")
        if theirs:
            yield Figure(f"BitDelta's time over ours, v={layout.share}", theirs / time, "", 10.0)
    for name, (layout, share, times) in PACKED.items():
        time = made.of_layout(layout)
        yield Figure(f"{name}, 12288x4096, 16 tenants", time * made.tenants * 1000, "us")
        speed = made.bytes_of(layout) / time / 1e9
        yield Figure(f"its share of the copy's speed, {name}", speed / copy_speed, "", share)
        if theirs and times:
            yield Figure(f"BitDelta's time over ours, {name}", theirs / time, "", times)


def copy_time() -> float:
    """Return the milliseconds that a copy of 2 GiB takes."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def compile_job(job: int) -> None:
    """Compile the kernels of one layout: the cache on disk is shared."""
    Tenants(1).of_layout([*RATIO_128, *(layout for layout, _, _ in PACKED.values())][job])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitdelta", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tenants.py needs a CUDA GPU")
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_job, range(len(RATIO_128) + len(PACKED))))
    speed = 2 * (1 << 31) / copy_time() / 1e9
    figures = [Figure("device copy, read and write", speed, "TB/s")]
    for figure in measure_tenants(options.bitdelta, speed):
        figures.append(figure)
        print(*figure.row(), flush=True)
        torch.cuda.empty_cache()
    report("tenants", figures, gpu=torch.cuda.get_device_name(), torch=torch.__version__)


if __name__ == "__main__":
    main()
