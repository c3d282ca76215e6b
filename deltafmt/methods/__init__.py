"""Compression methods: dense deltas to the arrays of terms. One file a method; this file lists them.

================  =====================================================================
``BitDelta``      signs, and the mean magnitude
``DARE``          random elements, rescaled
``DeltaCoMe``     singular vectors, the first at more bits than the later ones
``DeltaDQ``       group-wise balanced dropout with rescale, and k-bit quantization
``DeltaDQSQ``     the same, codes cut into parts with lists of their own
``Exact``         every bit, for archives
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

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from deltafmt.methods.spelling import parse_method

if TYPE_CHECKING:
    from deltafmt.methods.base import Method
    from deltafmt.methods.bitdelta import BitDelta
    from deltafmt.methods.dare import DARE
    from deltafmt.methods.deltacome import DeltaCoMe
    from deltafmt.methods.deltadq import DeltaDQ
    from deltafmt.methods.deltadq_sq import DeltaDQSQ
    from deltafmt.methods.exact import Exact
    from deltafmt.methods.gptq import GPTQ
    from deltafmt.methods.magnitude import Magnitude
    from deltafmt.methods.residual import Residual
    from deltafmt.methods.rtn import RTN
    from deltafmt.methods.sparsegpt import SparseGPT
    from deltafmt.methods.svd import SVD

# The class of each method, by the method's name, and the file in which the class lives.
_CLASSES: Final[dict[str, tuple[str, str]]] = {
    "deltadq": ("DeltaDQ", "deltadq"),
    "residual": ("Residual", "residual"),
    "bitdelta": ("BitDelta", "bitdelta"),
    "dare": ("DARE", "dare"),
    "delta-come": ("DeltaCoMe", "deltacome"),
    "deltadq-sq": ("DeltaDQSQ", "deltadq_sq"),
    "magnitude": ("Magnitude", "magnitude"),
    "rtn": ("RTN", "rtn"),
    "svd": ("SVD", "svd"),
    "gptq": ("GPTQ", "gptq"),
    "sparsegpt": ("SparseGPT", "sparsegpt"),
    "exact": ("Exact", "exact"),
}
_HOMES: Final = {**dict(_CLASSES.values()), "Method": "base"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Methods(Mapping[str, "type[Method]"]):
    """The class of each method, by name; a method's file is imported when its class is first asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        found: type[Method] = __getattr__(_CLASSES[name][0])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES


METHODS: Final[Mapping[str, type[Method]]] = _Methods()


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
    "Exact",
    "Magnitude",
    "Method",
    "Residual",
    "SparseGPT",
    "parse",
]
