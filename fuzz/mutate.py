"""Mutations that know the format: they change a delta file in ways that get past its checksums.

``mutate(data, rng)`` takes a file, valid or not, and returns another one: lengths, checksums, digests, content id and
seal fit the change in most cases. The numbers come from ``rng`` alone, so a seed names a mutation. The second reader's
tests use the same function as the harness of the reader.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import exact_parts
import repair
import tensors
from repair import Parts

from deltafmt.format import constants as c
from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.registry import LAYOUTS

MAX_LENGTH = 32768

# The fuzzer's own mutator of bytes: takes bytes and the largest length.
Plain = Callable[[bytes, int], bytes]

NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 257, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 2**40, 2**48, 2**48 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -128, -(2**63),
)  # fmt: skip
WORDS = (
    "", "a", "same", "replace", "add", "alias", "exact", "hot", "cold", "midtread",
    "midrise", "asymmetric", "row", "column", *LAYOUTS, *ENCODINGS,
    "codes", "index", "scales", "data", "terms", "target", "parts", "leading", "scaled", "factors", "files", "\0",
    "../up", "a/b", "A/b", "/a", "a/", "a//b", ".hidden", "a.", "a ", "aux", "AUX.txt", "com1",
    "model.SAFETENSORS", "model.safetensors", "a.bin/x.safetensors", "a.so", "a.py", "a\\b",
    "config.json", "\u20ac", "e\u0301", "\u00e9", "\x7f", "\x85", "\U0001f600", "x" * 256, "x" * 1024, "x" * 1025,
    "__metadata__", "layer.norm.weight", "w", *c.DTYPE_BITS,
)  # fmt: skip
# Bits of scales, values, starts and words at limits: F16, BF16 and F32 that are zero, small, large, infinite, NaN.
BITS = (
    0, 1, 0x3C00, 0x3F80, 0x7BFF, 0x7C00, 0x7C01, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0x8000, 0x8001, 0xBF80, 0xFC00,
    0xFF80, 0xFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x80000000,
    0xFF800000, 0xFFFFFFFF, 0x00800000, 0x007FFFFF,
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, max_size: int = MAX_LENGTH, plain: Plain | None = None) -> bytes:
    """Return a mutation of a file.

    Args:
        data: a delta file, or any other bytes.
        rng: where all choices come from.
        max_size: bytes of the result at most.
        plain: a mutator of bytes that knows nothing of the format; None for one that uses ``rng``.
    """
    if plain is None:

        def plain(held: bytes, largest: int) -> bytes:
            return mutate_bytes(held, largest, rng)

    parts = repair.split(data)
    try:
        changed = None if parts is None or rng.random() < 0.06 else changed_parts(data, parts, rng, plain)
    except MemoryError:  # of the harness's limit, which is for the reader
        changed = None
    if changed is None or len(changed) > max_size:
        return plain(data, max_size)
    return changed


def changed_parts(data: bytes, parts: Parts, rng: random.Random, plain: Plain) -> bytes | None:
    """Return a mutation of a file that could be taken apart; None if it cannot be put together again."""
    kind = rng.random()
    digests = rng.random() < 0.8
    if kind < 0.05:
        return mutate_ends(parts, rng)
    if kind < 0.09:
        return mutate_padding(data, parts, rng)
    if kind < 0.19:
        return mutate_index_bytes(data, rng, plain)
    if kind < 0.46:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            mutate_node(parts.index, rng)
        return repair.join(parts, places=rng.random() < 0.5, digests=digests)
    if kind < 0.70:
        for _ in range(rng.choice((1, 1, 1, 3))):
            mutate_section(parts, rng, plain)
    elif not mutate_tensor(parts, kind, rng):
        mutate_section(parts, rng, plain)
    return repair.join(parts, digests=digests)


def mutate_tensor(parts: Parts, kind: float, rng: random.Random) -> bool:
    """Give a tensor another layout, shape or exact part, or add one; return False if the file has no place for it."""
    if kind < 0.82:
        return tensors.refit(parts, rng)
    if kind < 0.92:
        return tensors.add_tensor(parts, rng) and (rng.random() < 0.8 or exact_parts.change_part(parts, rng))
    return exact_parts.change_part(parts, rng)


def cross(data: bytes, other: bytes, rng: random.Random, max_size: int = MAX_LENGTH) -> bytes:
    """Return ``data`` with a part of the other file's index in place of a part of its own."""
    parts, donor = repair.split(data), repair.split(other)
    if parts is None or donor is None or not parts.index:
        return data[:max_size]
    given, places = nodes(donor.index), nodes(parts.index)
    if rng.random() < 0.5:
        key = rng.choice(list(parts.index))
        parts.index[key] = donor.index.get(key)
        if key == "sections":
            parts.sections = donor.sections
    elif given and places:
        place, key = rng.choice(places)
        source, at = rng.choice(given)
        place[key] = copy.deepcopy(source[at])
    changed = repair.join(parts)
    return data[:max_size] if changed is None or len(changed) > max_size else changed


