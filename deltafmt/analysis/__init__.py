"""What a fine-tune's delta looks like, and what compressing it costs: figures for people who choose a method.

:func:`analyze` reads a pair once, a block of rows at a time, and returns a :class:`Report`;
:func:`deltafmt.analysis.html.render` draws it. Only numpy is needed, unless inputs are taken from a calibration text.
"""

from deltafmt.analysis.analyze import analyze
from deltafmt.analysis.report import Report

__all__ = ["Report", "analyze"]
