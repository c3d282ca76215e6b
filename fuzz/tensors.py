"""Mutations of tensors: a new one of any layout and shape, or another layout or shape for one that a file has."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import repair
from repair import Parts

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.registry import parse_layout

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"

SIZES = (0, 0, 1, 1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 100, 300)
GROUPS = (0, 0, 1, 2, 3, 7, 64, 1000, 2**31 - 1)
HUGE = (2**20, 2**31, 2**40, 2**48, 2**62, 2**63 - 1)
LARGEST_BUFFERS = 12_000
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
# Bits of scales that are right in every dtype: 1, a half, zero, a small one.
SCALES = {"BF16": (0x3F80, 0x3F00, 0, 0x0080), "F16": (0x3C00, 0x3800, 0, 1), "F32": (0x3F800000, 0x3F000000, 0, 1)}


def references(index: Any) -> list[list[int]]:
    """Return every reference to a buffer: lists of section, offset and length, which may be changed."""
    return [ref for ref in found_references(index) if isinstance(ref, list) and [type(x) for x in ref] == [int] * 3]


def found_references(index: Any) -> Iterator[Any]:
    """Give whatever stands where references stand."""
    for key in ("tensors", "attachments", "files"):
        entries = index.get(key) if isinstance(index, dict) else None
        for entry in entries.values() if isinstance(entries, dict) else ():
            if isinstance(entry, dict):
                yield entry.get("data") or entry.get("head")
                exact = entry.get("exact")
                yield exact.get("data") if isinstance(exact, dict) else None
                terms = entry.get("terms")
                for term in terms if isinstance(terms, list) else ():
                    buffers = term.get("buffers") if isinstance(term, dict) else None
                    yield from buffers.values() if isinstance(buffers, dict) else ()


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


@functools.cache
def known_parameters() -> dict[Any, list[Any]]:
    """Return the values that each parameter has in the layouts of the vectors."""
    found: dict[Any, list[Any]] = {}
    for held, key in places(known_layouts()):
        found.setdefault(key, []).append(held[key])
    return found


def places(obj: Any) -> list[tuple[Any, Any]]:
    """Return the places of all parameters in layouts."""
    items = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else ()
    return [place for key, value in list(items) for place in ((obj, key), *places(value))]


def random_layout(rng: random.Random, start: Any = None) -> TermLayout:
    """Return any layout that the specification allows: one of a vector, or ``start``, with some other parameters."""
    for attempt in itertools.count():
        # No change makes some layouts right: those with a key too many. Then any other is as good.
        obj = copy.deepcopy(start if start is not None and attempt < 20 else rng.choice(known_layouts()))
        for held, key in places(obj):
            if key != "kind" and rng.random() < 0.4:
                held[key] = other_parameter(key, held[key], rng)
        with contextlib.suppress(InvalidFileError):
            return parse_layout(obj, "layouts[0]")
    raise AssertionError("the loop has no end")


def other_parameter(key: str, value: Any, rng: random.Random) -> Any:
    """Return a value that a parameter of this name has in a layout of a vector, or another number."""
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice((value + 1, max(value - 1, 0), rng.randrange(1, 9), rng.randrange(1, 256), *GROUPS))
    return copy.deepcopy(rng.choice(known_parameters()[key]))


def random_shape(rng: random.Random) -> list[int]:
    """Return a small shape, or one with a size of zero beside sizes that are enormous."""
    shape = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    if 0 in shape and rng.random() < 0.5:
        shape = [rng.choice(HUGE) if size and rng.random() < 0.7 else size for size in shape]
    return shape


def filling(name: str, length: int, layout: TermLayout, rng: random.Random) -> bytes:
    """Return bytes for a new buffer: zeros, or bytes that may be right there."""
    kind = rng.random()
    if kind < 0.3:
        return bytes(length)
    if "scales" in name and kind < 0.9:
        dtype = getattr(layout, "scale_dtype", None) or getattr(getattr(layout, "coding", None), "scale_dtype", "BF16")
        form = "I" if dtype == "F32" else "H"
        numbers = [rng.choice(SCALES.get(dtype, SCALES["BF16"])) for _ in range(length // struct.calcsize(form))]
        return struct.pack(f"<{len(numbers)}{form}", *numbers).ljust(length, b"\0")
    return rng.randbytes(length)


class NewSection:
    """The raw bytes of a section that is being made."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.raw = bytearray()

    def add(self, data: bytes) -> list[int]:
        """Add a buffer and return the reference to it."""
        if len(self.raw) + len(data) > LARGEST_BUFFERS:
            raise OverflowError
        self.raw.extend(bytes(-len(self.raw) % c.BUFFER_ALIGNMENT))
        start = len(self.raw)
        self.raw.extend(data)
        return [self.number, start, len(data)]


