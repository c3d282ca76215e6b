"""Compression methods: dense deltas to the arrays of terms. One file a method; this file lists them.

================  =====================================================================
``BitDelta``      signs, and the mean magnitude
``DARE``          random elements, rescaled
``DeltaCoMe``     singular vectors, the first at more bits than the later ones
``DeltaDQ``       group-wise balanced dropout with rescale, and k-bit quantization
``DeltaDQSQ``     the same, codes cut into parts with lists of their own
``GPTQ``          every element to k bits, each error made up for by later columns
``Magnitude``     the largest elements, anywhere or N of every M columns
``Residual``      the first singular vectors, and dropout of what they leave
``RTN``           every element to the nearest of k bits
``SVD``           the first singular vectors
``SparseGPT``     N of every M columns, what is lost made up for by later columns
================  =====================================================================

A method is spelled ``NAME:key=value,key=value``: :func:`parse` reads that, and ``Method.spelling()`` gives it.
"""

from __future__ import annotations

from deltafmt.methods.base import Method
from deltafmt.methods.bitdelta import BitDelta
from deltafmt.methods.dare import DARE
from deltafmt.methods.deltacome import DeltaCoMe
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.methods.deltadq_sq import DeltaDQSQ
from deltafmt.methods.gptq import GPTQ
from deltafmt.methods.magnitude import Magnitude
from deltafmt.methods.residual import Residual
from deltafmt.methods.rtn import RTN
from deltafmt.methods.sparsegpt import SparseGPT
from deltafmt.methods.spelling import parse_method
from deltafmt.methods.svd import SVD

_ALL: tuple[type[Method], ...] = (
    DeltaDQ,
    Residual,
    BitDelta,
    DARE,
    DeltaCoMe,
    DeltaDQSQ,
    Magnitude,
    RTN,
    SVD,
    GPTQ,
    SparseGPT,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def parse(text: str, like: Method | None = None) -> Method:
    """Return the method of a spelling.

    >>> parse("deltadq:nm=2:16,bits=2")
    DeltaDQ(n=2, m=16, bits=2, ...)
    >>> parse("bits=3", like=DeltaDQ(2, 16, 2)).spelling()
    'deltadq:nm=2:16,bits=3'

    Args:
        text: ``NAME:key=value,key=value``, or ``NAME`` alone; with ``like`` also ``key=value,key=value``.
        like: the method that pairs without a name change. Its options that have no effect beside the new ones have
            their defaults again. It is of no matter to a text with a name.

    Raises:
        UsageError: there is no such method or option, a value is out of range, or an option has no effect; says which
            part is wrong and what is possible.
    """
    return parse_method(METHODS, text, like)


__all__ = [
    "DARE",
    "GPTQ",
    "METHODS",
    "RTN",
    "SVD",
    "BitDelta",
    "DeltaCoMe",
    "DeltaDQ",
    "DeltaDQSQ",
    "Magnitude",
    "Method",
    "Residual",
    "SparseGPT",
    "parse",
]
