"""Identity of a tensor: BLAKE3 over dtype, shape and bytes (spec/deltafmt-v1.md, section 7.5)."""

from __future__ import annotations

import blake3


def hasher(dtype: str, shape: tuple[int, ...]) -> blake3.blake3:
    """Return a hasher that has taken dtype and shape and waits for the tensor's little-endian bytes."""
    sizes = ",".join(map(str, shape))
    return blake3.blake3(f"deltafmt tensor v1\n{dtype}\n{sizes}\n".encode())
