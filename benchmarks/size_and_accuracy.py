"""Size and accuracy on a real fine-tune: whole-file ratios, overhead, and what the unpacked models still solve.

    python benchmarks/size_and_accuracy.py MODELS_FOLDER [--limit PROBLEMS] [--pair wordmath]

MODELS_FOLDER holds a folder such as ``wordmath`` with ``base``, ``math``, ``tokenizer.json`` and ``eval.jsonl``. Needs
torch and transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Figure, report
from solve import accuracy

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.methods import DeltaDQ
from deltafmt.pipeline import summary


@dataclass(frozen=True, slots=True)
class Setting:
    """Options, and what they should reach: times smaller, and share solved (None: only reported)."""

    method: DeltaDQ
    ratio: float
    accuracy: float | None


SETTINGS = (
    Setting(DeltaDQ(4, 16, 4), 14, 0.98),
    Setting(DeltaDQ(2, 16, 2), 45, None),
    Setting(DeltaDQ(4, 16, 2), 26, 0.985),
)
OVERHEAD_BYTES = 64 * 1024
OVERHEAD_SHARE = 0.01


def measure(folder: Path, limit: int | None) -> list[Figure]:
    """Pack and unpack with every setting, and solve the problems with every model."""
    base, finetuned = folder / "base", folder / "math"

    def solved(model: Path) -> float:
        return accuracy(model, folder / "tokenizer.json", folder / "eval.jsonl", limit)

    weights = Checkpoint(finetuned).file_bytes
    figures = [
        Figure("fine-tune, safetensors files", weights, "bytes"),
        Figure("base solves", solved(base), "of 1"),
        Figure("fine-tune solves", solved(finetuned), "of 1"),
    ]
    for setting in SETTINGS:
        method = setting.method
        name = f"{method.n}:{method.m} k={method.bits}"
        with tempfile.TemporaryDirectory() as temporary:
            delta, model = Path(temporary) / "packed.deltafmt", Path(temporary) / "unpacked"
            size = deltafmt.pack(base, finetuned, delta, method=method).size
            with deltafmt.open(delta) as opened:
                rest = summary.overhead(opened.container)
            deltafmt.unpack(base, delta, model)
            share = solved(model)
        figures += [
            Figure(f"{name}: times smaller", weights / size, "x", setting.ratio, note=f"{size:,} bytes, whole file"),
            Figure(f"{name}: overhead", rest, "bytes", OVERHEAD_SHARE * size + OVERHEAD_BYTES, at_most=True),
            Figure(f"{name}: unpacked model solves", share, "of 1", setting.accuracy, note=method.describe()),
        ]
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS_FOLDER", help="folder that holds the pair's folder")
    parser.add_argument("--pair", default="wordmath", help="name of the pair's folder (wordmath)")
    parser.add_argument("--limit", type=int, help="use only the first problems, for a quick look")
    options = parser.parse_args()
    name = "size_and_accuracy" if options.limit is None else "size_and_accuracy_limited"
    report(name, measure(options.models / options.pair, options.limit), pair=options.pair, limit=options.limit)


if __name__ == "__main__":
    main()
