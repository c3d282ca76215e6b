"""The prediction of an exact tensor: the base's units, in the fine-tune's dtype (spec, 17.1).

Encoder and decoder both have it, so only the differences from it are stored.
"""

from __future__ import annotations

import numpy as np

from deltafmt.exact.units import Units, unit_of
from deltafmt.terms.floats import NANS, RAW_DTYPES, narrow, widen


def units_at(view: memoryview, dtype: str) -> Units:
    """Return bytes as units, without copying those that are aligned."""
    units = np.frombuffer(view, unit_of(dtype).dtype)
    return units if units.flags.aligned else units.copy()


def converted(base: Units, base_dtype: str, dtype: str) -> Units:
    """Return units of the base in another dtype.

    Args:
        base: units of the base.
        base_dtype, dtype: the two dtypes: equal, or each one of BF16, F16 and F32.
    """
    if base_dtype == dtype:
        return base
    values = widen(base, base_dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        units = narrow(values, dtype)
    # Payloads of converted NaNs differ from processor to processor.
    return np.where(np.isnan(values), RAW_DTYPES[dtype].type(NANS[dtype]), units)


def extended(units: Units, count: int) -> Units:
    """Return units, and zeros behind them up to ``count``: the base has fewer rows."""
    return units if units.size == count else np.concatenate([units, np.zeros(count - units.size, units.dtype)])
