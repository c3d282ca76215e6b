"""Where the sections of a file go in one device allocation (spec, section 5).

Planned from the index alone, before a byte is read. All offsets are in bytes.

Where a whole ``hot`` file is loaded, consecutive sections keep their distances from each other, so that a piece that
holds several of them is one copy. Of a selection, only the buffers go to the device (those of a tensor, and of
tensors that follow each other, in one run), though the sections that they lie in are read and checked as a whole.
A ``rank`` index goes to scratch memory, and has a place for its ``fixed`` form.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry, Term
from deltafmt.index.sections import BufferRef, Section
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.layout import NMLayout


@dataclass(frozen=True, slots=True)
class Run:
    """Raw bytes ``start`` to ``stop`` of a section, which go to ``target``, or into the scratch memory."""

    start: int
    stop: int
    target: int
    scratch: bool = False


@dataclass(frozen=True, slots=True)
class RankIndex:
    """A ``rank`` index to be made ``fixed``: its place in the scratch memory, and the other's on the device."""

    name: str
    layout: NMLayout
    mask_rows: int
    columns: int
    source: int
    target: int


@dataclass(slots=True)
class Placement:
    """Where everything goes.

    Attributes:
        nbytes: of the device allocation.
        scratch_bytes: of the scratch memory.
        ranks: the indexes to be made ``fixed``, by the place of their buffer and their layout.
    """

    nbytes: int = 0
    scratch_bytes: int = 0
    ranks: dict[tuple[BufferRef, TermLayout, int, int], RankIndex] = field(default_factory=dict)
    _runs: dict[int, list[Run]] = field(default_factory=dict)
    _scratch: dict[int, list[Run]] = field(default_factory=dict)

    @property
    def sections(self) -> list[int]:
        """Numbers of the sections to read, ascending."""
        return sorted(self._runs.keys() | self._scratch.keys())

    def runs(self, section: int) -> list[Run]:
        """Return the runs of a section."""
        return [*self._runs.get(section, ()), *self._scratch.get(section, ())]

    def whole(self, number: int, section: Section) -> int | None:
        """Return where a stored section lies on the device as a whole, or None if it does not."""
        runs = self.runs(number)
        if section.codec != c.CODEC_STORED or len(runs) != 1 or runs[0].scratch:
            return None
        return runs[0].target if (runs[0].start, runs[0].stop) == (0, section.length) else None

    def offset(self, ref: BufferRef) -> int:
        """Return where a buffer lies on the device."""
        return _find(self._runs, ref)

    def fixed_offset(self, entry: TensorEntry, term: Term) -> int:
        """Return where the ``fixed`` form of a term's ``rank`` index lies on the device."""
        return self.ranks[_rank_key(entry, term)].target

    def add_whole(self, sections: Sequence[Section]) -> None:
        """Place all sections of tensors, each as a whole."""
        before: Section | None = None
        for number, section in enumerate(sections):
            if section.kind != c.SECTION_KIND_TENSORS:
                continue
            gap = 0
            if before is not None and c.CODEC_ZSTD not in (before.codec, section.codec):
                gap = section.offset - before.offset - before.length
            if gap < c.SECTION_ALIGNMENT:
                self.nbytes += gap
            start = self._take(section.raw_length)
            self._runs[number] = [Run(0, section.raw_length, start)]
            before = section

    def add_buffers(self, entries: Iterable[TensorEntry]) -> None:
        """Place the buffers of some tensors; the ``fixed`` forms of ``rank`` indexes come last."""
        refs: dict[int, list[BufferRef]] = {}
        rank_refs: dict[int, list[BufferRef]] = {}
        ranked: list[tuple[TensorEntry, Term, NMLayout]] = []
        for entry in entries:
            for term in entry.terms:
                params = rank_layout(term)
                for name, ref in term.buffers.items():
                    is_rank = name == "index" and params is not None
                    (rank_refs if is_rank else refs).setdefault(ref.section, []).append(ref)
                if params is not None:
                    ranked.append((entry, term, params))
            if entry.data is not None:
                refs.setdefault(entry.data.section, []).append(entry.data)
        for section in sorted(refs):
            self._runs[section] = [Run(start, stop, self._take(stop - start)) for start, stop in _join(refs[section])]
        for section in sorted(rank_refs):
            self._scratch[section] = [
                Run(start, stop, self._take_scratch(stop - start), scratch=True)
                for start, stop in _join(rank_refs[section])
            ]
        for entry, term, params in ranked:
            if _rank_key(entry, term) in self.ranks:
                continue
            fixed = params.plain()
            length = fixed.buffer_lengths(entry.delta_rows, entry.columns)["index"]
            mask_rows = fixed.mask_rows(entry.delta_rows)
            source = _find(self._scratch, term.buffers["index"])
            self.ranks[_rank_key(entry, term)] = RankIndex(
                entry.name, params, mask_rows, entry.columns, source, self._take(length)
            )

    def _take(self, length: int) -> int:
        start = c.align(self.nbytes, c.BUFFER_ALIGNMENT)
        self.nbytes = start + length
        return start

    def _take_scratch(self, length: int) -> int:
        start = c.align(self.scratch_bytes, c.BUFFER_ALIGNMENT)
        self.scratch_bytes = start + length
        return start


def rank_layout(term: Term) -> NMLayout | None:
    """Return a term's layout if its index is to be made ``fixed`` on the device."""
    return term.layout if isinstance(term.layout, NMLayout) and term.layout.index == "rank" else None


def _rank_key(entry: TensorEntry, term: Term) -> tuple[BufferRef, TermLayout, int, int]:
    return term.buffers["index"], term.layout, entry.delta_rows, entry.columns


def _find(runs: dict[int, list[Run]], ref: BufferRef) -> int:
    if ref.length == 0:
        return 0
    found = runs[ref.section]
    run = found[bisect_right(found, ref.offset, key=lambda run: run.start) - 1]
    return run.target + ref.offset - run.start


def _join(refs: list[BufferRef]) -> list[tuple[int, int]]:
    """Return the ranges of a section that buffers take, those with nothing but padding between them in one."""
    ranges: list[tuple[int, int]] = []
    for ref in sorted(refs, key=lambda ref: ref.offset):
        stop = ref.offset + ref.length
        if ranges and ref.offset <= c.align(ranges[-1][1], c.BUFFER_ALIGNMENT):
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], stop))
        else:
            ranges.append((ref.offset, stop))
    return ranges
