"""The names that a caller gives for the rows of a batch: one for all rows or one for each, each with its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltafmt.errors import UsageError

Name = str | None | Mapping[str, float]
Names = Name | Sequence[Name]

BASE_NAME = "base"


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a batch uses: no delta, one delta, or a sum of several with weights.

    Attributes:
        terms: pairs of a delta's name and its weight.
    """

    terms: tuple[tuple[str, float], ...] = ()

    @property
    def alone(self) -> str | None:
        """The name of the delta, if there is one and its weight is 1."""
        return self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1 else None

    def __str__(self) -> str:
        if not self.terms:
            return "the base"
        return " + ".join(f'"{name}"' if weight == 1 else f'{weight:g} "{name}"' for name, weight in self.terms)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch.

    Attributes:
        rows: what each row uses; or one for all rows.
        each: True if the caller gave a name for each row.
    """

    rows: tuple[Row, ...]
    each: bool

    @property
    def names(self) -> list[str]:
        """The names of the deltas, each once."""
        return list(dict.fromkeys(name for row in self.rows for name, _ in row.terms))

    def __str__(self) -> str:
        shown = list(dict.fromkeys(map(str, self.rows)))
        return ", ".join(shown[:4]) + (f" and {len(shown) - 4} others" if len(shown) > 4 else "")


def read_names(names: Names) -> Rows:
    """Return the rows that a caller names.

    Args:
        names: None or "base" for the base, a name, or a mapping of names to weights; or a sequence of these, one for
            each row.

    Raises:
        UsageError: there are no names, or a weight is not a finite number.
    """
    if names is None or isinstance(names, str | Mapping):
        return Rows((_row(names),), each=False)
    if not isinstance(names, Sequence):
        raise UsageError(f"{names!r} is not a name of a delta, nor a list with a name for each row")
    rows = tuple(_row(name) for name in names)
    if not rows:
        raise UsageError("no names of deltas are given")
    return Rows(rows, each=True)


def _row(name: object) -> Row:
    if name is None or name == BASE_NAME:
        return Row()
    if isinstance(name, str):
        return Row(((name, 1.0),))
    if not isinstance(name, Mapping):
        raise UsageError(f"{name!r} is not a name of a delta; a row takes a name, None or names with weights")
    if not name:
        raise UsageError("a row is given no names; None is the base")
    terms = []
    for key, weight in name.items():
        if not isinstance(key, str) or key == BASE_NAME:
            raise UsageError(f"{key!r} is not the name of a delta, and has no weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f'the weight {weight!r} of delta "{key}" is not a finite number')
        if weight:
            terms.append((key, float(weight)))
    return Row(tuple(terms))
