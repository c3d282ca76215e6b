"""Pack a real pair, inspect, verify and unpack the file, and solve word problems with the restored model.

The pair in ``examples/nano`` is a Llama of 0.9 million parameters (4 layers, 128 wide, bf16) and its full fine-tune on
word problems. Run it with ``make demo``.

The errors of random dropout average out over a row. Rows of 128 columns are too short for that, so every element is
kept here (``--nm 2:2``) and only rounded. ``docs/benchmarks.md`` has the figures of a model that is wide enough.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "examples" / "nano"
OUT = ROOT / "demo-out"


def run(*arguments: str) -> None:
    """Run one deltafmt command, showing it as a user would type it."""
    print(f"\n$ deltafmt {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "deltafmt", *arguments], check=True, cwd=ROOT)


def main() -> None:
    """Run the demo."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from solve import accuracy

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    run("pack", "examples/nano/base", "examples/nano/math", "-o", "demo-out/math.deltafmt", "--nm", "2:2")
    run("inspect", "demo-out/math.deltafmt")
    run("verify", "demo-out/math.deltafmt", "--base", "examples/nano/base")
    run("unpack", "examples/nano/base", "demo-out/math.deltafmt", "-o", "demo-out/math")

    print("\n1,000 word problems solved:", flush=True)
    for name, folder in (("base", NANO / "base"), ("fine-tune", NANO / "math"), ("unpacked", OUT / "math")):
        share = accuracy(folder, NANO / "tokenizer.json", NANO / "eval.jsonl")
        print(f"  {name:10} {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
