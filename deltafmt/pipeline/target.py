"""The target of a pack: how many bytes the file may have."""

from __future__ import annotations

import math

from deltafmt.errors import UsageError


def target_bytes(ratio: float | None, size: int | None, finetuned_bytes: int) -> int | None:
    """Return the bytes that a file may have, or None without a target.

    Args:
        ratio: how many times smaller than the fine-tune the file must be, if given.
        size: bytes that the file may have, if given.
        finetuned_bytes: bytes of the fine-tune's weight files.

    Raises:
        UsageError: both are given, the ratio is not above 1, or the size is not above 0.
    """
    if ratio is not None and size is not None:
        raise UsageError(f"a target ratio of {ratio:g} and a target size of {size:,} bytes: one of them decides")
    if ratio is not None:
        if not 1 < ratio < math.inf:
            raise UsageError(f"target ratio {ratio:g} is not a number above 1")
        return int(finetuned_bytes / ratio)
    if size is not None and size < 1:
        raise UsageError(f"target size {size} is not a number of bytes above 0")
    return size


def target_metadata(target: int) -> str:
    """Return what the metadata of a file made for a target says of its method."""
    return f"target {target} bytes"
