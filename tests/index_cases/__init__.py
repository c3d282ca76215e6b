"""What the tests know of each index encoding of ``nm``: a file an encoding, which says so by a ``CASES`` of its own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.terms.nm.layout import NMLayout


def ascending(rng: np.random.Generator, mask_rows: int, groups: int, keep: int, group: int) -> NDArray[np.uint8]:
    """Draw N of M positions for every group, in order."""
    shuffled = np.argsort(rng.random((mask_rows, groups, group)), axis=2)
    return np.sort(shuffled[:, :, :keep], axis=2).astype(np.uint8)


def any_positions(
    rng: np.random.Generator, layout: NMLayout, seed: int, mask_rows: int, groups: int
) -> NDArray[np.uint8]:
    """Draw positions for an encoding that holds any."""
    return ascending(rng, mask_rows, groups, layout.n, layout.m)


def any_m(max_m: int) -> st.SearchStrategy[int]:
    """Give any M, often a small one."""
    return st.one_of(st.integers(2, min(max_m, 20)), st.integers(2, max_m))


@dataclass(frozen=True)
class IndexCases:
    """The cases of one index encoding.

    Attributes:
        fields: gives for a layout and a number of columns how many fields the words of a mask row hold, and the bits
            of a field; (0, 0) if nothing is stored.
        m: gives the Ms of the encoding up to a largest one.
        n: gives for an M the Ns that the encoding can hold with it.
        positions: draws for (rng, layout, seed, mask rows, groups) positions that the encoding can hold.
        samples: layouts that kernels are run with, beside those that ``nm_products.py`` lists.
        compiled: layouts that are compiled for a GPU, by the name of the case.
        limits: for each of these, the most registers of a thread, and the most instructions of the inner loop for each
            nonzero, or None where the gather kernel is not taken.
    """

    fields: Callable[[NMLayout, int], tuple[int, int]]
    m: Callable[[int], st.SearchStrategy[int]] = any_m
    n: Callable[[int], Sequence[int]] = lambda m: range(1, m + 1)
    positions: Callable[[np.random.Generator, NMLayout, int, int, int], NDArray[np.uint8]] = any_positions
    samples: Sequence[NMLayout] = ()
    compiled: Mapping[str, NMLayout] = field(default_factory=dict)
    limits: Mapping[str, tuple[int, float | None]] = field(default_factory=dict)


INDEX_CASES: dict[str, IndexCases] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").CASES for module in pkgutil.iter_modules(__path__)
}
