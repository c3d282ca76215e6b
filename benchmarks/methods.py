"""Every method on a real fine-tune: the true size of its file, and what the unpacked model still solves.

    python benchmarks/methods.py MODELS_FOLDER [--pair wordmath] [--limit PROBLEMS] [SETTING ...]

A SETTING is a method's name, with options after a colon as a rule has them: ``residual:nm=1:8,bits=1``. Without any,
all of ``SETTINGS`` are measured, which takes an hour. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import Figure, report
from solve import accuracy

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.methods import METHODS, Method
from deltafmt.methods.options import make_method, split_pairs

SETTINGS = (
    "deltadq",
    "deltadq:nm=4:16,bits=2",
    "deltadq:nm=5:32,bits=2",
    "deltadq:nm=2:16,bits=2",
    "deltadq:nm=1:8,bits=1",
    "residual",
    "residual:rank=2",
    "residual:bits=2",
    "rtn",
    "rtn:bits=3",
    "rtn:bits=2",
    "bitdelta",
    "bitdelta:mean=row",
    "bitdelta:mean=column",
    "bitdelta:mean=group",
    "svd",
    "svd:bits_per_weight=1",
    "svd:bits_per_weight=1,bits=4",
    "svd:bits_per_weight=1,bits=8",
    "svd:bits_per_weight=0.57,bits=3",
    "delta-come",
    "delta-come:bits_per_weight=0.57",
    "delta-come:grid=midrise,scale=mse",
    "delta-come:scale=mse,refit=yes",
    "magnitude:nm=2:4",
    "magnitude:nm=4:16",
    "magnitude",
    "magnitude:density=0.25,bits=4",
    "dare",
    "dare:bits=4",
    "dare:drop=0.875,bits=4",
    "deltadq-sq",
    "deltadq-sq:nm=1:4,bits=2",
    "deltadq-sq:parts=1",
)


def method_of(setting: str) -> Method:
    """Return the method of a setting."""
    name, colon, options = setting.partition(":")
    return make_method(METHODS, name, split_pairs(options) if colon else {})


def measure(folder: Path, settings: list[str], limit: int | None) -> list[Figure]:
    """Pack, unpack and solve with every setting; two figures each."""
    base, finetuned = folder / "base", folder / "math"
    weights = Checkpoint(finetuned).file_bytes
    figures = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as temporary:
            delta, model = Path(temporary) / "packed.deltafmt", Path(temporary) / "unpacked"
            method = method_of(setting)
            start = time.perf_counter()
            size = deltafmt.pack(base, finetuned, delta, method=method).size
            taken = time.perf_counter() - start
            deltafmt.unpack(base, delta, model)
            share = accuracy(model, folder / "tokenizer.json", folder / "eval.jsonl", limit)
        note = f"{method.describe()}; {size:,} bytes, whole file; packed in {taken:.1f} s"
        figures += [
            Figure(f"{setting}: times smaller", weights / size, "x", note=note),
            Figure(f"{setting}: unpacked model solves", share, "of 1"),
        ]
        print(f"{setting}  {size:,} bytes  {weights / size:.2f}x  {taken:.1f} s  solves {share:.3f}", flush=True)
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS_FOLDER", help="folder that holds the pair's folder")
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="SETTING", help="METHOD[:OPTIONS]")
    parser.add_argument("--pair", default="wordmath", help="name of the pair's folder (wordmath)")
    parser.add_argument("--limit", type=int, help="use only the first problems, for a quick look")
    options = parser.parse_intermixed_args()
    for setting in options.settings:
        method_of(setting)
    name = "methods" if options.limit is None else "methods_limited"
    report(name, measure(options.models / options.pair, options.settings, options.limit), limit=options.limit)


if __name__ == "__main__":
    main()
