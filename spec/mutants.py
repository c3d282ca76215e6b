"""Run wrong versions of this package's reader against the vectors.

    python spec/mutants.py          every wrong reader against the vectors, until one catches it
    python spec/mutants.py --all    against all vectors: how many catch it

A wrong reader is one without a rule (``rules/``), or one that makes another small mistake (``wrong_readers/``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import mutation
import suite
from rules import RULES
from wrong_readers import WRONG, Wrong

__all__ = ["WRONG", "Wrong", "main"]


def readers() -> Iterator[Wrong]:
    """Give every wrong reader, and first those that leave out a rule."""
    seen = set()
    for rule in RULES:
        if rule.without and rule.without not in seen:
            seen.add(rule.without)
            yield Wrong(f"{rule.section} without: {rule.words}", rule.vectors[0], rule.without)
    yield from WRONG


def main() -> int:
    """Print what catches each wrong reader, and the share of those that a vector catches."""
    every = "--all" in sys.argv
    loaded = sorted((suite.load(path.stem) for path in suite.FOLDER.glob("*.vec")), key=lambda vector: vector.name)
    vectors = {vector.name: vector for vector in sorted(loaded, key=lambda vector: bool(vector.base))}
    survivors, count = [], 0
    for wrong in readers():
        count += 1
        names = [wrong.by, *(name for name in vectors if name != wrong.by)] if wrong.by else list(vectors)
        found = 0
        for name in names:
            try:
                difference = mutation.caught(vectors[name], wrong.mutation)
            except (mutation.NotFoundError, SyntaxError) as error:
                print(f"NO SUCH READER: {wrong.what}: {error}")
                break
            if difference is not None:
                if not found:
                    first = name
                found += 1
                if not every:
                    break
        if found:
            print(f"caught by {f'{found} vectors, such as ' if every else ''}{first}: {wrong.what}")
        else:
            survivors.append(wrong.what)
            print(f"NOT CAUGHT: {wrong.what}")
    print(f"{count - len(survivors)} of {count} wrong readers are caught ({1 - len(survivors) / count:.1%})")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
