"""Which bytes of a delta have rules beside their checksums (spec, section 15): worked out once for all of one layout.

Layers are alike. The scales of ``layers.0.mlp.up_proj.weight``, ``layers.1.mlp.up_proj.weight`` and so on have
one length, and mostly lie at equal distances, so one view of the allocation holds them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from deltafmt.format.constants import DELTA_DTYPES, element_count
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import BufferForm

SCALE = "a scale is negative or not finite"
VALUE = "a value is not finite"


class Run(NamedTuple):
    """Buffers of scales, or of values, of one length and at equal distances.

    Attributes:
        problem: what is said if a number breaks the rule.
        dtype: of the numbers, as files name it.
        names: the tensors, in the order of their buffers.
        first: where the first buffer begins, in bytes.
        step: from the beginning of one buffer to that of the next, in bytes.
        length: the elements of each buffer.
    """

    problem: str
    dtype: str
    names: tuple[str, ...]
    first: int
    step: int
    length: int

    def cut(self, elements: int) -> Iterator[Run]:
        """Give the same run in parts of at most so many elements, or of one buffer."""
        count = max(elements // self.length, 1)
        for at in range(0, len(self.names), count):
            yield self._replace(names=self.names[at : at + count], first=self.first + at * self.step)


class PlacedTerm(NamedTuple):
    """One term of a layout: its tensor, its number there, and its buffers' forms and offsets in the allocation."""

    name: str
    number: int
    layout: TermLayout
    forms: Mapping[str, BufferForm]
    offsets: Mapping[str, int]


class LayoutChecks:
    """What is looked at of every delta of a layout.

    Args:
        terms: of the layout.

    Attributes:
        runs: the scales and the values.
        walked: the tensors and the numbers of the terms whose positions or slots are looked at, one by one.
    """

    def __init__(self, terms: Iterable[PlacedTerm]) -> None:
        alike: dict[tuple[str, ...], list[tuple[int, str, BufferForm]]] = {}
        self.walked: list[tuple[str, int]] = []
        for term in terms:
            if has_positions(term.layout) or isinstance(term.layout, SparseLayout):
                self.walked.append((term.name, term.number))
            for buffer, problem in rules(term.forms):
                form = term.forms[buffer]
                kind = re.sub("[0-9]+", "*", term.name), str(term.number), buffer, form.dtype, str(form.nbytes), problem
                alike.setdefault(kind, []).append((term.offsets[buffer], term.name, form))
        self.runs = [
            _run(problem, part)
            for (*_, problem), found in alike.items()
            for part in _progressions(sorted(found, key=lambda one: one[0]))
        ]


def rules(forms: Mapping[str, BufferForm]) -> Iterator[tuple[str, str]]:
    """Give the buffers of scales and of values, with what is said if they break their rule; others have none."""
    for buffer, form in forms.items():
        if form.dtype in DELTA_DTYPES and form.nbytes:
            yield buffer, SCALE if buffer.endswith("scales") else VALUE


def has_positions(layout: TermLayout) -> bool:
    """Tell whether a term stores positions that can be wrong; seeded ones cannot, nor those that take all numbers."""
    return isinstance(layout, NMLayout) and not (
        layout.seeded or (layout.n == 1 and layout.m == 1 << layout.position_bits)
    )


def _progressions(
    found: list[tuple[int, str, BufferForm]],
) -> Iterator[list[tuple[int, str, BufferForm]]]:
    """Cut ascending buffers into runs of equal distances."""
    run: list[tuple[int, str, BufferForm]] = []
    for one in found:
        if len(run) > 1 and one[0] - run[-1][0] != run[1][0] - run[0][0]:
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _run(problem: str, found: list[tuple[int, str, BufferForm]]) -> Run:
    first, _, form = found[0]
    step = found[1][0] - first if len(found) > 1 else 0
    return Run(problem, form.dtype, tuple(name for _, name, _ in found), first, step, element_count(form.shape))