def mutate_bytes(data: bytes, max_size: int, rng: random.Random) -> bytes:
    """Return bytes with some of them changed, removed, repeated or added."""
    held = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        action, at = rng.random(), rng.randrange(len(held) + 1)
        if action < 0.45 and at < len(held):
            held[at] ^= 1 << rng.randrange(8)
        elif action < 0.65 and at < len(held):
            held[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action < 0.75:
            del held[at : at + rng.choice((1, 2, 4, 64))]
        elif action < 0.85:
            held[at:at] = rng.randbytes(rng.choice((1, 2, 4, 64)))
        elif action < 0.95:
            size = rng.choice((1, 4, 16, 256))
            start = rng.randrange(len(held) + 1)
            held[at : at + size] = held[start : start + size]
        else:
            del held[at:]
    return bytes(held[:max_size])


def mutate_ends(parts: Parts, rng: random.Random) -> bytes | None:
    """Change a field of the header or of the trailer; the checksums fit it."""
    if rng.random() < 0.5:
        field = rng.choice(("version", "size", "incompatible", "incompatible", "compatible", "reserved"))
        if field == "reserved":
            parts.header.reserved = one_bit(24, rng)
        else:
            largest = 2**32 if field in {"version", "size"} else 2**64
            number = 1 << rng.randrange(8) if rng.random() < 0.6 else rng.choice(NUMBERS) % largest
            setattr(parts.header, field, number)
        return repair.join(parts)
    whole = repair.join(parts)
    if whole is None:
        return None
    start = repair.index_start(whole)
    right = {"offset": start, "length": len(whole) - c.TRAILER_SIZE - start, "total": len(whole)}
    field = rng.choice(("offset", "length", "total", "reserved"))
    if field == "reserved":
        return repair.join(parts, trailer={field: one_bit(32, rng)})
    near = right[field] + rng.choice((-4096, -256, -1, 1, 256, 4096))
    return repair.join(parts, trailer={field: near if rng.random() < 0.7 and near > 0 else rng.choice(NUMBERS) % 2**64})


def one_bit(size: int, rng: random.Random) -> bytes:
    """Return zeros with one bit set."""
    return (1 << rng.randrange(8 * size)).to_bytes(size, "little")


def mutate_padding(data: bytes, parts: Parts, rng: random.Random) -> bytes | None:
    """Set a bit between sections or behind the header, or between the buffers of a section."""
    joined = repair.join(parts)
    if joined is None:
        return None
    gaps = [(c.HEADER_SIZE, c.SECTION_ALIGNMENT)]
    try:
        for row in parts.index["sections"]:
            end = row["offset"] + row["length"]
            gaps.append((end, c.align(end, c.SECTION_ALIGNMENT)))
    except repair.SHAPE_ERRORS:
        return None
    start, stop = rng.choice(gaps)
    if not start < stop <= len(data) or rng.random() < 0.3:
        if not parts.sections:
            return None
        number = rng.randrange(len(parts.sections))
        raw = parts.raw(number)
        free = unused_bytes(parts, number, len(raw or b""))
        if raw is None or not free:
            return None
        changed = bytearray(raw)
        changed[rng.choice(free)] ^= 1 << rng.randrange(8)
        parts.set_raw(number, bytes(changed))
        return repair.join(parts)
    held = bytearray(joined)
    held[rng.randrange(start, stop)] = 1 << rng.randrange(8)
    return bytes(held)


def unused_bytes(parts: Parts, number: int, length: int) -> list[int]:
    """Return the positions of the raw bytes of a section that no buffer has."""
    free = bytearray(b"\1") * length
    for ref in tensors.references(parts.index):
        if ref[0] == number and inside(ref, length):
            free[ref[1] : ref[1] + ref[2]] = bytes(ref[2])
    return [at for at, value in enumerate(free) if value]


def inside(ref: list[int], length: int) -> bool:
    """Tell whether a reference names some bytes of a section of this length."""
    return 0 <= ref[1] < ref[1] + ref[2] <= length


def mutate_index_bytes(data: bytes, rng: random.Random, plain: Plain) -> bytes:
    """Change bytes of the encoded index and seal the file again."""
    index = data[repair.index_start(data) : -c.TRAILER_SIZE]
    return repair.reseal_index(data, plain(index, len(index) + rng.choice((0, 8, 64))))


def nodes(obj: Any) -> list[tuple[Any, Any]]:
    """Return every place of a nested object as (map or list, key or position)."""
    return list(walk(obj))


def walk(obj: Any) -> Iterator[tuple[Any, Any]]:
    """Give every place of a nested object."""
    stack = [obj]
    while stack:
        held = stack.pop()
        items = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
        for key, value in items:
            yield held, key
            stack.append(value)


def mutate_node(index: Any, rng: random.Random) -> None:
    """Replace, drop, repeat or rename one node of a decoded index."""
    places = nodes(index)
    if not places:
        return
    held, key = rng.choice(places)
    action = rng.random()
    if action < 0.6:
        held[key] = another(held[key], rng)
    elif action < 0.7:
        del held[key]
    elif action < 0.8:
        source, at = rng.choice(places)
        if at in source if isinstance(source, dict) else at < len(source):
            held[key] = copy.deepcopy(source[at])
    elif isinstance(held, list):
        held.insert(key, held[key] if rng.random() < 0.5 else another(held[key], rng))
    else:
        held[rng.choice(WORDS)] = held[key] if rng.random() < 0.5 else held.pop(key)


def another(value: Any, rng: random.Random) -> Any:
    """Return another value of the same type, or rarely one of another type."""
    if rng.random() < 0.1:
        return rng.choice((None, True, 0, 1.5, "a", b"a", [], {}, [0, 0, 0]))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value + 1, value - 1, value * 2, value + 256, value // 2)
        return rng.choice(near) if rng.random() < 0.5 else rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(WORDS)
    if isinstance(value, bytes):
        return rng.randbytes(len(value) + rng.choice((0, 0, 0, -1, 1)) if value else 0)
    if isinstance(value, list) and all(type(item) is int for item in value):
        sizes = NUMBERS if rng.random() < 0.3 else tensors.SIZES
        return [rng.choice(sizes) for _ in range(rng.choice((0, 1, 2, 2, 3, 4, 9)))]
    return value


def mutate_section(parts: Parts, rng: random.Random, plain: Plain) -> None:
    """Change stored or raw bytes of a section."""
    if not parts.sections:
        return
    number = rng.randrange(len(parts.sections))
    stored, raw = parts.sections[number], parts.raw(number)
    action = rng.random()
    if raw and action < 0.75:
        held = [ref for ref in tensors.references(parts.index) if ref[0] == number and inside(ref, len(raw))]
        if held and action < 0.65:
            _, start, length = rng.choice(held)
            raw = raw[:start] + mutate_buffer(raw[start : start + length], rng) + raw[start + length :]
        else:
            raw = plain(raw, len(raw) + rng.choice((0, 1, 256)))
        parts.set_raw(number, raw)
    elif stored:
        parts.sections[number] = bytearray(plain(bytes(stored), len(stored) + rng.choice((0, 64))))


def mutate_buffer(data: bytes, rng: random.Random) -> bytes:
    """Return a buffer with some bits, bytes or numbers changed; its length stays."""
    held = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        action = rng.random()
        if action < 0.4:
            held[rng.randrange(len(held))] ^= 1 << rng.randrange(8)
        else:
            width = rng.choice([size for size in (1, 2, 4) if size <= len(held)])
            at = rng.randrange(len(held) // width) * width
            number = int.from_bytes(held[at : at + width], "little")
            number = rng.choice(BITS) if action < 0.7 else number + rng.choice((-1, 1, 2, 256))
            held[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(held)