def add_tensor(parts: Parts, rng: random.Random) -> bool:
    """Add a tensor of any layout and shape, in a section of its own, with buffers of the right lengths.

    Returns:
        False if the file has no place for one, or the buffers would be large.
    """
    try:
        if len(parts.sections) > 3:
            parts.sections.clear()
            for key in ("attachments", "tensors"):
                parts.index[key] = {}
            parts.index["sections"] = []
        held, table = parts.index["tensors"], parts.index["sections"]
        shape = random_shape(rng)
        base = list(shape)
        if len(shape) > 1 and rng.random() < 0.3:
            base[0] = rng.choice(SIZES)
        dtype = rng.choice(c.DELTA_DTYPES)
        name = f"t{rng.randrange(8)}"
        if rng.random() < 0.15:
            reference = {"digest": bytes(32), "dtype": dtype, "shape": shape}
            held[name] = {"action": "same", "base": reference, "dtype": dtype, "shape": list(shape)}
            return True
        # Behind all others, but before what tensors must lie before (5.7, 5.8).
        behind = (at for at, row in enumerate(table) if row["kind"] in (c.SECTION_KIND_EXACT, c.SECTION_KIND_SERVED))
        section = NewSection(next(behind, len(table)))
        leading = rng.randrange(1, len(shape) - 1) if len(shape) > 2 and rng.random() < 0.3 else None
        rows, columns = c.row_count(tuple(shape), leading), c.column_count(tuple(shape), leading)
        delta_rows = min(rows, c.row_count(tuple(base), leading))
        terms = [
            new_term(parts.index["layouts"], (delta_rows, columns), section, rng)
            for _ in range(rng.choice((1, 1, 1, 2)))
        ]
        entry = {
            "action": "add",
            "base": {"digest": bytes(32), "dtype": rng.choice(c.DELTA_DTYPES), "shape": base},
            "digest": bytes(32),
            "dtype": dtype,
            "shape": shape,
            "terms": terms,
        }
        if leading is not None:
            entry["leading"] = leading
            parts.header.incompatible |= c.FEATURE_LEADING
        new_bytes = (rows - delta_rows) * c.byte_count(dtype, (columns,))
        if new_bytes:
            if len(section.raw) + new_bytes > LARGEST_BUFFERS:
                return False
            entry["data"] = section.add(bytes(new_bytes) if rng.random() < 0.7 else rng.randbytes(new_bytes))
        if any(term["buffers"].get("index") for term in terms) and parts.index["profile"] == "hot":
            parts.index["profile"] = rng.choice(("hot", "cold"))
        stored = rng.random() < 0.6 or parts.index["profile"] == "hot"
        codec = c.CODEC_STORED if stored else c.CODEC_ZSTD
        data = section.raw if stored else repair.compress(bytes(section.raw))
        insert_section(parts, section.number, c.SECTION_KIND_TENSORS, data, codec)
        table[section.number]["raw_length"] = len(section.raw)
        held[name] = entry
    except (OverflowError, TypeError, KeyError, AttributeError, UsageError, ValueError):
        return False
    return True


def insert_section(parts: Parts, number: int, kind: int, stored: bytes, codec: int = c.CODEC_STORED) -> None:
    """Insert a section; buffers in the sections behind it move along."""
    for ref in references(parts.index):
        ref[0] += ref[0] >= number
    parts.sections.insert(number, bytearray(stored))
    parts.index["sections"].insert(number, {
        "checksum": bytes(16), "codec": codec, "kind": kind, "length": 0, "offset": 0, "raw_length": len(stored),
    })  # fmt: skip


