"""The methods that ``accuracy.py`` compares, and the settings of each from which the one for a size is chosen.

A row of a tile packs its codes in whole 32-bit words, so rows of 384 columns waste nothing where the entries that they
keep, times the bits of a code, come near a multiple of 32: 2:16 at 2 bits fills three words, 5:64 two, 5:128 one.
Dropout alone does better with two bits a code than with twice the entries at one; behind a low-rank head, where files
are the smallest, one bit does better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TARGET = "target"


@dataclass(frozen=True, slots=True)
class Ladder:
    """A method, and settings of falling size.

    Attributes:
        label: names the row of a table and the line of a chart.
        method: its name, or TARGET: a method for every tensor is chosen by ``pack`` itself.
        rungs: options, as a rule has them.
        calibrated: whether the fine-tune reads a text first.
    """

    label: str
    method: str
    rungs: tuple[str, ...]
    calibrated: bool = False


def falling(first: float, last: float, step: float = 0.96) -> list[float]:
    """Return numbers from the first down to the last, each so many times the one before."""
    found = [first]
    while found[-1] * step >= last:
        found.append(found[-1] * step)
    return found


def _options(text: str, values: Sequence[object]) -> tuple[str, ...]:
    return tuple(text.format(f"{value:.4g}" if isinstance(value, float) else value) for value in values)


KEPT = (
    *(f"{n}:32" for n in range(31, 3, -1)),
    *(f"{n}:64" for n in (7, 6, 5, 4, 3)),
    *(f"{n}:128" for n in (5, 4, 3, 2, 1)),
)
# Vectors of the head, what is kept of the rest, and its bits: head and rest shrink together.
HEADS = (
    *((16, f"{n}:32", 2) for n in range(31, 4, -1)),
    *((rank, "4:32", 2) for rank in range(14, 6, -1)),
    *((rank, "5:64", 2) for rank in range(8, 3, -1)),
    *((rank, "5:64", 1) for rank in range(6, 0, -1)),
)
GROUPS = (16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 0)
UNIFORM = tuple(f"bits={bits},scale_group={group}" for bits in (8, 6, 5, 4, 3, 2, 1) for group in GROUPS)
LARGEST = (
    *(f"nm={n}:16,bits=2" for n in range(8, 0, -1)),
    *(f"nm={n}:16,bits=2,share=8" for n in range(8, 0, -1)),
    *(f"nm=1:{m},bits=2,share=8" for m in (32, 64, 128)),
)
VECTORS = falling(3.0, 0.02)
DENSITIES = falling(0.5, 0.002, 0.94)
GAPS = (2, 3, *range(4, 12), *range(12, 32, 2), *range(32, 256, 8))

LADDERS = (
    Ladder(TARGET, TARGET, ()),
    Ladder("deltadq", "deltadq", _options("nm={},bits=2,share=1", KEPT)),
    Ladder(
        "residual",
        "residual",
        tuple(f"rank={rank},head_bits=4,nm={nm},bits={bits},share=1" for rank, nm, bits in HEADS),
    ),
    Ladder("svd, 16 bits", "svd", _options("bits_per_weight={}", VECTORS)),
    Ladder("svd, 4 bits", "svd", _options("bits_per_weight={},bits=4", VECTORS)),
    Ladder("svd, 3 bits", "svd", _options("bits_per_weight={},bits=3", VECTORS)),
    Ladder("delta-come", "delta-come", _options("bits_per_weight={}", VECTORS)),
    Ladder("delta-come, calibrated", "delta-come", _options("bits_per_weight={}", VECTORS), calibrated=True),
    Ladder("bitdelta", "bitdelta", ("mean=matrix",)),
    Ladder("bitdelta, calibrated", "bitdelta", ("mean=matrix",), calibrated=True),
    Ladder("rtn", "rtn", UNIFORM),
    Ladder("gptq", "gptq", UNIFORM, calibrated=True),
    Ladder("dare", "dare", _options("drop={},bits=2", [1 - kept for kept in DENSITIES])),
    Ladder("magnitude", "magnitude", _options("density={},bits=2", DENSITIES)),
    Ladder("magnitude, N:M", "magnitude", LARGEST),
    Ladder("sparsegpt", "sparsegpt", LARGEST, calibrated=True),
    Ladder("deltadq-sq", "deltadq-sq", _options("nm=1:{},bits=2", GAPS)),
)

# At the same share of entries kept, whatever they cost: section 4 of DARE, and section 3.2 of DeltaDQ.
FRACTIONS = (2, 4, 8, 16)
DROPPED: tuple[tuple[str, Callable[[int], str]], ...] = (
    ("random, rescaled", lambda part: f"dare:drop={1 - 1 / part}"),
    ("random in every 16, rescaled", lambda part: f"deltadq:nm={16 // part}:16,bits=8,share=1"),
    ("random, not rescaled", lambda part: f"dare:drop={1 - 1 / part},rescale=no"),
    ("largest", lambda part: f"magnitude:density={1 / part}"),
    ("largest, rescaled", lambda part: f"magnitude:density={1 / part},rescale=yes"),
)
