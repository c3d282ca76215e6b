"""The checksums that version folders have of each tensor's new bytes."""

from __future__ import annotations

import re
import zlib
from typing import Final, Protocol

import xxhash
from blake3 import blake3

from deltafmt.output import Bytes

# The names of the algorithms, and how many hexadecimal digits each gives.
CHECKSUMS: Final = {"xxh3-128": 32, "blake3": 64, "adler32": 8}


class Hasher(Protocol):
    """Takes bytes, and gives their checksum."""

    def update(self, data: Bytes, /) -> object:
        """Take some bytes."""

    def hexdigest(self) -> str:
        """Return the checksum of all bytes so far, in hexadecimal."""


class _Adler32:
    """Adler-32 with the methods that other hashers have."""

    def __init__(self) -> None:
        self._value = zlib.adler32(b"")

    def update(self, data: Bytes) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def checksum_hasher(algorithm: str) -> Hasher:
    """Return a hasher of one of :data:`CHECKSUMS`."""
    if algorithm == "adler32":
        return _Adler32()
    return xxhash.xxh3_128() if algorithm == "xxh3-128" else blake3()


def is_checksum(algorithm: str, text: str) -> bool:
    """Tell whether a text can be a checksum of an algorithm."""
    return re.fullmatch(f"[0-9a-f]{{{CHECKSUMS[algorithm]}}}", text) is not None
