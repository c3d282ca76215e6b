"""Where the tensors of a file lie in the one allocation of its load, worked out once for all files of one layout.

Fine-tunes that were packed alike have the same sections, the same tensors and the same buffers; only their bytes and
seeds differ. What follows from the index alone is therefore kept, by everything that it follows from, and a further
delta of a known layout has nothing but its addresses to be worked out.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.container.reader import Container
from deltafmt.index.entries import TensorEntry, Term
from deltafmt.kernels.operand import BUFFER_DTYPES, buffer_forms
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.keys import Key
from deltafmt.runtime.layout_checks import LayoutChecks, PlacedTerm
from deltafmt.runtime.upload_pieces import Piece, cut
from deltafmt.runtime.upload_plan import UploadPlan
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import BufferForm


class TermPlace(NamedTuple):
    """One term as kernels read it, and where each of its buffers begins in the allocation, in bytes."""

    layout: TermLayout
    rows: int
    columns: int
    slots: int
    forms: Mapping[str, BufferForm]
    offsets: Mapping[str, int]


class DataPlace(NamedTuple):
    """The dtype and shape of the values that an entry stores whole, and where they begin in the allocation."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorPlace(NamedTuple):
    """Where the terms and the data of one tensor lie."""

    terms: tuple[TermPlace, ...]
    data: DataPlace | None


class LayoutPlan:
    """Where everything lies that files of one layout have: the upload's plan, its pieces, and the tensors' places.

    Attributes:
        upload: the upload's plan.
        seeds: for each tensor that was placed ahead, where its first term's seed stands among those of a file.
    """

    def __init__(self, plan: UploadPlan) -> None:
        self.upload = plan
        self.seeds: dict[str, int] = {}
        self._pieces: dict[int, list[Piece]] = {}
        self._places: dict[str, TensorPlace] = {}
        self._plain: dict[TermLayout, TermLayout] = {}

    @functools.cached_property
    def checks(self) -> LayoutChecks:
        """What is looked at of the tensors that were placed ahead."""
        return LayoutChecks(
            PlacedTerm(name, number, term.layout, term.forms, term.offsets)
            for name in self.seeds
            for number, term in enumerate(self._places[name].terms)
        )

    def pieces(self, container: Container, size: int) -> list[Piece]:
        """Return the pieces of at most ``size`` bytes that the sections are read in."""
        found = self._pieces.get(size)
        if found is None:
            found = self._pieces[size] = cut(container.sections, self.upload, size)
        return found

    def place(self, entry: TensorEntry) -> TensorPlace:
        """Return where a tensor's terms and data lie."""
        found = self._places.get(entry.name)
        if found is None:
            terms = tuple(self._term(entry, term) for term in entry.terms)
            found = self._places[entry.name] = TensorPlace(terms, self._data(entry))
        return found

    def _term(self, entry: TensorEntry, term: Term) -> TermPlace:
        rows, columns = entry.delta_rows, entry.columns
        layout = self._plain.setdefault(term.layout, term.layout.plain())
        forms = buffer_forms(layout, rows, columns, term.slots)
        offsets = {name: self.upload.plain_offset(entry, term, name) for name in forms}
        for name, form in forms.items():
            self._check(entry.name, offsets[name], form.nbytes, BUFFER_DTYPES[form.dtype].itemsize)
        return TermPlace(layout, rows, columns, term.slots, forms, offsets)

    def _data(self, entry: TensorEntry) -> DataPlace | None:
        """Return the place of ``replace``, or of new rows, in the tensor's dtype if torch has it."""
        if entry.data is None:
            return None
        offset = self.upload.offset(entry.data)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            return DataPlace(torch.uint8, (entry.data.length,), offset)
        shape = entry.shape if entry.action == "replace" else (entry.rows - entry.delta_rows, entry.columns)
        self._check(entry.name, offset, entry.data.length, dtype.itemsize)
        return DataPlace(dtype, shape, offset)

    def _check(self, name: str, offset: int, nbytes: int, itemsize: int) -> None:
        """Check once what torch would check for every view: kernels get addresses, and would read anything."""
        if nbytes and (offset % itemsize or not 0 <= offset <= offset + nbytes <= self.upload.nbytes):
            raise AssertionError(f"{name}: {nbytes} bytes at {offset} of {self.upload.nbytes}")


class Placement:
    """The tensors of one file and where they go.

    Args:
        container: the file's index.
        names: of the tensors.
        layout: where everything lies.
        seeds: the seeds of all terms, int64, in the layout's order; None unless they were placed ahead.
    """

    def __init__(
        self,
        container: Container,
        names: Sequence[str],
        layout: LayoutPlan,
        seeds: NDArray[np.int64] | None = None,
    ) -> None:
        self.container = container
        self.names = dict.fromkeys(names)
        self.layout = layout
        self.seeds = seeds

    @classmethod
    def whole(cls, container: Container) -> Placement:
        """Place all tensors of a file. If no buffer must be converted, no entry of the index is decoded for that."""
        names = container.keys()
        if any(layout.cold_only for layout in container.layouts):
            return cls.some(container, names)
        plan = UploadPlan()
        plan.add_whole(container.sections)
        return cls(container, names, LayoutPlan(plan))

    @classmethod
    def some(cls, container: Container, names: Sequence[str]) -> Placement:
        """Place some tensors of a file."""
        plan = UploadPlan()
        plan.add_buffers(_targets(container, names).values())
        return cls(container, names, LayoutPlan(plan))

    @classmethod
    def ahead(cls, container: Container, names: Sequence[str]) -> Placement:
        """Place some tensors of a file that will be loaded later; files of the same layout share the work."""
        entries = _targets(container, names)
        key = Key(_layout_of(container, names, entries.values()))
        layout = _LAYOUTS.get(key)
        if layout is None:
            plan = UploadPlan()
            plan.add_buffers(entries.values())
            layout = _LAYOUTS[key] = LayoutPlan(plan)
        seeds: list[int] = []
        for entry in entries.values():
            layout.place(entry)
            layout.seeds[entry.name] = len(seeds)
            seeds += (term.seed for term in entry.terms)
        return cls(container, names, layout, np.array(seeds, np.int64))


# A layout plan is forgotten with the last delta that uses it, and its key with the plan.
_LAYOUTS: weakref.WeakValueDictionary[Key, LayoutPlan] = weakref.WeakValueDictionary()


def _targets(container: Container, names: Iterable[str]) -> dict[str, TensorEntry]:
    """Return the entries that hold bytes: an alias stands for its target."""
    entries: dict[str, TensorEntry] = {}
    for name in names:
        entry = container.entry(name)
        entries[entry.target or name] = container.entry(entry.target) if entry.target else entry
    return entries


def _layout_of(container: Container, names: Sequence[str], entries: Iterable[TensorEntry]) -> Any:
    """Return everything that the plan and the places of some tensors follow from; no seed and no digest is among it."""
    served = container.sections[: container.served]  # exact parts behind them are never loaded
    sections = tuple((one.kind, one.codec, one.offset, one.length, one.raw_length) for one in served)
    tensors = tuple(
        (
            entry.name,
            entry.action,
            entry.dtype,
            entry.shape,
            entry.leading,
            None if entry.base is None else entry.base.shape,
            entry.data,
            tuple((term.layout, term.slots, tuple(term.buffers.items())) for term in entry.terms),
        )
        for entry in entries
    )
    # Whose bytes an alias has.
    targets = tuple(container.entry(name).target for name in names)
    return sections, tuple(names), targets, tensors
