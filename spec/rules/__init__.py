"""Every rule of the specification that a reader must keep, and the vectors that isolate it."""

from __future__ import annotations

from . import entries, exact, file, index, terms
from .rule import RULES, Rule

__all__ = ["RULES", "Rule", "entries", "exact", "file", "index", "terms"]
