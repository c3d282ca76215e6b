"""The options that several methods have: each declared once, and the groups of fields in which they come.

A method inherits the groups that it wants, and has their fields in the order of the *last* base first, as dataclasses
do. A field that a method states again keeps its place and has another default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deltafmt.methods import hessian
from deltafmt.methods.declare import Need, Option, alternatives, option
from deltafmt.terms.nm.index.encodings import ENCODINGS

RANK = Option("singular vectors that are kept", "R", "1 or more", right=lambda rank: rank >= 1, wrong="is not positive")
BITS_PER_WEIGHT = Option(
    "keep as many singular vectors as take B bits for each element of the matrix",
    "B",
    "a number above 0",
    right=lambda bits: 0 < bits < math.inf,
    wrong="is not a positive number",
)
NM = Option(
    "keep N of every M columns",
    "N:M",
    "1 to M for N, 2 to 255 for M",
    key="nm",
    fields=("n", "m"),
    type="nm",
)
BITS = Option("width of a code in bits", "K", "1 to 8")
# For positions that the values choose.
UNSEEDED = tuple(name for name, encoding in ENCODINGS.items() if not encoding.seeded)


def _index_help(names: Iterable[str]) -> str:
    return "how positions are stored: " + ", ".join(f"{name} ({ENCODINGS[name].summary})" for name in names)


INDEX = Option(_index_help(ENCODINGS), "KIND", choices=tuple(ENCODINGS))
CHOSEN_INDEX = Option(
    _index_help(UNSEEDED),
    "KIND",
    choices=UNSEEDED,
    refused=tuple(
        (name, f"cannot hold positions that the values choose; use {alternatives(UNSEEDED)}")
        for name in ENCODINGS
        if name not in UNSEEDED
    ),
)
SHARE = Option("consecutive rows that keep the same positions", "V", "1, 2, 4 or 8")
GRID = Option(
    "the levels of codes: midtread has a zero, midrise has none, asymmetric stores a zero point for each scale",
    "KIND",
    choices=("midtread", "midrise", "asymmetric"),
    otherwise="midrise for 1 and 2 bits, else midtread",
)
SCALE = Option(
    "how scales are found: minmax clips nothing, mse has the least squared error",
    "RULE",
    choices=("minmax", "mse"),
    otherwise="mse below 4 bits, else minmax",
    noun="scale rule",
)
SCALE_GROUP = Option("consecutive codes that share a scale; 0 for one scale a row", "G", "0 or more")
SCALE_DTYPE = Option("dtype of scales", "DTYPE", choices=("BF16", "F32"), noun="scale dtype")
VALUE_DTYPE = Option(
    "dtype of values that are stored as they are", "DTYPE", choices=("BF16", "F16", "F32"), noun="value dtype"
)
RESCALE = Option("multiply what is kept by M/N, so that products keep their expected size")
GAIN = Option(
    "multiply all scales: above 1 makes up for what few levels shorten, below 1 spares noise where little is kept",
    "G",
    "a number above 0 and up to 8",
    otherwise="1; a target chooses it",
    right=lambda gain: 0 < gain <= 8,
    wrong="is not a number above 0 and up to 8",
)
DAMPING = Option(
    "what is added to the second moments of the inputs, as a share of their mean",
    "SHARE",
    "a number from 0 up",
    right=lambda share: 0 <= share < math.inf,
    wrong="is not a number from 0 up",
)
REFITS = Option(
    "times that scales are fitted to the codes, which are then found anew",
    "N",
    "0 or more",
    otherwise="2 below 3 bits, else 0",
    right=lambda number: number >= 0,
    wrong="is fewer than none",
)

CODED = Need("bits: without bits, values are stored as they are", lambda options: options.bits is not None)
RAW = Need("values that are stored as they are: leave bits out", lambda options: options.bits is None)
DROPPED = Need("N below M: where all is kept there is nothing to make up for", lambda options: options.n != options.m)


@dataclass(frozen=True)
class KeptOptions:
    """N and M: entries kept in each group of M columns of a row."""

    n: int = option(4, NM)
    m: int = 16


@dataclass(frozen=True)
class BitsOption:
    """k, width of a code."""

    bits: int = option(4, BITS)


@dataclass(frozen=True)
class PositionOptions:
    """How the positions of kept entries are stored, and how many rows share them."""

    index: str = option("seeded", INDEX)
    share: int = option(4, SHARE)


@dataclass(frozen=True)
class ChosenPositionOptions(PositionOptions):
    """The same for a method that chooses positions by the values, which no seed gives."""

    index: str = option("fixed", CHOSEN_INDEX)
    share: int = option(1, SHARE)


@dataclass(frozen=True)
class ScaleOptions:
    """Scales of codes, one a row."""

    scale: str | None = option(None, SCALE)
    scale_dtype: str = option("BF16", SCALE_DTYPE)


@dataclass(frozen=True)
class CodeOptions:
    """The levels of codes, and their scales."""

    grid: str | None = option(None, GRID)
    scale: str | None = option(None, SCALE)
    scale_group: int = option(128, SCALE_GROUP)
    scale_dtype: str = option("BF16", SCALE_DTYPE)


@dataclass(frozen=True)
class SolverOptions:
    """Options of the solvers that make up for errors."""

    damping: float = option(hessian.DAMPING, DAMPING)
    refits: int | None = option(None, REFITS)
