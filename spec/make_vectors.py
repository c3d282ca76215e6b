"""Make the test vectors of deltafmt-v1.md, section 16.

    python spec/make_vectors.py            write spec/vectors/
    python spec/make_vectors.py --check    compare with the files that are there

The writer makes the good files. A bad file is a good one with one thing changed. If a reader must get past the seal to
see the change, the seal is computed anew.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import kind_vectors
from vector_tools import VECTORS

# Importing registers the generators; those of the kinds come first, because the others use their content.
for _module in pkgutil.iter_modules(kind_vectors.__path__):
    importlib.import_module(f"kind_vectors.{_module.name}")
for _name in ("bad_vectors", "good_vectors", "rule_vectors", "exact_vectors", "exact_bad_vectors"):
    importlib.import_module(_name)

FOLDER = Path(__file__).parent / "vectors"


def main() -> int:
    """Write the vectors, or compare them with the files that are there."""
    if sys.argv[1:] == ["--check"]:
        found = {path.stem: path.read_bytes() for path in FOLDER.glob("*.vec")}
        wrong = sorted(name for name in found.keys() | VECTORS.keys() if found.get(name) != VECTORS.get(name))
        for name in wrong:
            print(f"{name}.vec is not what its generator makes")
        return 1 if wrong else 0
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.vec"):
        path.unlink()
    for name, data in VECTORS.items():
        (FOLDER / f"{name}.vec").write_bytes(data)
    print(f"{len(VECTORS)} vectors, {sum(map(len, VECTORS.values())):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
