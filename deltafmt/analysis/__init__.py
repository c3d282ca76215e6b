"""Analysis: figures of a fine-tune's delta, and of the losses when it is compressed, for people who choose a method.

:func:`analyze` reads a pair of checkpoints once, a block of rows at a time, and returns a :class:`Report`.
:func:`deltafmt.analysis.html.render` draws the report. Only numpy is needed, unless the inputs of the layers come from
a calibration text.
"""

from deltafmt.analysis.analyze import analyze
from deltafmt.analysis.report import Report

__all__ = ["Report", "analyze"]
