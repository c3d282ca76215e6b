"""Pairs of which a side is quantized: what the user says of it, what is read, and what a delta file records.

8-bit floats with scales are read as the BF16 values that they mean, or packed as the bytes that they are. A file
describes how its base keeps tensors that were read as values (spec/deltafmt-v1.md, section 7.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from deltafmt.checkpoint.dequantized import DequantizedTensor
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.fp8 import read_as_values
from deltafmt.checkpoint.plain_config import leave_out_quantization
from deltafmt.checkpoint.quantizers import parts_of_codes
from deltafmt.format.choices import check_choice
from deltafmt.index.scaled import ScaledRef

VALUES: Final = "values"
EXACT: Final = "exact"
QUANTIZED: Final = (VALUES, EXACT)


def read_pair(base: Checkpoint, finetuned: Checkpoint, quantized: str | None) -> None:
    """Read the 8-bit floats of both sides as values; with ``exact``, leave all as it is stored.

    Raises:
        UnsupportedError, InvalidFileError: as :func:`deltafmt.checkpoint.fp8.read_as_values` raises them.
    """
    if quantized is not None:
        check_choice("quantized", quantized, QUANTIZED)
    if quantized == EXACT:
        finetuned.kept = parts_of_codes(finetuned)
        return
    read_as_values(base)
    read_as_values(finetuned)
    if finetuned.dequantized:
        leave_out_quantization(finetuned)


def scaled_refs(tensors: Mapping[str, DequantizedTensor], threads: int) -> dict[str, ScaledRef]:
    """Return what a delta file says of base tensors that were read as values.

    Args:
        tensors: the tensors by name.
        threads: worker threads for the fingerprints.
    """
    if not tensors:
        return {}
    with ThreadPoolExecutor(threads, thread_name_prefix="deltafmt-scaled") as pool:
        return dict(zip(tensors, pool.map(DequantizedTensor.describe, tensors.values()), strict=True))
