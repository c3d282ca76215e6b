"""The fingerprint of a tensor: the BLAKE3 of its dtype, shape and bytes (spec/deltafmt-v1.md, section 7.5)."""

from __future__ import annotations

import blake3


def hasher(dtype: str, shape: tuple[int, ...]) -> blake3.blake3:
    """Return a hasher that has hashed dtype and shape; the tensor's bytes (little-endian) come next."""
    sizes = ",".join(map(str, shape))
    return blake3.blake3(f"deltafmt tensor v1\n{dtype}\n{sizes}\n".encode())
