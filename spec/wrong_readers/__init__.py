"""Small mistakes that a reader can make, other than to leave out a check, and a vector that catches each."""

from __future__ import annotations

from . import file, floats, index, kinds, positions, progressive, sparse, words
from .wrong import WRONG, Wrong

__all__ = ["WRONG", "Wrong", "file", "floats", "index", "kinds", "positions", "progressive", "sparse", "words"]
