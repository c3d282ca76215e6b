"""Archives that keep every bit: their sizes beside those of peers, and the speed of packing and unpacking them.

    python benchmarks/exact.py [BASE FINETUNED ...] [--bf16] [--gib 1] [--peers PYTHON]

For each pair given, the table has the share of the fine-tune's bytes that an archive takes. The baselines are made
here: ``zstd --patch-from`` and ``xdelta3`` if the programs are there; the XOR, and the ordered difference, with the
base, in planes of bytes, by zstd. ``--peers`` names a Python that has zipnn or z4ai, which are then asked as well;
``--bf16`` also measures each pair of F32 rounded to BF16. Then a synthetic pair is packed, verified and unpacked in
processes of their own. GB are 10**9 bytes of the fine-tune; CPU seconds are of all threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from deltafmt.terms.floats import narrow

GIB = 1 << 30

# Ask a peer for a size: the text of a small program for another Python, whose arguments are the file of the values,
# that of the prediction, and the dtype. Each says nothing if the package is not there.
PEERS = {
    "zipnn": """
import zipnn
from pathlib import Path
values, prediction = (bytearray(Path(name).read_bytes()) for name in sys.argv[1:3])
dtype = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}[sys.argv[3]]
print("zipnn", len(zipnn.ZipNN(bytearray_dtype=dtype).compress(bytes(values))), sep="\t")
xor = (int.from_bytes(values, "little") ^ int.from_bytes(prediction, "little")).to_bytes(len(values), "little")
print("zipnn of the XOR with the base", len(zipnn.ZipNN(bytearray_dtype=dtype).compress(xor)), sep="\t")
""",
    "z4ai": """
import z4ai
from pathlib import Path
values, prediction = (Path(name).read_bytes() for name in sys.argv[1:3])
dtype = {"BF16": "bf16", "F32": "fp32", "F16": "fp16"}[sys.argv[3]]
print("z4ai, relative to the base", len(z4ai.compress_delta(values, prediction, dtype=dtype)), sep="\t")
print("z4ai", len(z4ai.compress(values, dtype=dtype)), sep="\t")
""",
}
FOUND = "import importlib.util, sys\nif importlib.util.find_spec({name!r}) is None: sys.exit()\n"


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


def programs(base: Path, finetuned: Path) -> dict[str, int]:
    """Return what programs for patches make of the weight files joined; those that are not there are left out."""
    commands = {
        "zstd -9 --patch-from": "zstd -9 --single-thread -q -c --long=27 --patch-from base finetuned",
        "xdelta3 -9": "xdelta3 -9 -e -c -B 1073741824 -s base finetuned",
    }
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for side, path in (("base", base), ("finetuned", finetuned)):
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            (Path(folder) / side).write_bytes(b"".join(file.read_bytes() for file in files))
        for name, command in commands.items():
            words = command.split()
            if shutil.which(words[0]) is not None:
                sizes[name] = len(subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, check=True).stdout)
    return sizes


def peers(python: str, base: Path, finetuned: Path) -> dict[str, int]:
    """Return what packages of another Python make of the fine-tune's values."""
    sizes = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoint(base, lenient=True) as before,
        Checkpoint(finetuned) as after,
    ):
        dtype = next(iter(after.tensors.values())).dtype
        made = list(chunks_of(before, after))
        files = {"values": [values for _, values, _ in made], "prediction": [prediction for _, _, prediction in made]}
        for name, parts in files.items():
            (Path(folder) / name).write_bytes(b"".join(part.tobytes() for part in parts))
        for name, program in PEERS.items():
            command = [python, "-c", FOUND.format(name=name) + program, *files, dtype]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            for line in done.stdout.splitlines():
                found, tab, size = line.partition("\t")
                if tab:
                    sizes[found] = int(size)
    return sizes


def dtype_of(path: Path) -> str:
    """Return the dtype of a checkpoint's first tensor."""
    with Checkpoint(path, lenient=True) as checkpoint:
        return next(iter(checkpoint.tensors.values())).dtype


def rounded(path: Path, out: Path) -> Path:
    """Write a checkpoint's tensors of F32 as BF16, in one file; return it."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    with Checkpoint(path, lenient=True) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            data = b"".join(map(bytes, tensor.pieces()))
            if tensor.dtype == "F32":
                data = narrow(np.frombuffer(data, np.float32), "BF16").tobytes()
            tensors[name] = ("BF16" if tensor.dtype == "F32" else tensor.dtype, tensor.shape, data)
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(data)]}
    text = json.dumps(header).encode()
    out.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))
    return out


# At most so many percent of a pair's bytes, by the end of its label; and so much of what the best peer takes.
TARGETS = {"wordmath/math": 45.0, "rxnfp/bert_ft_10k_25s": 71.6, "rxnfp/bert_ft_10k_25s as BF16": 44.3}
AGAINST = {"BF16": 0.90, "F32": 0.95}


def sizes_of(base: Path, finetuned: Path, python: str | None, label: str) -> list[Figure]:
    """Return the sizes of one pair, in percent of the fine-tune's weight files."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for method in (Exact(), Exact("fast")):
            result = deltafmt.pack(base, finetuned, Path(folder) / "archive", method=method, force=True)
            deltafmt.verify(Path(folder) / "archive", base)
            made[f"deltafmt, level {method.level}, the whole file"] = result.size
        whole = result.finetuned_bytes
    own = len(made)
    made |= baselines(base, finetuned) | programs(base, finetuned)
    if python:
        made |= peers(python, base, finetuned)
    figures = [
        Figure(f"{label}: {name}", 100 * size / whole, "%", None if number else TARGETS.get(label), at_most=True)
        for number, (name, size) in enumerate(made.items())
    ]
    # The ordered difference is this project's own, without the sorting.
    others = {name: size for name, size in list(made.items())[own:] if not name.startswith("ordered")}
    best = min(others, key=lambda name: others[name])
    share = next(iter(made.values())) / others[best]
    return [*figures, Figure(f"{label}: beside {best}", share, "", AGAINST.get(dtype_of(finetuned)), at_most=True)]


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
    parser.add_argument("--bf16", action="store_true", help="also measure each pair rounded to BF16")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has zipnn or z4ai")
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("a base and a fine-tune for each pair")
    figures = []
    for base, finetuned in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        label = f"{finetuned.parent.name}/{finetuned.stem}"
        figures += sizes_of(base, finetuned, options.peers, label)
        if options.bf16 and dtype_of(finetuned) == "F32":
            with tempfile.TemporaryDirectory() as folder:
                pair = (rounded(path, Path(folder) / f"{path.stem}.safetensors") for path in (base, finetuned))
                figures += sizes_of(*pair, options.peers, f"{label} as BF16")
    if options.gib:
        with tempfile.TemporaryDirectory() as folder:
            figures += speeds(options.gib, options.folder or Path(folder), options.repeats)
    report("exact", figures, threads=WORKER_THREADS, measured=time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
