"""Compression methods: dense deltas to the arrays of terms. One file a method.

================  =====================================================================
``BitDelta``      signs, and the mean magnitude
``DARE``          random elements, rescaled
``DeltaDQ``       group-wise balanced dropout with rescale, and k-bit quantization
``Magnitude``     the largest elements
``RTN``           every element to the nearest of k bits
================  =====================================================================
"""

from deltafmt.methods.base import Method
from deltafmt.methods.bitdelta import BitDelta
from deltafmt.methods.dare import DARE
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.methods.prune import Magnitude
from deltafmt.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {method.name: method for method in (DeltaDQ, BitDelta, DARE, Magnitude, RTN)}

__all__ = ["DARE", "METHODS", "RTN", "BitDelta", "DeltaDQ", "Magnitude", "Method"]
