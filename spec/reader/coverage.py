"""Run ``hashes`` on inputs of many lengths, and print which lines of the reader were reached.

    python coverage.py FOLDER PORTABLE...

FOLDER holds programs that were compiled with ``--coverage`` and have run; each PORTABLE a ``hashes`` whose hashes use
fewer instructions of the processor. A line counts as reached if it was in one of them.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def hash_inputs(program: Path) -> None:
    """Let a program hash inputs of every way that the hashes take."""
    rng = random.Random(1)
    sizes = [*range(260), *(1024 * n + more for n in (1, 2, 3, 8, 16, 17, 64, 129) for more in (-1, 0, 1))]
    sent = b"".join(struct.pack("<Q", size) + rng.randbytes(size) for size in sizes)
    subprocess.run([program.resolve()], input=sent, stdout=subprocess.DEVNULL, check=True, cwd=program.parent)


def main() -> None:
    """Print each file with the share of its lines, and the lines that were not reached."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for folder in map(Path, sys.argv[1:]):
        hash_inputs(folder / "hashes")
        for notes in sorted(folder.glob("*.gcno")):
            if notes.stem not in {"deltafmt", "blake3", "xxh3"}:
                continue
            told = subprocess.run(
                ["gcov", "--json-format", "--stdout", notes.name], cwd=folder, capture_output=True, check=True
            )
            for file in json.loads(told.stdout)["files"]:
                if "/reader/" in file["file"]:
                    for line in file["lines"]:
                        counts[Path(file["file"]).name][line["line_number"]] += line["count"]
    for name, lines in sorted(counts.items()):
        missed = [number for number, count in sorted(lines.items()) if not count]
        share = 100 * (1 - len(missed) / len(lines))
        print(f"{name}: {share:.1f}% of {len(lines)} lines; not reached: {', '.join(map(str, missed)) or 'none'}")


if __name__ == "__main__":
    main()
