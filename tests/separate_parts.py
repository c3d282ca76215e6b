"""Separate quantization (DeltaDQ v2) in general: codes cut by value into parts of narrower codes, and their costs.

The package has the one form whose parts need no offsets (``deltadq-sq``); this shows why no other is worth storing.

Jiang et al., "DeltaDQ: Ultra-High Delta Compression for Fine-Tuned LLMs via Group-wise Dropout and Separate
Quantization" (arXiv 2410.08666). With m = 2^s parts, an entry whose k-bit field is u belongs to part j = u >> (k - s)
and is stored there as the low k - s bits of u. A part is a sparse matrix of its own:

    value = (2 (u' + j 2^(k-s)) - top) * scale / 2

for its field u', so that it is a term with the shared scale and an offset j 2^(k-s) of its own, and the delta is the
sum of the m terms, which do not overlap. With k = s a field has no bits at all: the part that an entry is in says all.

The cost: the paper counts k - s bits an entry. The list that an entry stands in tells its part, so:

- with a list of columns for each row and part, each entry is listed once, as before, and the s bits are truly saved;
  every part adds a row pointer for each row;
- with N:M positions the number of a part's entries in a group varies, so the positions of all parts must be stored with
  counts, and the s bits come back as those;
- with a seeded index, which takes no bytes, nothing says which part an entry is in, and s bits an entry must.

No encoding falls below the entropy of the positions plus that of the codes; :func:`part_costs` gives all figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Part:
    """The entries of one range of values.

    Attributes:
        offset: number that is added to a field: j 2^(k-s).
        bits: width of a field, k - s; may be 0.
        indptr: int64, shape (rows + 1,): where each row's entries start.
        indices: columns of the entries, int32, ascending within a row.
        codes: fields u', uint8, as many.
    """

    offset: int
    bits: int
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    codes: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PartCosts:
    """Bits of a pruned matrix in parts.

    Attributes:
        values: bits of the fields, which the paper counts.
        lists: bits of the columns and row pointers, at the narrowest whole widths.
        least: the empirical entropy of positions and codes, a bound for all encodings.
        unsplit: bits of the k-bit codes with one list of columns and one row pointer a row.
    """

    values: int
    lists: int
    least: int
    unsplit: int


def split(codes: NDArray[np.uint8], kept: NDArray[np.bool_], bits: int, parts: int) -> list[Part]:
    """Cut the codes of a pruned matrix into parts.

    Args:
        codes: fields u, shape (rows, columns); those of entries that are not kept do not matter.
        kept: bool, of the same shape.
        bits: k.
        parts: m, a power of two up to 2^k.

    Raises:
        UsageError: m is not such a power.
    """
    shift = _narrow_bits(bits, parts)
    number = codes >> shift
    found = []
    for part in range(parts):
        mine = kept & (number == part)
        indptr = np.concatenate([[0], np.cumsum(mine.sum(axis=1))]).astype(np.int64)
        low = codes[mine] & np.uint8((1 << shift) - 1)
        found.append(Part(part << shift, shift, indptr, np.nonzero(mine)[1].astype(np.int32), low))
    return found


def join(parts: Sequence[Part], shape: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the codes and the kept entries that :func:`split` was given; codes of other entries are 0."""
    codes = np.zeros(shape, np.uint8)
    kept = np.zeros(shape, np.bool_)
    for part in parts:
        rows = np.repeat(np.arange(shape[0]), np.diff(part.indptr))
        codes[rows, part.indices] = part.codes + np.uint8(part.offset)
        kept[rows, part.indices] = True
    return codes, kept


def part_costs(parts: Sequence[Part], shape: tuple[int, int]) -> PartCosts:
    """Return what parts cost: by the paper's count, as lists, at the least, and uncut."""
    rows, columns = shape
    entries = sum(part.codes.size for part in parts)
    column_bits = max((columns - 1).bit_length(), 1)
    pointer_bits = max(entries.bit_length(), 1) * (rows + 1)
    narrow = parts[0].bits
    full = narrow + (len(parts) - 1).bit_length()
    counts = [rows * columns - entries]
    for part in parts:
        counts += np.bincount(part.codes, minlength=1 << narrow).tolist()
    return PartCosts(
        entries * narrow,
        entries * column_bits + pointer_bits * len(parts),
        math.ceil(_entropy(counts)),
        entries * (full + column_bits) + pointer_bits,
    )


def _narrow_bits(bits: int, parts: int) -> int:
    if not 1 <= bits <= 8:
        raise UsageError(f"bits k = {bits} is outside 1 to 8")
    if parts < 1 or parts & (parts - 1) or parts > 1 << bits:
        raise UsageError(f"{parts} parts, which must be a power of two up to {1 << bits} for {bits} bits")
    return bits - (parts.bit_length() - 1)


def _entropy(counts: Sequence[int]) -> float:
    """Return the bits of a sequence of symbols with these counts, each drawn independently."""
    total = sum(counts)
    return sum(count * math.log2(total / count) for count in counts if count)
