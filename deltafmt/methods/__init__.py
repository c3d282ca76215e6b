"""Compression methods: dense deltas to the arrays of terms. One file a method.

================  =====================================================================
``BitDelta``      signs, and the mean magnitude
``DeltaDQ``       group-wise balanced dropout with rescale, and k-bit quantization
``RTN``           every element to the nearest of k bits
================  =====================================================================
"""

from deltafmt.methods.base import Method
from deltafmt.methods.bitdelta import BitDelta
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {method.name: method for method in (DeltaDQ, BitDelta, RTN)}

__all__ = ["METHODS", "RTN", "BitDelta", "DeltaDQ", "Method"]
