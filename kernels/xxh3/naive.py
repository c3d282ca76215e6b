"""XXH3-128 with seed 0 as its specification words it, for inputs of more than 240 bytes; tests compare with it."""

from __future__ import annotations

import numpy as np

from deltafmt.kernels.xxh3.algorithm import (
    BLOCK_BYTES,
    LANES,
    LAST_STRIPE_AT,
    PRIME32_1,
    SCRAMBLE_AT,
    SECRET,
    START,
    STRIPE_BYTES,
    U64,
    lanes_at,
    merged,
)

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def accumulate(accumulators: U64, stripe: U64, secret: U64) -> U64:
    """Add one stripe."""
    key = stripe ^ secret
    added: U64 = stripe[np.arange(LANES) ^ 1] + (key & _LOW) * (key >> _HALF)
    return accumulators + added


def scramble(accumulators: U64) -> U64:
    """Mix the accumulators after a block."""
    mixed = accumulators ^ (accumulators >> np.uint64(47)) ^ lanes_at(SECRET, SCRAMBLE_AT)
    scrambled: U64 = mixed * np.uint64(PRIME32_1)
    return scrambled


def accumulators_of(data: bytes | memoryview) -> U64:
    """Return the 8 accumulators behind the last stripe of more than 240 bytes, uint64."""
    blocks = (len(data) - 1) // BLOCK_BYTES
    found = START
    for offset in range(0, (len(data) - 1) // STRIPE_BYTES * STRIPE_BYTES, STRIPE_BYTES):
        within = offset % BLOCK_BYTES
        found = accumulate(found, lanes_at(data, offset), lanes_at(SECRET, within // LANES))
        if within == BLOCK_BYTES - STRIPE_BYTES and offset < blocks * BLOCK_BYTES:
            found = scramble(found)
    return accumulate(found, lanes_at(data, len(data) - STRIPE_BYTES), lanes_at(SECRET, LAST_STRIPE_AT))


def digest(data: bytes | memoryview) -> bytes:
    """Return the XXH3-128 of more than 240 bytes."""
    return merged(accumulators_of(data)[None], np.array([len(data)], np.uint64))[0]
