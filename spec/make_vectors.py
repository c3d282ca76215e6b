"""Make the test vectors of deltafmt-v1.md, section 16.

    python spec/make_vectors.py            write spec/vectors/ and spec/musts.md
    python spec/make_vectors.py --check    compare with the files that are there

The writer makes the good files. A bad file is a good one with one thing changed; checksums, digests, the content id and
the seal are computed anew.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import container_vectors
import kind_vectors
import musts
from vector_tools import VECTORS

from deltafmt import core

# Importing registers the generators; those of the kinds come first, because the others use their content. All matrices
# are those of the numpy references, which take parameters that the compiled loops refuse.
with core.reference_only():
    for _package in (kind_vectors, container_vectors):
        for _module in pkgutil.iter_modules(_package.__path__):
            importlib.import_module(f"{_package.__name__}.{_module.name}")

FOLDER = Path(__file__).parent / "vectors"
MUSTS = Path(__file__).parent / "musts.md"


def main() -> int:
    """Write the vectors, or compare them with the files that are there."""
    made = {f"{name}.vec": data for name, data in VECTORS.items()}
    table = musts.table().encode()
    if sys.argv[1:] == ["--check"]:
        made[MUSTS.name] = table
        found = {path.name: path.read_bytes() for path in (*FOLDER.glob("*.vec"), MUSTS)}
        wrong = sorted(name for name in found.keys() | made.keys() if found.get(name) != made.get(name))
        for name in wrong:
            print(f"{name} is not what its generator makes")
        return 1 if wrong else 0
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.vec"):
        path.unlink()
    for name, data in made.items():
        (FOLDER / name).write_bytes(data)
    MUSTS.write_bytes(table)
    print(f"{len(VECTORS)} vectors, {sum(map(len, VECTORS.values())):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
