"""Two checkouts of deltafmt on the same work, in turn: this one, and an earlier one beside it.

    git worktree add ../earlier COMMIT
    python benchmarks/against.py ../earlier [--gib 1] [--small-gib 0.1] [--repeats 5]

Both run in this Python, as whole processes and inside one that has done the work before. Figures are medians; a ratio
is the median of the ratios of neighbouring runs, so that it holds where the machine's speed drifts. Whatever the
earlier checkout needs must be installed, and its compiled parts built in place.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Child, Figure, report, run_child
from synthetic import llama_specs, write_pair
from throughput import GIB, memory_folder, warm

HERE = Path(__file__).resolve().parent.parent

# Packs and unpacks twice, and prints the seconds of the second time.
IN_PROCESS = """
import sys, time, deltafmt
base, finetuned, delta, out = sys.argv[1:]
for _ in range(2):
    start = time.perf_counter()
    deltafmt.pack(base, finetuned, delta, force=True)
    packed = time.perf_counter()
    deltafmt.unpack(base, delta, out, force=True)
    unpacked = time.perf_counter()
print(packed - start, unpacked - packed)
"""

# Hidden size, inner size and vocabulary of the smaller pair.
SMALL_SHAPE = (2048, 5504, 4096)

METHODS = {
    "--nm 2:16 --bits 2": ("--nm", "2:16", "--bits", "2"),
    "dare": ("--method", "dare"),
    "rtn": ("--method", "rtn"),
    "bitdelta": ("--method", "bitdelta"),
    "residual": ("--method", "residual"),
}


@dataclass(frozen=True, slots=True)
class Tree:
    """One of the two checkouts."""

    name: str
    folder: Path

    def run(self, *words: str | os.PathLike[str]) -> Child:
        """Run Python on this checkout."""
        os.environ["PYTHONPATH"] = str(self.folder)
        return run_child(sys.executable, *words)


def whole(trees: list[Tree], words: list[str | Path], repeats: int) -> dict[str, list[Child]]:
    """Run ``deltafmt`` with some arguments on both checkouts in turn; ``{tree}`` in one stands for the tree's name."""
    runs: dict[str, list[Child]] = {tree.name: [] for tree in trees}
    for number in range(repeats + 1):
        for tree in trees:
            child = tree.run("-m", "deltafmt", *(str(word).replace("{tree}", tree.name) for word in words))
            if number:  # the first run warms up
                runs[tree.name].append(child)
    return runs


def compared(name: str, values: dict[str, list[float]], unit: str, target: float | None) -> list[Figure]:
    """Return both medians of a speed, and the ratio of this checkout to the other."""
    mine, theirs = values["this"], values["earlier"]
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return [
        Figure(f"{name}, earlier", statistics.median(theirs), unit),
        Figure(f"{name}, this", statistics.median(mine), unit),
        Figure(f"{name}, times the earlier speed", ratio, "x", target),
    ]


def speeds(runs: dict[str, list[Child]], nbytes: int) -> dict[str, list[float]]:
    """Return GB/s of the fine-tune."""
    return {name: [nbytes / child.seconds / 1e9 for child in children] for name, children in runs.items()}


def large(trees: list[Tree], pair: tuple[Path, Path], work: Path, repeats: int) -> list[Figure]:
    """Compare pack and unpack with their default options."""
    base, finetuned = pair
    nbytes = sum(path.stat().st_size for path in finetuned.glob("*.safetensors"))
    warm(base, finetuned)
    figures, delta = [], work / "{tree}.deltafmt"
    with memory_folder(work) as shared:
        packed = whole(trees, ["pack", base, finetuned, "-o", delta, "--force"], repeats)
        unpacked = whole(trees, ["unpack", base, delta, "-o", shared / "out", "--force"], repeats)
        figures += compared("pack, whole process", speeds(packed, nbytes), "GB/s", 1.8)
        figures += compared("unpack, whole process", speeds(unpacked, nbytes), "GB/s", 1.6)
        for name, runs in (("pack", packed), ("unpack", unpacked)):
            for tree in trees:
                peak = max(child.peak_bytes for child in runs[tree.name]) / 1e6
                figures.append(Figure(f"{name}, peak memory, {tree.name}", peak, "MB"))
        inside: dict[str, list[tuple[float, float]]] = {tree.name: [] for tree in trees}
        for _ in range(repeats):
            for tree in trees:
                words = (base, finetuned, work / f"{tree.name}.deltafmt", shared / "out")
                first, second = tree.run("-c", IN_PROCESS, *words).output.split()
                inside[tree.name].append((nbytes / float(first) / 1e9, nbytes / float(second) / 1e9))
        for place, (name, target) in enumerate((("pack", 1.4), ("unpack", 1.2))):
            values = {tree: [pair[place] for pair in pairs] for tree, pairs in inside.items()}
            figures += compared(f"{name}, in process", values, "GB/s", target)
    digests = {hashlib.sha256((work / f"{tree.name}.deltafmt").read_bytes()).hexdigest() for tree in trees}
    return [*figures, Figure("different files of the two", len(digests), "", 1, at_most=True)]


def methods(trees: list[Tree], pair: tuple[Path, Path], work: Path, repeats: int) -> list[Figure]:
    """Compare whole packs by other methods, on a smaller pair."""
    nbytes = sum(path.stat().st_size for path in pair[1].glob("*.safetensors"))
    figures = []
    for name, words in METHODS.items():
        runs = whole(trees, ["pack", *pair, "-o", work / "{tree}.deltafmt", "--force", *words], repeats)
        figures += compared(f"pack {name}", speeds(runs, nbytes), "GB/s", 1.0)
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="the other checkout")
    parser.add_argument("--gib", type=float, default=1.0, help="size of a side (1)")
    parser.add_argument("--small-gib", type=float, default=0.1, help="size of a side for the methods (0.1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (5)")
    options = parser.parse_args()
    trees = [Tree("earlier", options.earlier.resolve()), Tree("this", HERE)]
    # A checkout in the current folder would be imported first.
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        work = Path(temporary)
        pairs = []
        for gib, shape in ((options.gib, ()), (options.small_gib, SMALL_SHAPE)):
            folder = work / f"{gib:g}-gib"
            folder.mkdir()
            pairs.append(write_pair(folder, llama_specs(int(gib * GIB), *shape)))
        figures = large(trees, pairs[0], work, options.repeats)
        figures += methods(trees, pairs[1], work, options.repeats)
    report("against", figures, gib=options.gib, small_gib=options.small_gib, repeats=options.repeats)


if __name__ == "__main__":
    main()