def new_term(layouts: list[Any], shape: tuple[int, int], section: NewSection, rng: random.Random) -> dict[str, Any]:
    """Return a term of a random layout, which joins the layout table; its buffers join the section."""
    layout = random_layout(rng)
    obj = layout.to_obj()
    if obj not in layouts:
        layouts.append(obj)
    slots = rng.choice(SIZES) if layout.has_slots else 0
    lengths = layout.buffer_lengths(*shape, slots)
    if sum(lengths.values()) > LARGEST_BUFFERS:
        raise OverflowError
    return {
        "buffers": {name: section.add(filling(name, length, layout, rng)) for name, length in lengths.items()},
        "layout": layouts.index(obj),
        "seed": rng.randrange(2**32) if layout.seeded else 0,
        **({"slots": slots} if layout.has_slots else {}),
    }


def refit(parts: Parts, rng: random.Random) -> bool:
    """Give a tensor another layout or shape, and its buffers the lengths that fit; their bytes stay as far as they go.

    Returns:
        False if the file has no tensor with terms, or the buffers would be large.
    """
    try:
        index = parts.index
        entry = rng.choice([entry for entry in index["tensors"].values() if entry.get("terms")])
        term = rng.choice(entry["terms"])
        if rng.random() < 0.6:
            layout = random_layout(rng, index["layouts"][term["layout"]])
            obj = layout.to_obj()
            if obj not in index["layouts"]:
                index["layouts"].append(obj)
            term["layout"] = index["layouts"].index(obj)
            if not layout.seeded:
                term["seed"] = 0
        else:
            shape = list(entry["shape"])
            at = rng.randrange(len(shape))
            shape[at] = rng.choice((shape[at] + 1, max(shape[at] - 1, 0), rng.choice(SIZES)))
            entry["shape"] = shape
            if at or rng.random() < 0.5:
                entry["base"]["shape"] = list(shape)
        lengths: dict[int, int] = {}
        leading = entry.get("leading")
        both = tuple(entry["shape"]), tuple(entry["base"]["shape"])
        rows = [c.row_count(shape, leading) for shape in both]
        columns = c.column_count(both[0], leading)
        for held in entry["terms"]:
            layout = parse_layout(index["layouts"][held["layout"]], "")
            wanted = layout.buffer_lengths(min(rows), columns, held.get("slots", 0))
            if sum(wanted.values()) > LARGEST_BUFFERS:
                return False
            old = held["buffers"]
            number = next(iter(old.values()))[0]
            held["buffers"] = {name: list(old.get(name, (number, 0, 0))) for name in wanted}
            lengths.update({id(held["buffers"][name]): length for name, length in wanted.items()})
        new_bytes = (rows[0] - min(rows)) * c.byte_count(entry["dtype"], (columns,))
        if new_bytes:
            entry["data"] = list(entry.get("data") or (next(iter(entry["terms"][0]["buffers"].values()))[0], 0, 0))
            lengths[id(entry["data"])] = new_bytes
        else:
            entry.pop("data", None)
        return lay_out(parts, next(iter(entry["terms"][0]["buffers"].values()))[0], lengths)
    except (*repair.SHAPE_ERRORS, UsageError, InvalidFileError, StopIteration):
        return False


def lay_out(parts: Parts, number: int, lengths: dict[int, int]) -> bool:
    """Lay the buffers of a section one behind the other, some of them with other lengths (by the references' ids)."""
    raw = parts.raw(number)
    refs = [ref for ref in references(parts.index) if ref[0] == number]
    # An earlier mutation may have left any number as a length.
    if raw is None or sum(lengths.get(id(ref), ref[2]) for ref in refs) > LARGEST_BUFFERS:
        return False
    held = bytearray()
    for ref in sorted(refs, key=lambda ref: ref[1:]):
        length = lengths.get(id(ref), ref[2])
        data = raw[ref[1] : ref[1] + min(ref[2], length)].ljust(length, b"\0")
        held.extend(bytes(-len(held) % c.BUFFER_ALIGNMENT))
        ref[1:] = [len(held), length]
        held.extend(data)
    parts.set_raw(number, bytes(held))
    return True
