"""Where the sections of a file go in one device allocation (spec, section 5).

Planned from the index alone, before a byte is read. All offsets are in bytes.

If a whole ``hot`` file is loaded, consecutive sections keep their distances from each other, so that a piece that
holds several of them is one copy. If some tensors are selected, only their buffers go to the device (the buffers of
tensors that follow each other are one run), though the sections that hold them are read and checked as a whole.
A buffer that kernels read in another form than the file's (a ``rank`` index) goes to scratch memory, and has a place on
the device for its plain form.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry, Term
from deltafmt.index.sections import BufferRef, Section
from deltafmt.kernels.kind import Conversion
from deltafmt.kernels.operand import buffer_forms
from deltafmt.terms.layout import TermLayout


@dataclass(frozen=True, slots=True)
class SectionRun:
    """Raw bytes ``start`` to ``stop`` of a section, which go to ``target``, or into the scratch memory."""

    start: int
    stop: int
    target: int
    scratch: bool = False


_Key = tuple[BufferRef, str, TermLayout, int, int]


@dataclass(slots=True)
class UploadPlan:
    """Where everything goes.

    Attributes:
        nbytes: bytes of the device allocation.
        scratch_bytes: bytes of the scratch memory.
        conversions: the buffers to be brought into their plain form, by their place in the file, name and layout.
    """

    nbytes: int = 0
    scratch_bytes: int = 0
    conversions: dict[_Key, Conversion] = field(default_factory=dict)
    _runs: dict[int, list[SectionRun]] = field(default_factory=dict)
    _scratch: dict[int, list[SectionRun]] = field(default_factory=dict)

    @property
    def sections(self) -> list[int]:
        """Numbers of the sections to read, ascending."""
        return sorted(self._runs.keys() | self._scratch.keys())

    def runs(self, section: int) -> list[SectionRun]:
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

    def plain_offset(self, entry: TensorEntry, term: Term, name: str) -> int:
        """Return where the plain form of a term's buffer lies on the device."""
        if name in term.layout.converted_buffers:
            return self.conversions[_key(entry, term, name)].target
        return self.offset(term.buffers[name])

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
            self._runs[number] = [SectionRun(0, section.raw_length, start)]
            before = section

    def add_buffers(self, entries: Iterable[TensorEntry]) -> None:
        """Place the buffers of some tensors; the plain forms of converted buffers come last."""
        refs: dict[int, list[BufferRef]] = {}
        scratch_refs: dict[int, list[BufferRef]] = {}
        converted: list[tuple[TensorEntry, Term, str]] = []
        for entry in entries:
            for term in entry.terms:
                names = term.layout.converted_buffers
                for name, ref in term.buffers.items():
                    (scratch_refs if name in names else refs).setdefault(ref.section, []).append(ref)
                converted += [(entry, term, name) for name in names]
            if entry.data is not None:
                refs.setdefault(entry.data.section, []).append(entry.data)
        for section in sorted(refs):
            self._runs[section] = [
                SectionRun(start, stop, self._take(stop - start)) for start, stop in _join(refs[section])
            ]
        for section in sorted(scratch_refs):
            self._scratch[section] = [
                SectionRun(start, stop, self._take_scratch(stop - start), scratch=True)
                for start, stop in _join(scratch_refs[section])
            ]
        for entry, term, name in converted:
            key = _key(entry, term, name)
            if key not in self.conversions:
                rows, columns = entry.delta_rows, entry.columns
                length = buffer_forms(term.layout.plain(), rows, columns, term.slots)[name].nbytes
                source, target = _find(self._scratch, term.buffers[name]), self._take(length)
                self.conversions[key] = Conversion(entry.name, name, term.layout, rows, columns, source, target)

    def _take(self, length: int) -> int:
        start = c.align(self.nbytes, c.BUFFER_ALIGNMENT)
        self.nbytes = start + length
        return start

    def _take_scratch(self, length: int) -> int:
        start = c.align(self.scratch_bytes, c.BUFFER_ALIGNMENT)
        self.scratch_bytes = start + length
        return start


def _key(entry: TensorEntry, term: Term, name: str) -> _Key:
    return term.buffers[name], name, term.layout, entry.delta_rows, entry.columns


def _find(runs: dict[int, list[SectionRun]], ref: BufferRef) -> int:
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
