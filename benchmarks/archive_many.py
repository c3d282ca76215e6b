"""Many fine-tunes of one base: ``pack --many`` beside a ``pack`` for each, and what ``dedup`` foresees.

    python benchmarks/archive_many.py [--count 4] [--mib 128] [--method exact] [--repeats 3]

Fine-tunes of a synthetic base are packed both ways, in processes of their own; every file has to be the same. Then both
are run in this process, and the bytes that are read of the base's tensors are counted where the library takes them from
the mapped files. ``dedup`` estimates the sizes beforehand; its row says how far the estimate is from the files.
GB are 10**9 bytes of the fine-tunes.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import WORKER_THREADS, Figure, deltafmt_child, report
from synthetic import llama_specs, write_pair

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.methods import parse

MIB = 1 << 20
SMALL = 64 * 1024


@contextlib.contextmanager
def reads_of(folder: Path) -> Iterator[list[int]]:
    """Count the bytes that are read of the tensors of a folder, in a list that grows."""
    found: list[int] = []
    own: dict[str, Callable[..., Any]] = {name: getattr(Tensor, name) for name in ("pages", "pieces", "head")}

    def counted(name: str, length: Callable[..., int]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: int) -> Any:
            if type(tensor) is Tensor and tensor.file.path.parent == folder:
                found.append(length(tensor, *arguments))
            return own[name](tensor, *arguments)

        return call

    lengths: dict[str, Callable[..., int]] = {
        "pages": lambda tensor, start, length: min(length, tensor.nbytes - start),
        # Longer tensors are given piece by piece through pages.
        "pieces": lambda tensor, first=0: tensor.nbytes - first if tensor.nbytes <= SMALL else 0,
        "head": lambda tensor, length: min(length, tensor.nbytes),
    }
    try:
        for name, length in lengths.items():
            setattr(Tensor, name, counted(name, length))
        yield found
    finally:
        for name, method in own.items():
            setattr(Tensor, name, method)


def fine_tunes(folder: Path, count: int, mib: int) -> tuple[Path, list[Path]]:
    """Write a base and so many fine-tunes of it."""
    base, first = write_pair(folder, llama_specs(mib * MIB))
    tunes = [first.rename(folder / "tune0")]
    for number in range(1, count):
        _, other = write_pair(folder, llama_specs(mib * MIB), change_seed=number)
        tunes.append(other.rename(folder / f"tune{number}"))
    return base, tunes


def measured(folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Return the figures."""
    base, tunes = fine_tunes(folder, options.count, options.mib)
    many, single = folder / "many", folder / "single"
    size = sum(path.stat().st_size for tune in tunes for path in tune.glob("*.safetensors"))
    times: dict[str, list[float]] = {"many": [], "single": []}
    peaks: dict[str, list[int]] = {"many": [], "single": []}
    for _ in range(options.repeats):
        shutil.rmtree(many, ignore_errors=True)
        child = deltafmt_child("pack", "--many", base, *tunes, "-o", many, "--method", options.method)
        times["many"].append(child.seconds)
        peaks["many"].append(child.peak_bytes)
        shutil.rmtree(single, ignore_errors=True)
        single.mkdir()
        children = [
            deltafmt_child("pack", base, tune, "-o", single / f"{tune.name}.deltafmt", "--method", options.method)
            for tune in tunes
        ]
        times["single"].append(sum(child.seconds for child in children))
        peaks["single"].append(max(child.peak_bytes for child in children))
    for tune in tunes:
        name = f"{tune.name}.deltafmt"
        assert (many / name).read_bytes() == (single / name).read_bytes()
    method = parse(options.method)
    shutil.rmtree(many)
    with Checkpoint(base) as checkpoint:
        whole = checkpoint.nbytes
    with reads_of(base) as together:
        deltafmt.pack_many(base, tunes, many, method=method)
    with reads_of(base) as apart:
        for tune in tunes:
            deltafmt.pack(base, tune, single / f"{tune.name}.deltafmt", method=method, force=True)
    largest = max(spec.nbytes for spec in llama_specs(options.mib * MIB))
    figures = [
        Figure("base read, pack --many", sum(together) / whole, "times its tensors", 1.0, at_most=True),
        Figure(f"base read, {options.count} times pack", sum(apart) / whole, "times its tensors"),
        Figure("pack --many", size / 1e9 / min(times["many"]), "GB/s"),
        Figure(f"{options.count} times pack", size / 1e9 / min(times["single"]), "GB/s"),
        Figure("pack --many, peak memory", max(peaks["many"]) / 1e6, "MB", (300e6 + 3 * largest) / 1e6, at_most=True),
        Figure("pack, peak memory", max(peaks["single"]) / 1e6, "MB"),
    ]
    if method.exact:
        start = time.perf_counter()
        (proposal,) = deltafmt.dedup([base, *tunes], base=base).proposals
        taken = time.perf_counter() - start
        true = sum((many / f"{each.name}.deltafmt").stat().st_size for each in proposal.finetunes)
        foreseen = sum(each.saving.size for each in proposal.finetunes)
        figures += [
            Figure("dedup --base", (size + base_size(base)) / 1e9 / taken, "GB/s"),
            Figure("its estimate over the files' size", foreseen / true, "", note=f"+- {proposal.error / true:.4f}"),
        ]
    return figures


def base_size(base: Path) -> int:
    """Return the bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="fine-tunes")
    parser.add_argument("--mib", type=int, default=128, help="MiB of each")
    parser.add_argument("--method", default="exact", help="a method's spelling")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(Path(folder), options)
    about = {"count": options.count, "mib": options.mib, "method": options.method}
    report("archive_many", figures, threads=WORKER_THREADS, measured=time.strftime("%Y-%m-%d"), **about)


if __name__ == "__main__":
    main()
