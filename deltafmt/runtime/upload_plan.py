"""What an upload moves, and where to: pieces of the file, and their places in one device allocation (spec, section 5).

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

from deltafmt.layout import constants as c
from deltafmt.layout.entries import NMTerm, TensorEntry
from deltafmt.layout.nm import NMLayout
from deltafmt.layout.sections import BufferRef, Section


@dataclass(frozen=True, slots=True)
class Run:
    """Raw bytes ``start`` to ``stop`` of a section, which go to ``target``, or into the scratch memory."""

    start: int
    stop: int
    target: int
    scratch: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """``length`` bytes from ``source`` in a piece to ``target`` on the device, or in its scratch memory."""

    source: int
    target: int
    length: int
    scratch: bool


@dataclass(frozen=True, slots=True)
class Share:
    """What a piece holds of one section: part ``part`` of ``parts``, at ``start`` in the piece."""

    section: int
    start: int
    length: int
    part: int = 0
    parts: int = 1
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one thread reads, checks and copies at a time.

    Attributes:
        offset: in the file; for a compressed section, in its raw bytes.
        length: bytes.
        shares: the sections that it holds, or the part of one.
        copies: what goes to the device.
        compressed: whether the section is to be decoded.
    """

    offset: int
    length: int
    shares: tuple[Share, ...]
    copies: tuple[Copy, ...]
    compressed: bool = False


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
    ranks: dict[tuple[BufferRef, NMLayout, int, int], RankIndex] = field(default_factory=dict)
    _runs: dict[int, list[Run]] = field(default_factory=dict)
    _scratch: dict[int, list[Run]] = field(default_factory=dict)

    @property
    def sections(self) -> list[int]:
        """Numbers of the sections to read, ascending."""
        return sorted(self._runs.keys() | self._scratch.keys())

    def runs(self, section: int) -> list[Run]:
        """Return the runs of a section."""
        return [*self._runs.get(section, ()), *self._scratch.get(section, ())]

    def offset(self, ref: BufferRef) -> int:
        """Return where a buffer lies on the device."""
        return _find(self._runs, ref)

    def fixed_offset(self, entry: TensorEntry, term: NMTerm) -> int:
        """Return where the ``fixed`` form of a term's ``rank`` index lies on the device."""
        return self.ranks[_rank_key(entry, term)].target

    def add_whole(self, sections: Sequence[Section]) -> None:
        """Place all sections of tensors, each as a whole."""
        before: Section | None = None
        for number, section in enumerate(sections):
            if section.kind != c.KIND_TENSORS:
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
        ranked: list[tuple[TensorEntry, NMTerm]] = []
        for entry in entries:
            for term in entry.terms:
                for name, ref in term.buffers.items():
                    is_rank = name == "index" and term.params.index == "rank"
                    (rank_refs if is_rank else refs).setdefault(ref.section, []).append(ref)
                    if is_rank:
                        ranked.append((entry, term))
            if entry.data is not None:
                refs.setdefault(entry.data.section, []).append(entry.data)
        for section in sorted(refs):
            self._runs[section] = [Run(start, stop, self._take(stop - start)) for start, stop in _join(refs[section])]
        for section in sorted(rank_refs):
            self._scratch[section] = [
                Run(start, stop, self._take_scratch(stop - start), scratch=True)
                for start, stop in _join(rank_refs[section])
            ]
        for entry, term in ranked:
            if _rank_key(entry, term) in self.ranks:
                continue
            fixed = term.params.with_index("fixed")
            length = fixed.buffer_lengths(entry.delta_rows, entry.columns)["index"]
            mask_rows = fixed.mask_rows(entry.delta_rows)
            source = _find(self._scratch, term.buffers["index"])
            self.ranks[_rank_key(entry, term)] = RankIndex(
                entry.name, term.params, mask_rows, entry.columns, source, self._take(length)
            )

    def _take(self, length: int) -> int:
        start = c.align(self.nbytes, c.BUFFER_ALIGNMENT)
        self.nbytes = start + length
        return start

    def _take_scratch(self, length: int) -> int:
        start = c.align(self.scratch_bytes, c.BUFFER_ALIGNMENT)
        self.scratch_bytes = start + length
        return start


