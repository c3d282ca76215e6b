"""Hand mutated files to both readers, the library and spec/reader, until the time is over; stop at a difference.

    python fuzz/fuzz_both.py --seconds 3600 --seed 1

The second reader is built under sanitizers unless ``--fast`` says otherwise. A seed names the inputs, so a run can be
repeated; runs of different seeds can go on side by side. A file on which the readers differ, or that ends the second
one, is written to the folder of ``--findings``. The last line says on how many inputs both readers agreed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "fuzz")]

import mutate
import numpy as np

import c_reader
from both_readers import compare


def seed_files() -> list[bytes]:
    """Return the corpus and the good vectors."""
    files = [path.read_bytes() for path in sorted((ROOT / "fuzz" / "corpus").glob("*.deltafmt"))]
    for path in sorted((ROOT / "spec" / "vectors").glob("*.vec")):
        head, _, body = path.read_bytes().partition(b"\n\n")
        if head.startswith(b"expect: ok"):
            files.append(zlib.decompress(body))
    return files


def main() -> int:
    """Run until the time is over; return 1 if there was a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="build the second reader without sanitizers")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder for files that differ")
    options = parser.parse_args()
    np.seterr(all="ignore")  # scales may be any bits before they are checked
    rng = random.Random(options.seed)
    files = seed_files()
    found: Counter[str] = Counter()
    differences = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        (program,) = c_reader.build(Path(scratch), "driver" if options.fast else "checked/driver")
        driver = c_reader.Driver(program)
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            data = mutate.mutate(rng.choice(files), rng)
            try:
                result = compare(data, driver, Path(scratch) / "x.deltafmt")
                difference = result.difference
            except AssertionError as error:  # the second reader ended
                difference = str(error)
                driver = c_reader.Driver(driver.program)
            else:
                found[result.verified] += 1
            if difference:
                differences += 1
                options.findings.mkdir(exist_ok=True)
                path = options.findings / f"{options.seed}-{sum(found.values())}.deltafmt"
                path.write_bytes(data)
                print(f"{path}: {difference}", flush=True)
        driver.close()
    counts = ", ".join(f"{count:,} {word}" for word, count in found.most_common())
    print(
        f"seed {options.seed}: both readers agreed on {sum(found.values()) - differences:,} of {sum(found.values()):,} "
        f"inputs ({counts})"
    )
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
