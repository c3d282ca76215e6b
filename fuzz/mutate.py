"""Mutations that know the format: they change index bytes, the decoded index or section bytes, or add a new tensor.

Each mutation takes a valid or broken file and returns another one, sealed so that the reader gets past the checksums.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import repair
from repair import Parts

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.registry import LAYOUTS, parse_layout

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"

Mutate = Callable[[bytes, int], bytes]

NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 257, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 2**40, 2**48, 2**48 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -128, -(2**63),
)  # fmt: skip
WORDS = (
    "", "a", "same", "replace", "add", "alias", "exact", "hot", "cold", "midtread",
    "midrise", "asymmetric", "row", "column", *LAYOUTS, *ENCODINGS,
    "codes", "index", "scales", "data", "terms", "target", "\0", "../up", "a/b", "\u20ac", "x" * 1025,
    "layer.norm.weight", "w", *c.DTYPE_BITS,
)  # fmt: skip
SIZES = (0, 0, 1, 1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 100, 300)
GROUPS = (0, 0, 1, 2, 3, 7, 64, 1000, 2**31 - 1)
HUGE = (2**20, 2**31, 2**40, 2**48, 2**62, 2**63 - 1)
LARGEST_BUFFERS = 12_000


def mutate(data: bytes, max_size: int, seed: int, plain: Mutate) -> bytes:
    """Return a mutation of at most ``max_size`` bytes; ``plain`` is the fuzzer's own mutator of bytes."""
    rng = random.Random(seed)
    parts = repair.split(data)
    changed: bytes | None = None
    kind = rng.random()
    if parts is None or kind < 0.08:
        changed = plain(data, max_size)
    elif kind < 0.2:
        changed = mutate_index_bytes(data, rng, plain)
    elif kind < 0.5:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            mutate_node(parts.index, rng)
        changed = repair.join(parts, mend=rng.random() < 0.5)
    elif kind < 0.75:
        mutate_section(parts, rng, plain)
        changed = repair.join(parts)
    else:
        add_tensor(parts, rng, plain)
        changed = repair.join(parts)
    if changed is not None and parts is not None and rng.random() < 0.7:
        changed = repair.mend_digests(changed)
    if changed is None or len(changed) > max_size:
        return plain(data, max_size)
    return changed


def cross(data: bytes, other: bytes, max_size: int, seed: int) -> bytes:
    """Return ``data`` with a part of the other file's index in place of a part of its own."""
    rng = random.Random(seed)
    parts, donor = repair.split(data), repair.split(other)
    if parts is None or donor is None:
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
    if changed is None or len(changed) > max_size:
        return data[:max_size]
    return repair.mend_digests(changed)


def mutate_index_bytes(data: bytes, rng: random.Random, plain: Mutate) -> bytes:
    """Change bytes of the encoded index and seal the file again."""
    start = int.from_bytes(data[-c.TRAILER_SIZE : -c.TRAILER_SIZE + 8], "little")
    index = data[start : -c.TRAILER_SIZE]
    return repair.reseal_index(data, plain(index, len(index) + rng.choice((0, 8, 64))))


def nodes(obj: Any) -> list[tuple[Any, Any]]:
    """Return every place of a nested object as (map or list, key or position)."""
    found: list[tuple[Any, Any]] = []
    stack = [obj]
    while stack:
        held = stack.pop()
        items = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
        for key, value in items:
            found.append((held, key))
            stack.append(value)
    return found


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
        return [rng.choice(NUMBERS if rng.random() < 0.3 else SIZES) for _ in range(rng.choice((0, 1, 2, 2, 3, 4, 9)))]
    return value


