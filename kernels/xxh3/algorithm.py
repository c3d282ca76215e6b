"""The constants of XXH3-128 with seed 0, and its last step on the host, for inputs of more than 240 bytes.

The algorithm, its constants and its words: the xxHash project, "XXH3 Algorithm Specification" (doc/xxhash_spec.md). A
block of 1,024 bytes has 16 stripes of 8 lanes of 8 bytes. Within a block, every stripe only adds to the accumulators,
in any order; between blocks they are scrambled.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

LANES: Final = 8
STRIPE_BYTES: Final = 64
BLOCK_BYTES: Final = 1024
SHORT_BYTES: Final = 240

SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32_1: Final = 0x9E3779B1
PRIME32_2: Final = 0x85EBCA77
PRIME32_3: Final = 0xC2B2AE3D
PRIME64: Final = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
PRIME_MX1: Final = 0x165667919E3779F9

SCRAMBLE_AT: Final = len(SECRET) - STRIPE_BYTES
LAST_STRIPE_AT: Final = len(SECRET) - STRIPE_BYTES - 7
START: Final = np.array([PRIME32_3, *PRIME64[:4], PRIME32_2, PRIME64[4], PRIME32_1], np.uint64)

U64 = NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def lanes_at(data: bytes | memoryview, offset: int) -> U64:
    """Return 8 lanes of a buffer from any offset."""
    return np.frombuffer(data, np.dtype("<u8"), LANES, offset).astype(np.uint64)


def merged(accumulators: U64, lengths: U64) -> list[bytes]:
    """Return the digests of several inputs, most significant byte first, as they are stored.

    Args:
        accumulators: shape (inputs, 8).
        lengths: of the inputs in bytes, shape (inputs,).
    """
    # The high half of a digest, then the low one; each sums four products of neighbouring lanes.
    secret = np.stack([lanes_at(SECRET, len(SECRET) - STRIPE_BYTES - 11), lanes_at(SECRET, 11)])
    start = np.stack([~(lengths * np.uint64(PRIME64[1])), lengths * np.uint64(PRIME64[0])], 1)
    mixed = accumulators[:, None] ^ secret
    total = start + _folded_product(mixed[:, :, ::2], mixed[:, :, 1::2]).sum(2, dtype=np.uint64)
    total = (total ^ (total >> np.uint64(37))) * np.uint64(PRIME_MX1)
    raw = (total ^ (total >> _HALF)).astype(">u8").tobytes()
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


def _folded_product(a: U64, b: U64) -> U64:
    """Return the two halves of a 128-bit product, xored."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    low, cross_a, cross_b = a_low * b_low, a_high * b_low, a_low * b_high
    carried = (low >> _HALF) + (cross_a & _LOW) + (cross_b & _LOW)
    high = a_high * b_high + (cross_a >> _HALF) + (cross_b >> _HALF) + (carried >> _HALF)
    folded: U64 = high ^ (low & _LOW | carried << _HALF)
    return folded
