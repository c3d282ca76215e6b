"""Archives that keep every bit: their sizes beside those of peers, and the speed of packing and unpacking them.

    python benchmarks/exact.py [BASE FINETUNED ...] [--gib 1] [--peers PYTHON]

For each pair given, the table has the share of the fine-tune's bytes that an archive takes. The baselines are made
here: ``zstd --patch-from`` if the program is there; the XOR, and the ordered difference, with the base, in planes of
bytes, by zstd. ``--peers`` names a Python that has zipnn, which is then asked as well. Then a synthetic pair is packed,
verified and unpacked in processes of their own. GB are 10**9 bytes of the fine-tune; CPU seconds are of all threads.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard
from common import WORKER_THREADS, Child, Figure, deltafmt_child, report
from synthetic import llama_specs, write_pair

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.exact.differences import Planes, planes_of, sorted_planes
from deltafmt.exact.units import Unit, Units, unit_of
from deltafmt.index.entries import predicts
from deltafmt.methods import Exact
from deltafmt.pipeline.exact_tensors import chunk_spans, predicted

GIB = 1 << 30

# Asks zipnn for the size of a file: the text of a small program for another Python.
ZIPNN = """
import sys, zipnn
data = open(sys.argv[1], "rb").read()
print(len(zipnn.ZipNN(bytearray_dtype=sys.argv[2]).compress(data)))
"""
ZIPNN_DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


def chunks_of(base: Checkpoint, finetuned: Checkpoint) -> Iterator[tuple[Unit, Units, Units]]:
    """Give the unit, the values and the prediction of every chunk of every tensor."""
    for tensor in finetuned.tensors.values():
        other = base.tensors.get(tensor.name)
        fits = other is not None and predicts(other.dtype, other.shape, tensor.dtype, tensor.shape)
        unit = unit_of(tensor.dtype)
        values = np.frombuffer(b"".join(map(bytes, tensor.pieces())), unit.dtype)
        for first, end in chunk_spans(tensor.dtype, tensor.shape):
            with predicted(other if fits else None, tensor.dtype, first, end) as prediction:
                yield unit, values[first:end], prediction


def planes_bytes(planes: Planes) -> int:
    """Return what zstd makes of planes."""
    compressor = zstandard.ZstdCompressor(level=1)
    return sum(len(compressor.compress(plane.data)) for plane in planes)


def baselines(base: Path, finetuned: Path) -> dict[str, int]:
    """Return the bytes of XOR and of the ordered difference, in planes."""
    sizes = {"XOR with the base, planes, zstd": 0, "ordered difference, planes, zstd": 0}
    with Checkpoint(base, lenient=True) as before, Checkpoint(finetuned) as after:
        for unit, values, prediction in chunks_of(before, after):
            sizes["XOR with the base, planes, zstd"] += planes_bytes(planes_of(values ^ prediction, unit))
            plain = sorted_planes(values, prediction, unit, Unit(unit.width))[0]
            sizes["ordered difference, planes, zstd"] += planes_bytes(plain)
    return sizes


def patched(base: Path, finetuned: Path) -> int | None:
    """Return the bytes of ``zstd --patch-from`` of the weight files joined; None without the program."""
    if shutil.which("zstd") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for side, path in (("base", base), ("finetuned", finetuned)):
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            (Path(folder) / side).write_bytes(b"".join(file.read_bytes() for file in files))
        command = ["zstd", "-9", "--single-thread", "-q", "-c", "--long=27", "--patch-from", "base", "finetuned"]
        return len(subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True).stdout)


def zipnn_sizes(python: str, base: Path, finetuned: Path) -> dict[str, int]:
    """Return the bytes of zipnn of the fine-tune, and of its XOR with the base."""
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoint(base, lenient=True) as before,
        Checkpoint(finetuned) as after,
    ):
        dtype = ZIPNN_DTYPES[next(iter(after.tensors.values())).dtype]
        made = list(chunks_of(before, after))
        for name, parts in (
            ("zipnn", [values for _, values, _ in made]),
            ("zipnn of the XOR", [values ^ prediction for _, values, prediction in made]),
        ):
            file = Path(folder) / "data"
            file.write_bytes(b"".join(part.tobytes() for part in parts))
            done = subprocess.run([python, "-c", ZIPNN, file, dtype], stdout=subprocess.PIPE, text=True, check=True)
            found[name] = int(done.stdout.split()[-1])
    return found


def sizes_of(base: Path, finetuned: Path, python: str | None) -> list[Figure]:
    """Return the sizes of one pair, in percent of the fine-tune's weight files."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for method in (Exact(), Exact("fast")):
            result = deltafmt.pack(base, finetuned, Path(folder) / "archive", method=method, force=True)
            deltafmt.verify(Path(folder) / "archive", base)
            made[f"deltafmt, level {method.level}, the whole file"] = result.size
        whole = result.finetuned_bytes
    made |= baselines(base, finetuned)
    if python:
        made |= zipnn_sizes(python, base, finetuned)
    patch = patched(base, finetuned)
    if patch is not None:
        made["zstd -9 --patch-from"] = patch
    label = f"{finetuned.parent.name}/{finetuned.stem}"
    return [Figure(f"{label}: {name}", 100 * size / whole, "%") for name, size in made.items()]


