"""Mutations of progressive files: an exact part for a tensor that has terms, in a file that becomes progressive by it.

The chunks are of every form, with random units, differences and places. Their checksums are those of another base: a
reader restores the first one, refuses it, and has shown by then its prediction, its marks and its order.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import tensors
import xxhash
import zstandard
from repair import SHAPE_ERRORS, Parts

from deltafmt.format import constants as c

# Bits of factors: 0, 1, a quarter, one that rounds, the smallest and the largest, and some that are not finite.
FACTORS = (
    0, 0x80000000, 0x3F800000, 0xBF800000, 0x3E800000, 0x3EAAAAAB, 1, 0x007FFFFF, 0x7F7FFFFF,
    0x7F800000, 0xFF800000, 0x7FC00000,
)  # fmt: skip
LARGEST_UNITS = 1 << 12


def change_part(parts: Parts, rng: random.Random) -> bool:
    """Give a tensor an exact part, or the exact part that it has another factor, chunk or form.

    Returns:
        False if no tensor can have one.
    """
    try:
        entries = [entry for entry in parts.index["tensors"].values() if entry.get("terms")]
        held = [entry for entry in entries if "exact" in entry]
        if held and rng.random() < 0.4:
            change_numbers(rng.choice(held)["exact"], rng)
            return True
        entry = rng.choice([entry for entry in entries if "exact" not in entry])
        units = c.element_count(tuple(entry["shape"]))
        if units > LARGEST_UNITS or any(tensor["action"] == "exact" for tensor in parts.index["tensors"].values()):
            return False
        chunk = rng.choice((256, 256, 512, 1 << 20))
        data = chunks_of(units, chunk, tensors.WIDTHS[entry["dtype"]], rng)
        make_progressive(parts)
        entry["exact"] = {
            "chunk": chunk,
            "data": add_buffer(parts, data),
            "digest": rng.randbytes(32),
            "factors": [rng.choice(FACTORS[:9]) for _ in entry["terms"]],
        }
    except SHAPE_ERRORS:
        return False
    return True


def change_numbers(exact: dict[str, Any], rng: random.Random) -> None:
    """Change a factor, or the units of a chunk."""
    if rng.random() < 0.2:
        exact["chunk"] = rng.choice((128, 256, 512, 1024, 1 << 24, 1 << 25))
    factors = exact["factors"]
    factors[rng.randrange(len(factors))] = rng.choice(FACTORS)


def make_progressive(parts: Parts) -> None:
    """Put the end of the served part, which is made when the file is put together, behind all sections."""
    parts.header.incompatible |= c.FEATURE_EXACT | c.FEATURE_PROGRESSIVE
    if all(row["kind"] != c.SECTION_KIND_SERVED for row in parts.index["sections"]):
        tensors.insert_section(parts, len(parts.sections), c.SECTION_KIND_SERVED, b"")


def add_buffer(parts: Parts, data: bytes) -> list[int]:
    """Add a buffer to the last section of exact tensors, or in one of its own, and return the reference to it."""
    table = parts.index["sections"]
    kinds = [row["kind"] for row in table]
    if c.SECTION_KIND_EXACT not in kinds:
        tensors.insert_section(parts, len(table), c.SECTION_KIND_EXACT, b"")
        kinds.append(c.SECTION_KIND_EXACT)
    number = max(at for at, kind in enumerate(kinds) if kind == c.SECTION_KIND_EXACT)
    start = len(parts.sections[number])
    if start + len(data) > tensors.LARGEST_BUFFERS:
        raise OverflowError
    parts.sections[number] += data
    return [number, start, len(data)]


def chunks_of(units: int, chunk: int, width: int, rng: random.Random) -> bytes:
    """Return the buffer of an exact part (section 17.4)."""
    out, table = b"", b""
    for first in range(0, units, chunk):
        count = min(chunk, units - first)
        form = rng.choice((0, 1, 2, 3, 4, 4, 4, 5, 5, 5))
        data, checksum = chunk_of(form, count, width, rng)
        out += data
        table += struct.pack("<QII", checksum, len(data), form)
    return out + table


def chunk_of(form: int, count: int, width: int, rng: random.Random) -> tuple[bytes, int]:
    """Return the bytes of a chunk of a form (section 17.5), and a checksum: the right one where no base decides it."""
    if form == 0:
        return b"", rng.getrandbits(64)
    if form == 1:
        data = rng.randbytes(count * width)
        return data, xxhash.xxh3_64_intdigest(data)
    if form < 5:
        planes = [plane_of(count, rng) for _ in range(width)]
        restored = bytes(byte for unit in zip(*planes, strict=True) for byte in unit)
        return planes_of(planes), xxhash.xxh3_64_intdigest(restored) if form == 2 else rng.getrandbits(64)
    places = sorted(rng.sample(range(count), rng.randrange(1, min(count, 40) + 1)))
    gaps, after = bytearray(), 0
    for place in places:
        fillers, gap = divmod(place - after, 255)
        gaps += b"\xff" * fillers + bytes([gap])
        after = place + 1
    stored = stored_plane(bytes(gaps))
    low = bytes(rng.randrange(1, 256) for _ in places)
    planes = [low, *(plane_of(len(places), rng) for _ in range(width - 1))]
    head = struct.pack("<III", len(places), len(gaps), len(stored))
    return head + stored + planes_of(planes), rng.getrandbits(64)


def plane_of(count: int, rng: random.Random) -> bytes:
    """Return the bytes of a plane: zeros, a few values, or any."""
    kind = rng.random()
    return (
        bytes(count) if kind < 0.3 else bytes(rng.choices((0, 1, 2), k=count)) if kind < 0.6 else rng.randbytes(count)
    )


def planes_of(planes: Sequence[bytes]) -> bytes:
    """Return planes behind their lengths."""
    stored = [stored_plane(plane) for plane in planes]
    return struct.pack(f"<{len(stored)}I", *map(len, stored)) + b"".join(stored)


def stored_plane(plane: bytes) -> bytes:
    """Return a plane as it is stored: nothing, a frame, or itself."""
    if not any(plane):
        return b""
    frame = zstandard.ZstdCompressor(write_content_size=True, write_checksum=False).compress(plane)
    return frame if len(frame) < len(plane) else plane
