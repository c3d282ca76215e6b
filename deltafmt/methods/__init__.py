"""Compression methods: dense deltas to arrays of positions, codes and scales. One file a method.

================  =====================================================================
``DeltaDQ``       group-wise balanced dropout with rescale, and k-bit quantization
================  =====================================================================
"""

from deltafmt.methods.base import Method
from deltafmt.methods.deltadq import DeltaDQ

METHODS = {"deltadq": DeltaDQ}

__all__ = ["METHODS", "DeltaDQ", "Method"]
