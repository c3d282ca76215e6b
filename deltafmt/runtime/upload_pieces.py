"""The pieces of an upload: the parts of a file that a thread reads, checks and copies at a time (spec, section 5).

All offsets are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deltafmt.format import constants as c
from deltafmt.index.sections import Section
from deltafmt.runtime.upload_plan import SectionRun, UploadPlan


class Copy(NamedTuple):
    """A copy of ``length`` bytes from offset ``source`` in a piece to offset ``target`` on the device.

    With ``scratch``, the target is in the device's scratch memory.
    """

    source: int
    target: int
    length: int
    scratch: bool


class Share(NamedTuple):
    """The share of one section in a piece: part ``part`` of ``parts``, at offset ``start`` in the piece."""

    section: int
    start: int
    length: int
    part: int = 0
    parts: int = 1
    padding: int = 0


class Piece(NamedTuple):
    """A part of a file that one thread reads, checks and copies at a time.

    Attributes:
        offset: the piece's place in the file; for a compressed section, its place in the section's raw bytes.
        length: the number of bytes.
        shares: the sections that the piece holds, or the part of one section.
        copies: the copies to the device.
        compressed: True if the piece is a part of a compressed section.
    """

    offset: int
    length: int
    shares: tuple[Share, ...]
    copies: tuple[Copy, ...]
    compressed: bool = False


def cut(sections: Sequence[Section], plan: UploadPlan, size: int) -> list[Piece]:
    """Cut the sections of a plan into pieces of at most ``size`` bytes, a multiple of 256 KiB.

    Small stored sections that follow each other share a piece; a large section is cut into even parts.
    """
    pieces: list[Piece] = []
    group: list[int] = []
    for number in plan.sections:
        section = sections[number]
        whole = c.align(section.length, c.SECTION_ALIGNMENT)
        if group and (section.codec != c.CODEC_STORED or _span(sections, [*group, number]) > size):
            pieces.append(_group_piece(sections, plan, group))
            group = []
        if section.codec == c.CODEC_ZSTD:
            pieces += _compressed_pieces(number, section, plan, size)
        elif whole > size:
            pieces += _large_pieces(number, section, plan, size)
        elif group and number != group[-1] + 1:
            pieces.append(_group_piece(sections, plan, group))
            group = [number]
        else:
            group.append(number)
    if group:
        pieces.append(_group_piece(sections, plan, group))
    return pieces


def _span(sections: Sequence[Section], group: list[int]) -> int:
    last = sections[group[-1]]
    return c.align(last.offset + last.length, c.SECTION_ALIGNMENT) - sections[group[0]].offset


def _group_piece(sections: Sequence[Section], plan: UploadPlan, group: list[int]) -> Piece:
    first = sections[group[0]].offset
    shares, copies = [], []
    for number in group:
        section = sections[number]
        start = section.offset - first
        shares.append(Share(number, start, section.length, padding=-section.length % c.SECTION_ALIGNMENT))
        copies += [
            Copy(start + run.start, run.target, run.stop - run.start, run.scratch)
            for run in plan.runs(number)
            if run.stop > run.start
        ]
    return Piece(first, _span(sections, group), tuple(shares), _joined(copies))


def _joined(copies: list[Copy]) -> tuple[Copy, ...]:
    """Join copies whose distance is the same in the piece and on the device, with the padding between them."""
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


def _large_pieces(number: int, section: Section, plan: UploadPlan, size: int) -> list[Piece]:
    padding = -section.length % c.SECTION_ALIGNMENT
    parts = -(-(section.length + padding) // size)
    step = c.align(-(-section.length // parts), c.SECTION_ALIGNMENT)
    starts = range(0, section.length, step)
    pieces = []
    for part, start in enumerate(starts):
        stop = min(start + step, section.length)
        behind = padding if stop == section.length else 0
        share = Share(number, 0, stop - start, part, len(starts), behind)
        copies = _overlap(plan.runs(number), start, stop)
        pieces.append(Piece(section.offset + start, stop - start + behind, (share,), copies))
    return pieces


def _compressed_pieces(number: int, section: Section, plan: UploadPlan, size: int) -> list[Piece]:
    step = size // c.ZSTD_CHUNK * c.ZSTD_CHUNK
    starts = range(0, max(section.raw_length, 1), step)
    pieces = []
    for part, start in enumerate(starts):
        stop = min(start + step, section.raw_length)
        share = Share(number, 0, stop - start, part, len(starts))
        pieces.append(Piece(start, stop - start, (share,), _overlap(plan.runs(number), start, stop), compressed=True))
    return pieces


def _overlap(runs: list[SectionRun], start: int, stop: int) -> tuple[Copy, ...]:
    """Return the copies for those parts of a section's runs that lie in its raw bytes ``start`` to ``stop``."""
    copies = []
    for run in runs:
        first, last = max(run.start, start), min(run.stop, stop)
        if first < last:
            copies.append(Copy(first - start, run.target + first - run.start, last - first, run.scratch))
    return tuple(copies)
