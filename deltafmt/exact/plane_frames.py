"""zstd frames for planes of bytes (RFC 8878, section 3.1.1): Huffman codes, and no matches but runs of zeros.

Planes have statistics worth coding, but hardly anything that repeats unless it is long. So bytes are counted instead of
searched. Each block has a Huffman tree, or that of a block before it. A block with many zeros has its longer runs of
zeros as matches of the byte before them: a run is a zero among the literals, and a match.

Any zstd decoder reads these frames. Compiled: ``kernels/cpu/loops/plane_frames.c``, which writes the same bytes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.exact.states import Field, States
from deltafmt.output import Bytes

Plane = NDArray[np.uint8]
Numbers = NDArray[np.int64]

_MAGIC: Final = 0xFD2FB528
_BLOCK: Final = 1 << 17
_RAW, _RLE, _COMPRESSED = 0, 1, 2  # kinds of blocks
_STORED, _TREE, _LAST_TREE = 0, 2, 3  # kinds of literals

# Bits of the longest code, bytes that are worth a tree, and weights that are written as they are: 4 bits each.
_MOST_BITS: Final = 11
_LEAST: Final = 64
_DIRECT: Final = 128
_WEIGHT_LOG: Final = 6

# Shorter runs of zeros are literals. Runs are looked for where one of so many bytes begins eight zeros.
_RUN: Final = 12
_RUNS_PAY: Final = 256

# The least lengths of literals and of matches, less 3, that codes stand for, and how many bits follow each code
# (RFC 8878, section 3.1.1.3.2.1.1).
_LITERAL_BITS: Final = np.array([0] * 16 + [1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
_MATCH_BITS: Final = np.array([0] * 32 + [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
_LEAST_MATCH: Final = 3

# Room for the tables of a block.
_ROOM: Final = 512


def frame_room(size: int, ends: Sequence[int] = ()) -> int:
    """Return how many bytes a compiled loop needs for a frame: it writes codes before it knows if they are shorter."""
    return size + size // 2 + 4 * (len(ends) + 1 + size // _BLOCK) + _ROOM


def _segments(ends: Sequence[int], size: int) -> list[int]:
    """Return where segments end, the last one at the end of the content."""
    return sorted({*(end for end in ends if 0 < end < size), size})


def _plane_frame(native: Native, plane: Plane, ends: Sequence[int] = (), room: Plane | None = None) -> Bytes:
    size = plane.size
    chosen = np.array(_segments(ends, size), np.uint64)
    out = np.empty(frame_room(size, ends), np.uint8) if room is None else room
    return out.data[: native.plane_frame(plane, chosen, out)]


@loop(_plane_frame)
def plane_frame(plane: Plane, ends: Sequence[int] = (), room: Plane | None = None) -> Bytes:  # noqa: ARG001
    """Return a frame.

    Args:
        plane: its content, at least a byte.
        ends: where the statistics of the content change; a block of the frame ends at each.
        room: :func:`frame_room` bytes, which may become the result.
    """
    size = plane.size
    cuts = [cut for first, end in itertools.pairwise([0, *_segments(ends, size)]) for cut in range(first, end, _BLOCK)]
    writer = _Writer()
    blocks = [writer.block(plane[first:end], end == size) for first, end in itertools.pairwise([*cuts, size])]
    # A content size of 4 bytes, and a single segment.
    head = _MAGIC.to_bytes(4, "little") + bytes([2 << 6 | 1 << 5]) + size.to_bytes(4, "little")
    return b"".join((head, *blocks))


class _Writer:
    """Write blocks; each may have the tree of one before."""

    def __init__(self) -> None:
        self._last: Numbers | None = None  # the lengths of the last tree's codes

    def block(self, data: Plane, is_last: bool) -> bytes:
        """Return one block."""
        size = data.size
        if not np.any(data != data[0]):
            return _head(is_last, _RLE, size) + bytes([data[0]])
        before = self._last
        zeros = np.count_nonzero(~data[: size - size % 8].reshape(-1, 8).any(axis=1))
        has_runs = zeros > size // _RUNS_PAY
        made = self._runs(data) if has_runs else self._literals(data)
        if made is not None and not has_runs:
            made += b"\0"  # no sequences
        if made is not None and len(made) < size:
            return _head(is_last, _COMPRESSED, len(made)) + made
        self._last = before if made is None else None
        return _head(is_last, _RAW, size) + data.tobytes()

    def _literals(self, data: Plane) -> bytes | None:
        """Return bytes as literals with a new tree or the last one; None if no tree pays."""
        size = data.size
        counts = np.bincount(data, minlength=256)
        if size < _LEAST:
            return None
        lengths = code_lengths(counts)
        tree = _tree(lengths)
        with_new = int((counts * lengths).sum()) + 8 * len(tree) if tree else None
        with_last = None
        if self._last is not None and not np.any((counts > 0) & (self._last == 0)):
            with_last = int((counts * self._last).sum())
        costs = [cost for cost in (with_new, with_last) if cost is not None]
        if not costs or min(costs) // 8 >= size - size // 64:
            return None
        is_new = with_last is None or (with_new is not None and with_new < with_last)
        if is_new:
            self._last = lengths
        assert self._last is not None
        codes = _codes(self._last)
        quarter = (size + 3) // 4
        streams = [
            packed(np.append(codes[part], 1), np.append(self._last[part], 1))
            for part in (data[start : start + quarter][::-1] for start in range(0, 4 * quarter, quarter))
        ]
        jumps = b"".join(len(stream).to_bytes(2, "little") for stream in streams[:3])
        made = b"".join(((tree or b"") if is_new else b"", jumps, *streams))
        head = (_TREE if is_new else _LAST_TREE) | 3 << 2 | size << 4 | len(made) << 22
        return head.to_bytes(5, "little") + made

    def _runs(self, data: Plane) -> bytes:
        """Return the literals and sequences of a block in which runs of zeros are matches."""
        places = np.append(np.flatnonzero(data), data.size)
        starts = np.append(0, places[:-1] + 1)
        is_run = places - starts >= _RUN
        starts, ends = starts[is_run], places[is_run]
        matched = np.zeros(data.size + 1, np.int64)
        matched[starts + 1] = 1
        matched[ends] -= 1
        literals = data[np.cumsum(matched)[:-1] == 0]
        lengths = starts + 1 - np.append(0, ends[:-1])
        made = self._literals(literals)
        if made is None:
            made = (_STORED | 3 << 2 | literals.size << 4).to_bytes(3, "little") + literals.tobytes()
        return made + _sequences(lengths, ends - starts - 1 - _LEAST_MATCH)


def _head(is_last: bool, kind: int, size: int) -> bytes:
    return (int(is_last) | kind << 1 | size << 3).to_bytes(3, "little")


def packed(values: Numbers, widths: Numbers) -> bytes:
    """Return numbers of so many bits each, one after the other, the lowest bits first."""
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]), np.uint8)
    for bit in range(int(widths.max())):
        has = widths > bit
        bits[(ends - widths)[has] + bit] = values[has] >> bit & 1
    return np.packbits(bits, bitorder="little").tobytes()


def code_lengths(counts: Numbers) -> Numbers:
    """Return the length of each byte's Huffman code, 0 for bytes that do not occur; at least two do.

    The codes of Huffman's algorithm are cut to 11 bits. The least frequent of the longest others then grow until all
    codes fit, and what room is left goes to the most frequent.
    """
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda byte: (counts[byte], byte))
    # Leaves come first among equals, then whatever came into being first.
    heap: list[tuple[int, int, tuple[int, ...]]] = [(int(counts[byte]), at, (at,)) for at, byte in enumerate(order)]
    depths = [0] * len(order)
    for number in range(len(order), 2 * len(order) - 1):
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for leaf in left + right:
            depths[leaf] += 1
        heapq.heappush(heap, (a + b, number, left + right))
    depths = [min(depth, _MOST_BITS) for depth in depths]
    room = (1 << _MOST_BITS) - sum(1 << _MOST_BITS - depth for depth in depths)
    while room < 0:
        chosen = max((leaf for leaf, depth in enumerate(depths) if depth < _MOST_BITS), key=lambda leaf: depths[leaf])
        depths[chosen] += 1
        room += 1 << _MOST_BITS - depths[chosen]
    for leaf in reversed(range(len(depths))):
        while room >= 1 << _MOST_BITS - depths[leaf]:
            room -= 1 << _MOST_BITS - depths[leaf]
            depths[leaf] -= 1
    lengths = np.zeros(256, np.int64)
    lengths[order] = depths
    return lengths


def _codes(lengths: Numbers) -> Numbers:
    """Return the code of each byte: the longest are the lowest, and those of one length ascend with their bytes."""
    codes, low = np.zeros(256, np.int64), 0
    for length in range(int(lengths.max()), 0, -1):
        members = np.flatnonzero(lengths == length)
        codes[members] = low + np.arange(members.size)
        low = (low + members.size) >> 1
    return codes


def _tree(lengths: Numbers) -> bytes | None:
    """Return the description of a tree (RFC 8878, section 4.2.1); None if it cannot be described."""
    weights = np.where(lengths > 0, lengths.max() + 1 - lengths, 0)
    # The weight of the last byte follows from the others.
    given = weights[: int(np.flatnonzero(lengths)[-1])]
    if given.size <= _DIRECT:
        pairs = np.append(given, np.zeros(given.size % 2, np.int64)).reshape(-1, 2)
        return b"".join((bytes([127 + given.size]), (pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8).tobytes()))
    if not np.any(given != given[0]):
        return None
    code = States(np.bincount(given).tolist(), _WEIGHT_LOG)
    # Two states take turns, and the first one's bits are read first.
    states: list[int | None] = [None, None]
    fields = []
    for number in reversed(range(given.size)):
        states[number % 2], field = code.after(states[number % 2], int(given[number]))
        fields.append(field)
    made = _fields(code.description()) + _fields([*fields, code.end(states[1]), code.end(states[0]), (1, 1)])
    return bytes([len(made)]) + made if len(made) < _DIRECT else None


def _fields(fields: Sequence[Field]) -> bytes:
    """Return fields one after the other."""
    values, widths = zip(*fields, strict=True)
    return packed(np.array(values), np.array(widths))


def _sequences(literals: Numbers, matches: Numbers) -> bytes:
    """Return sequences (RFC 8878, section 3.1.1.3.2): lengths of literals, and of the matches behind them, less 3."""
    count = literals.size
    made = [bytes([count]) if count < 128 else bytes([128 + (count >> 8), count & 255])]
    if not count:
        return made[0]
    kinds = [_length_codes(literals, _LITERAL_BITS), _length_codes(matches, _MATCH_BITS)]
    log = 6 if count < 256 else 8
    tables = [None if np.all(codes == codes[0]) else States(np.bincount(codes).tolist(), log) for codes in kinds]
    # Modes of literals, offsets and matches: one code alone, or a table. The offset is always the one before, a byte.
    literal_mode, match_mode = (1 if table is None else 2 for table in tables)
    made.append(bytes([literal_mode << 6 | 1 << 4 | match_mode << 2]))
    for number, (table, codes) in enumerate(zip(tables, kinds, strict=True)):
        made.append(bytes([int(codes[0])]) if table is None else _fields(table.description()))
        made += [b"\0"] if not number else []
    states: list[int | None] = [None, None]
    fields = []
    for at in reversed(range(count)):
        for number in (1, 0):
            table = tables[number]
            if table is not None:
                states[number], field = table.after(states[number], int(kinds[number][at]))
                fields.append(field)
        for lengths, codes, widths in zip((literals, matches), kinds, (_LITERAL_BITS, _MATCH_BITS), strict=True):
            width = int(widths[codes[at]])
            fields.append((int(lengths[at]) & (1 << width) - 1, width))
    for number in (1, 0):
        table = tables[number]
        if table is not None:
            fields.append(table.end(states[number]))
    return b"".join((*made, _fields([*fields, (1, 1)])))


def _length_codes(lengths: Numbers, widths: Numbers) -> Numbers:
    """Return the codes of lengths: each code stands for as many lengths as the bits behind it can say."""
    least = np.append(0, np.cumsum(1 << widths)[:-1])
    return np.searchsorted(least, lengths, side="right") - 1