def _rank_key(entry: TensorEntry, term: NMTerm) -> tuple[BufferRef, NMLayout, int, int]:
    return term.buffers["index"], term.params, entry.delta_rows, entry.columns


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


def cut(sections: Sequence[Section], placement: Placement, size: int) -> list[Piece]:
    """Cut the sections of a placement into pieces of at most ``size`` bytes, a multiple of 256 KiB.

    Small stored sections that follow each other share a piece; a large section is cut into even parts.
    """
    pieces: list[Piece] = []
    group: list[int] = []
    for number in placement.sections:
        section = sections[number]
        whole = c.align(section.length, c.SECTION_ALIGNMENT)
        if group and (section.codec != c.CODEC_STORED or _span(sections, [*group, number]) > size):
            pieces.append(_group_piece(sections, placement, group))
            group = []
        if section.codec == c.CODEC_ZSTD:
            pieces += _compressed_pieces(number, section, placement, size)
        elif whole > size:
            pieces += _large_pieces(number, section, placement, size)
        elif group and number != group[-1] + 1:
            pieces.append(_group_piece(sections, placement, group))
            group = [number]
        else:
            group.append(number)
    if group:
        pieces.append(_group_piece(sections, placement, group))
    return pieces


def _span(sections: Sequence[Section], group: list[int]) -> int:
    last = sections[group[-1]]
    return c.align(last.offset + last.length, c.SECTION_ALIGNMENT) - sections[group[0]].offset


def _group_piece(sections: Sequence[Section], placement: Placement, group: list[int]) -> Piece:
    first = sections[group[0]].offset
    shares, copies = [], []
    for number in group:
        section = sections[number]
        start = section.offset - first
        shares.append(Share(number, start, section.length, padding=-section.length % c.SECTION_ALIGNMENT))
        copies += [
            Copy(start + run.start, run.target, run.stop - run.start, run.scratch)
            for run in placement.runs(number)
            if run.stop > run.start
        ]
    return Piece(first, _span(sections, group), tuple(shares), _joined(copies))


def _joined(copies: list[Copy]) -> tuple[Copy, ...]:
    """Join copies that keep their distance, across the padding between them."""
    out: list[Copy] = []
    for copy in copies:
        last = out[-1] if out else None
        if (
            last is not None
            and last.scratch == copy.scratch
            and copy.source - last.source == copy.target - last.target
            and 0 <= copy.source - last.source - last.length < c.SECTION_ALIGNMENT
        ):
            out[-1] = Copy(last.source, last.target, copy.source + copy.length - last.source, last.scratch)
        else:
            out.append(copy)
    return tuple(out)


def _large_pieces(number: int, section: Section, placement: Placement, size: int) -> list[Piece]:
    padding = -section.length % c.SECTION_ALIGNMENT
    parts = -(-(section.length + padding) // size)
    step = c.align(-(-section.length // parts), c.SECTION_ALIGNMENT)
    starts = range(0, section.length, step)
    pieces = []
    for part, start in enumerate(starts):
        stop = min(start + step, section.length)
        behind = padding if stop == section.length else 0
        share = Share(number, 0, stop - start, part, len(starts), behind)
        copies = _overlap(placement.runs(number), start, stop)
        pieces.append(Piece(section.offset + start, stop - start + behind, (share,), copies))
    return pieces


def _compressed_pieces(number: int, section: Section, placement: Placement, size: int) -> list[Piece]:
    step = size // c.ZSTD_CHUNK * c.ZSTD_CHUNK
    starts = range(0, max(section.raw_length, 1), step)
    pieces = []
    for part, start in enumerate(starts):
        stop = min(start + step, section.raw_length)
        share = Share(number, 0, stop - start, part, len(starts))
        pieces.append(
            Piece(start, stop - start, (share,), _overlap(placement.runs(number), start, stop), compressed=True)
        )
    return pieces


def _overlap(runs: list[Run], start: int, stop: int) -> tuple[Copy, ...]:
    """Return what raw bytes ``start`` to ``stop`` of a section hold of its runs."""
    copies = []
    for run in runs:
        first, last = max(run.start, start), min(run.stop, stop)
        if first < last:
            copies.append(Copy(first - start, run.target + first - run.start, last - first, run.scratch))
    return tuple(copies)
