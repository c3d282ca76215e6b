"""The rules of the index encodings: which N:M they allow and how many words they take (specification, 11.4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Final

from deltafmt.errors import UsageError
from deltafmt.terms.tiles import stream_words

MAX_SEEDED_M: Final = 128


class IndexEncoding(ABC):
    """One way to say which N of the M columns of a group are kept.

    Attributes:
        name: the encoding's name in the index of a file.
        summary: what it is for, in a few words.
        seeded: True if positions follow from the tensor's seed; a term then has no buffer ``index``.
        cold_only: True if only a ``cold`` file may have it.
        plain: the name of the encoding in which digests are taken and kernels read.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    seeded: ClassVar[bool] = False
    cold_only: ClassVar[bool] = False
    plain: ClassVar[str]

    @staticmethod
    @abstractmethod
    def check(n: int, m: int) -> None:
        """Refuse an N:M that the encoding cannot hold.

        Raises:
            UsageError: names the N:M and the limit.
        """

    @staticmethod
    @abstractmethod
    def row_words(n: int, m: int, groups: int) -> int:
        """Return the packed words of a mask row of ``groups`` groups."""

    @staticmethod
    def archived(n: int, m: int) -> str | None:  # noqa: ARG004 - most have no smaller form
        """Return the name of the encoding that a ``cold`` file uses instead where that is smaller; otherwise None."""
        return None


class Seeded(IndexEncoding):
    """Positions are a function of the tensor's seed, the row and the group: no byte is stored."""

    name = "seeded"
    summary = "no index bytes; M is a power of two up to 128"
    seeded = True
    plain = "seeded"

    @staticmethod
    def check(n: int, m: int) -> None:  # noqa: ARG004 - any N
        """Refuse an M that the hash cannot draw from."""
        if m & (m - 1) or m > MAX_SEEDED_M:
            raise UsageError(f"a seeded index needs M to be a power of two up to {MAX_SEEDED_M}, not {m}")

    @staticmethod
    def row_words(n: int, m: int, groups: int) -> int:  # noqa: ARG004 - none
        """Return 0."""
        return 0


class Fixed(IndexEncoding):
    """Each kept element has its position: ceil(log2 M) bits."""

    name = "fixed"
    summary = "log2(M) bits for each kept element"
    plain = "fixed"

    @staticmethod
    def check(n: int, m: int) -> None:
        """Accept every N:M."""

    @staticmethod
    def row_words(n: int, m: int, groups: int) -> int:
        """Return the words of N positions a group."""
        return stream_words(groups * n, position_bits(m))

    @staticmethod
    def archived(n: int, m: int) -> str | None:
        """Return ``rank`` where a rank exists and takes fewer bits than N positions."""
        return Rank.name if math.comb(m, n) < 2**64 and rank_bits(n, m) < position_bits(m) * n else None


class Rank(IndexEncoding):
    """Each group has the number of its set of positions among all C(M, N) sets: the fewest bits."""

    name = "rank"
    summary = "one number for each group; smaller; cold files only"
    cold_only = True
    plain = "fixed"

    @staticmethod
    def check(n: int, m: int) -> None:
        """Refuse an N:M whose ranks take more than 64 bits."""
        if math.comb(m, n) >= 2**64:
            raise UsageError(f"a rank index needs C(M, N) below 2**64, which {n}:{m} exceeds")

    @staticmethod
    def row_words(n: int, m: int, groups: int) -> int:
        """Return the words of one rank a group."""
        return stream_words(groups, rank_bits(n, m))


ENCODINGS: Final[dict[str, type[IndexEncoding]]] = {encoding.name: encoding for encoding in (Seeded, Fixed, Rank)}


def position_bits(m: int) -> int:
    """Return the width of a position: ceil(log2 M)."""
    return (m - 1).bit_length()


def rank_bits(n: int, m: int) -> int:
    """Return the width of a rank: ceil(log2 C(M, N))."""
    return (math.comb(m, n) - 1).bit_length()
