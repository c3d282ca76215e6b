"""What the tests know of each kind of term: a file a kind, which says so by a ``CASES`` of its own.

A new kind adds a file here, and is then packed, decoded, multiplied, uploaded and compiled like the others.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from deltafmt.terms.codec import TermArrays
from deltafmt.terms.layout import TermLayout


@dataclass(frozen=True)
class KindCases:
    """The cases of one kind.

    Attributes:
        layouts: gives any valid layout.
        samples: layouts that kernels are run with: all widths, grids, dtypes and forms. The first and the last, which
            differ most, stand for the kind where there is no time for all.
        arrays: draws canonical content for (rng, layout, rows, columns, seed), with scales of about one.
        naive: gives the dense delta of an operand, slowly.
        magnitude: gives for an operand the magnitude of what is summed for each element, with which rounding errors
            scale.
        compiled: layouts and slots that are compiled for a GPU, by the name of the case.
        limits: for each of these, the most registers of a thread, and the most instructions of the inner loop for each
            nonzero, or None.
        launches: the names of the launches of one product, where it is more than one.
    """

    layouts: st.SearchStrategy[Any]
    samples: list[Any]
    arrays: Callable[[np.random.Generator, Any, int, int, int], TermArrays]
    naive: Callable[[Any], Any]
    magnitude: Callable[[Any], Any]
    compiled: Mapping[str, tuple[TermLayout, int]] = field(default_factory=dict)
    limits: Mapping[str, tuple[int, float | None]] = field(default_factory=dict)
    launches: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind's name."""
        return str(self.samples[0].kind)


CASES: dict[str, KindCases] = {}
for _module in pkgutil.iter_modules(__path__):
    _found = importlib.import_module(f"{__name__}.{_module.name}").CASES
    CASES[_found.kind] = _found
ANY_LAYOUT: st.SearchStrategy[Any] = st.one_of(*(_cases.layouts for _cases in CASES.values()))