def mutate_section(parts: Parts, rng: random.Random, plain: Mutate) -> None:
    """Change stored bytes of a section."""
    if not parts.sections:
        return
    number = rng.randrange(len(parts.sections))
    stored = parts.sections[number]
    if not stored:
        return
    action = rng.random()
    if action < 0.5:
        for _ in range(rng.choice((1, 1, 2, 8))):
            stored[rng.randrange(len(stored))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    else:
        length = len(stored) if action < 0.8 else len(stored) + 64
        parts.sections[number] = bytearray(plain(bytes(stored), length))


@functools.cache
def known_layouts() -> list[dict[str, Any]]:
    """Return the layouts of the test vectors. Every kind has some, so a new kind is fuzzed once it has a vector."""
    found: list[dict[str, Any]] = []
    for path in sorted(VECTORS.glob("*.vec")):
        head, _, body = path.read_bytes().partition(b"\n\n")
        if head.startswith(b"expect: ok"):
            parts = repair.split(zlib.decompress(body))
            assert parts is not None
            found += [layout for layout in parts.index["layouts"] if layout not in found]
    return found


def random_layout(rng: random.Random) -> TermLayout:
    """Return any layout that the specification allows: one of a vector, some of its parameters changed."""
    while True:
        obj = copy.deepcopy(rng.choice(known_layouts()))
        for held, key in nodes(obj):
            if key != "kind" and rng.random() < 0.4:
                held[key] = other_parameter(key, held[key], rng)
        with contextlib.suppress(InvalidFileError):
            return parse_layout(obj, "layouts[0]")


def other_parameter(key: str, value: Any, rng: random.Random) -> Any:
    """Return a value that a parameter of this name has in a layout of a vector, or another number."""
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice((value + 1, max(value - 1, 0), rng.randrange(1, 9), rng.randrange(1, 256), *GROUPS))
    held = rng.choice([(held, at) for layout in known_layouts() for held, at in nodes(layout) if at == key])
    return copy.deepcopy(held[0][held[1]])


def random_shape(rng: random.Random) -> list[int]:
    """Return a small shape, or one with a size of zero beside sizes that are enormous."""
    shape = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    if 0 in shape and rng.random() < 0.5:
        shape = [rng.choice(HUGE) if size and rng.random() < 0.7 else size for size in shape]
    return shape


def add_tensor(parts: Parts, rng: random.Random, plain: Mutate) -> None:
    """Add a tensor of any layout and shape, in a section of its own, with buffers of the right lengths."""
    try:
        if len(parts.sections) > 3:
            parts.sections.clear()
            for key in ("attachments", "tensors"):
                parts.index[key] = {}
            parts.index["sections"] = []
        tensors, table, layouts = (parts.index[key] for key in ("tensors", "sections", "layouts"))
        shape = random_shape(rng)
        base = list(shape)
        if len(shape) > 1 and rng.random() < 0.3:
            base[0] = rng.choice(SIZES)
        dtype = rng.choice(c.DELTA_DTYPES)
        name = f"t{rng.randrange(8)}"
        if rng.random() < 0.15:
            reference = {"digest": bytes(32), "dtype": dtype, "shape": shape}
            tensors[name] = {"action": "same", "base": reference, "dtype": dtype, "shape": list(shape)}
            return
        rows, delta_rows = c.row_count(tuple(shape)), min(c.row_count(tuple(shape)), c.row_count(tuple(base)))
        raw, terms, number = bytearray(), [], len(table)

        def buffer(length: int) -> list[int]:
            if len(raw) + length > LARGEST_BUFFERS:
                raise OverflowError
            raw.extend(bytes(-len(raw) % c.BUFFER_ALIGNMENT))
            start = len(raw)
            raw.extend(rng.randbytes(length) if rng.random() < 0.3 else bytes(length))
            return [number, start, length]

        for _ in range(rng.choice((1, 1, 1, 2))):
            layout = random_layout(rng)
            obj = layout.to_obj()
            if obj not in layouts:
                layouts.append(obj)
            slots = rng.choice(SIZES) if layout.has_slots else 0
            lengths = layout.buffer_lengths(delta_rows, shape[-1], slots)
            terms.append(
                {
                    "buffers": {name: buffer(length) for name, length in lengths.items()},
                    "layout": layouts.index(obj),
                    "seed": rng.randrange(2**32) if layout.seeded else 0,
                    **({"slots": slots} if layout.has_slots else {}),
                }
            )
        entry = {
            "action": "add",
            "base": {"digest": bytes(32), "dtype": rng.choice(c.DELTA_DTYPES), "shape": base},
            "digest": bytes(32),
            "dtype": dtype,
            "shape": shape,
            "terms": terms,
        }
        new_bytes = (rows - delta_rows) * c.byte_count(dtype, tuple(shape[-1:]))
        if new_bytes:
            entry["data"] = buffer(new_bytes)
        if any(term["buffers"].get("index") for term in terms) and parts.index["profile"] == "hot":
            parts.index["profile"] = rng.choice(("hot", "cold"))
        stored = rng.random() < 0.6 or parts.index["profile"] == "hot"
        codec = c.CODEC_STORED if stored else c.CODEC_ZSTD
        table.append({
            "checksum": bytes(16), "codec": codec, "kind": c.SECTION_KIND_TENSORS, "length": 0, "offset": 0,
            "raw_length": len(raw),
        })  # fmt: skip
        parts.sections.append(raw if stored else repair.compress(bytes(raw)))
        tensors[name] = entry
    except (OverflowError, TypeError, KeyError, AttributeError, UsageError):
        mutate_section(parts, rng, plain)