def timed(*arguments: str | Path) -> tuple[Child, float]:
    """Run a command of deltafmt; return it, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = deltafmt_child(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return child, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def speeds(gib: float, folder: Path, repeats: int) -> list[Figure]:
    """Return the speeds of a synthetic pair."""
    base, finetuned = write_pair(folder, llama_specs(int(gib * GIB)))
    size = sum(path.stat().st_size for path in finetuned.glob("*.safetensors"))
    largest = max(spec.nbytes for spec in llama_specs(int(gib * GIB)))
    figures = []
    for level in ("default", "fast"):
        delta, out = folder / "archive.deltafmt", folder / "restored"
        steps = {
            "pack": ("pack", base, finetuned, "-o", delta, "--method", f"exact:level={level}", "--force"),
            "verify --base": ("verify", delta, "--base", base),
            "unpack": ("unpack", base, delta, "-o", out, "--force"),
        }
        targets = {"pack": 0.8, "unpack": 1.2}
        for name, arguments in steps.items():
            runs = [timed(*arguments) for _ in range(repeats)]
            child, cpu = min(runs, key=lambda run: run[0].seconds)
            figures += [
                Figure(f"{name}, level {level}", size / 1e9 / child.seconds, "GB/s", targets.get(name)),
                Figure(f"{name}, level {level}, a CPU second", size / 1e9 / cpu, "GB"),
                Figure(
                    f"{name}, level {level}, peak memory",
                    child.peak_bytes / 1e6,
                    "MB",
                    (300e6 + 3 * largest) / 1e6,
                    at_most=True,
                ),
            ]
        assert digests(out) == digests(finetuned)
        figures.append(Figure(f"synthetic, level {level}", 100 * delta.stat().st_size / size, "%"))
        shutil.rmtree(out)
    return figures


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=Path, metavar="BASE FINETUNED", help="pairs of checkpoints")
    parser.add_argument("--gib", type=float, default=1, help="GiB a side of the synthetic pair; 0 for none")
    parser.add_argument("--folder", type=Path, help="where the synthetic pair is kept (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command, of which the fastest counts")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has zipnn")
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("a base and a fine-tune for each pair")
    figures = []
    for base, finetuned in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        figures += sizes_of(base, finetuned, options.peers)
    if options.gib:
        with tempfile.TemporaryDirectory() as folder:
            figures += speeds(options.gib, options.folder or Path(folder), options.repeats)
    report("exact", figures, threads=WORKER_THREADS, measured=time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
