"""Measure how quickly the second reader, spec/reader, opens and verifies files.

    python benchmarks/reader.py

Files of 1,000 small tensors and of a few large ones are packed and handed to ``spec/reader/timing.c``. Times are of the
processor. Verifying is compared with BLAKE3 over the same file, mapped anew, which is the least that a verifier does.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from common import Figure, report

import deltafmt
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.methods import RTN, DeltaDQ
from deltafmt.terms.floats import narrow

READER = Path(__file__).resolve().parent.parent / "spec" / "reader"
METHODS = {
    "2:16, 4 bits, seeded": DeltaDQ(2, 16, 4),
    "8:16, 4 bits, seeded": DeltaDQ(8, 16, 4),
    "8:16, 4 bits, fixed": DeltaDQ(8, 16, 4, index="fixed"),
    "rtn, 4 bits": RTN(4),
    "rtn, 3 bits": RTN(3),
}


def build(folder: Path) -> Path:
    """Compile the program that times the reader."""
    program = folder / "timing"
    sources = [READER / name for name in ("timing.c", "deltafmt.c", "blake3.c", "xxh3.c")]
    compiler = os.environ.get("CC", "cc")
    flags = ("-std=c11", "-O2", "-ffp-contract=off")
    subprocess.run([compiler, *flags, "-o", program, *sources, "-lpthread", "-ldl", "-lm"], check=True)
    return program


def write(folder: Path, tensors: int, shape: tuple[int, int], change: float) -> Path:
    """Write a folder of BF16 matrices; ``change`` is how far it lies from the base."""
    names = [f"model.layers.{number:04}.mlp.up_proj.weight" for number in range(tensors)]
    writer = CheckpointWriter(folder, [TensorSpec(name, "BF16", shape) for name in names])
    base, moved = np.random.default_rng(1), np.random.default_rng(2)
    for name in names:
        values = base.standard_normal(shape, np.float32)
        if change:
            values += np.float32(change) * moved.standard_normal(shape, np.float32)
        writer.write(name, 0, narrow(values, "BF16").tobytes())
    writer.commit()
    return folder


def timed(program: Path, file: Path, repeats: int) -> dict[str, float]:
    """Return the seconds that parts of reading take, and the file's bytes."""
    told = subprocess.run([program, file, str(repeats)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told)


def main() -> None:
    """Measure, print and write the result."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        program = build(folder)
        many = folder / "many.deltafmt"
        small = [write(folder / f"many-{change}", 1000, (32, 64), change) for change in (0, 0.1)]
        deltafmt.pack(*small, many, method=DeltaDQ(4, 16, 4))
        found = timed(program, many, 50)
        opened = 1e3 * (found["open"] + found["validate"])
        figures = [
            Figure("open and validate 1,000 tensors", opened, "ms", 1.0, at_most=True),
            Figure("verify 1,000 tensors of 1.1 KB", found["bytes"] / found["verify"] / 1e9, "GB/s"),
        ]
        large = [write(folder / f"large-{change}", 4, (4096, 4096), change) for change in (0, 0.1)]
        for name, method in METHODS.items():
            file = folder / "large.deltafmt"
            deltafmt.pack(*large, file, method=method, force=True)
            found = timed(program, file, 15)
            note = (
                f"verify {found['bytes'] / found['verify'] / 1e9:.2f} GB/s, BLAKE3 in memory "
                f"{found['bytes'] / found['blake3'] / 1e9:.2f}, XXH3 {found['bytes'] / found['xxh3'] / 1e9:.2f}"
            )
            ratio = 100 * found["blake3_mapped"] / found["verify"]
            figures.append(Figure(f"verify, of BLAKE3's speed: {name}", ratio, "%", 80.0, note=note))
        report("reader", figures)


if __name__ == "__main__":
    main()
