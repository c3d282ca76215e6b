"""Vectors of exact tensors and of files that are restored (sections 7.10 and 17) that a reader must accept."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
import zstandard
from blake3 import blake3
from vector_tools import Stored, WithBase, vector

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.container.writer import ContainerWriter
from deltafmt.exact import chunk as chunks
from deltafmt.exact.differences import Marks, Planes, planes_of, sorted_planes
from deltafmt.exact.prediction import converted, extended
from deltafmt.exact.units import Unit, Units, unit_count, unit_of
from deltafmt.format.constants import DTYPE_BITS, FEATURE_EXACT, SECTION_KIND_ATTACHMENTS, SECTION_KIND_EXACT
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.exact import ExactRef, FileRef

CHUNK = 256


def units(count: int, unit: Unit, salt: int, spread: int = 6) -> Units:
    """Return units that look random and need no generator to reproduce; floats have a few exponents."""
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    mixed ^= mixed >> np.uint64(29)
    found = (mixed >> np.uint64(64 - 8 * unit.width)).astype(unit.dtype)
    if unit.bits > 4:
        low = (1 << unit.bits - 1) - spread
        rest = ~unit.dtype.type((1 << unit.bits) - 1 << unit.shift)
        exponent = (low + np.arange(count) % spread).astype(unit.dtype) << unit.dtype.type(unit.shift)
        found = found & rest | exponent
    return found


def stepped(prediction: Units, every: int = 1) -> Units:
    """Return units near others: the larger the exponent, the smaller the steps."""
    values = prediction.copy()
    places = np.arange(0, prediction.size, every)
    step = (places * 7 % 11 - 5).astype(f"i{prediction.itemsize}").view(prediction.dtype)
    step[step == 0] = 1
    values[places] += step
    return values


# What zstd's own compressor makes has matches of many kinds, where this project's writer has hardly any.
PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=17,
    write_content_size=True,
    write_checksum=False,
)


def frame_of(data: bytes) -> bytes:
    """Return a zstd frame."""
    return zstandard.ZstdCompressor(compression_params=PARAMETERS).compress(data)


def planes_bytes(planes: Planes) -> bytes:
    """Return lengths and planes, in frames where that is shorter."""
    parts = []
    for plane in planes:
        data = plane.tobytes() if plane.any() else b""
        parts.append(min(data, frame_of(data), key=len) if data else data)
    return struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts)


def in_form(form: int, values: Units, prediction: Units, unit: Unit, marks: Marks | None = None) -> bytes:
    """Return a chunk in a form, whatever form is the smallest."""
    if form == chunks.STORED:
        return values.tobytes()
    if form == chunks.VALUES:
        return planes_bytes(planes_of(values, unit))
    if form == chunks.SPARSE:
        return chunks._sparse(values, prediction, np.flatnonzero(values != prediction), unit, marks).data
    if form == chunks.SORTED:
        return planes_bytes(sorted_planes(values, prediction, unit, unit, marks)[0])
    return b"" if form == chunks.SAME else planes_bytes(sorted_planes(values, prediction, unit, Unit(unit.width))[0])


def buffer_of(form: int, values: Units, prediction: Units, unit: Unit, marks: Marks | None = None) -> bytes:
    """Return the buffer of a tensor whose chunks all have one form."""
    data, rows = b"", b""
    for first in range(0, values.size, CHUNK):
        part = slice(first, first + CHUNK)
        made = in_form(form, values[part], prediction[part], unit, None if marks is None else marks[part])
        data += made
        rows += struct.pack("<QII", xxhash.xxh3_64_intdigest(values[part].tobytes()), len(made), form)
    return data + rows


def digest_of(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """Return the identity of a tensor."""
    digest = hasher(dtype, shape)
    digest.update(data)
    return digest.digest()


class Made:
    """Tensors that are written: their entries, and their base."""

    def __init__(self, features: int = FEATURE_EXACT) -> None:
        self.out = io.BytesIO()
        self.writer = ContainerWriter(self.out, features=features)
        self.entries: list[TensorEntry] = []
        self.base: dict[str, Stored] = {}

    def exact(
        self,
        name: str,
        buffer: bytes,
        values: Units,
        dtype: str,
        shape: tuple[int, ...],
        base: Stored | None,
    ) -> None:
        """Write an exact tensor."""
        reference = None if base is None else BaseRef(digest_of(*base), *base[:2])
        data = values.tobytes()
        ref = ExactRef(CHUNK, self.writer.add(buffer, SECTION_KIND_EXACT), digest_of(dtype, shape, data))
        self.entries.append(TensorEntry(name, "exact", dtype, shape, reference, exact=ref))
        if base is not None:
            self.base[name] = base

    def finish(self, **rest: Any) -> bytes:
        """Return the file."""
        self.writer.finish(self.entries, **rest)
        return self.out.getvalue()


def forms() -> Made:
    """Return one BF16 tensor for each form, of a whole chunk and a short one."""
    made, unit = Made(), unit_of("BF16")
    prediction = units(300, unit, 1)
    base = "BF16", (300,), prediction.tobytes()
    for form in chunks.FORMS:
        every = {chunks.SAME: 1000, chunks.SPARSE: 37}.get(form, 1)
        values = prediction if form == chunks.SAME else stepped(prediction, every)
        made.exact(f"form{form}", buffer_of(form, values, prediction, unit), values, "BF16", (300,), base)
    return made


def dtypes() -> Made:
    """Return a tensor of each dtype, sorted."""
    made = Made()
    for number, dtype in enumerate(sorted(DTYPE_BITS)):
        unit, shape = unit_of(dtype), (2, 40)
        prediction = units(unit_count(dtype, shape), unit, number)
        values = stepped(prediction)
        base = dtype, shape, prediction.tobytes()
        made.exact(dtype, buffer_of(chunks.SORTED, values, prediction, unit), values, dtype, shape, base)
    return made


def predictions() -> Made:
    """Return tensors whose prediction is not simply the base's bytes."""
    made = Made()
    for base_dtype, dtype in (("F32", "BF16"), ("F32", "F16"), ("BF16", "F32"), ("F16", "BF16"), ("BF16", "BF16")):
        known = units(40, unit_of(base_dtype), 5)
        known[:4] = [0, 1, (1 << 8 * known.itemsize) - 1, 1 << 8 * known.itemsize - 1]  # zero, subnormal, NaN, -0
        prediction = extended(converted(known, base_dtype, dtype), 50)
        values = stepped(prediction)
        base = base_dtype, (4, 10), known.tobytes()
        buffer = buffer_of(chunks.SORTED, values, prediction, unit_of(dtype))
        made.exact(f"{base_dtype}-{dtype}", buffer, values, dtype, (5, 10), base)
    unit = unit_of("F16")
    alone, shorter = units(20, unit, 9), units(30, unit, 11)
    made.exact("alone", buffer_of(chunks.VALUES, alone, alone * 0, unit), alone, "F16", (20,), None)
    fewer = stepped(shorter[:20])
    buffer = buffer_of(chunks.SORTED, fewer, shorter[:20], unit)
    made.exact("fewer", buffer, fewer, "F16", (2, 10), ("F16", (3, 10), shorter.tobytes()))
    made.exact("none", b"", alone[:0], "F16", (0, 7), None)
    return made


def head_of(*tensors: tuple[str, str, tuple[int, ...], int]) -> bytes:
    """Return the head of a weight file with these tensors, one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"data_offsets": [position, position + size], "dtype": dtype, "shape": list(shape)}
        position += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def with_files(heads: Mapping[str, bytes] | None = None, names: tuple[str, ...] = ("one", "sub/two")) -> bytes:
    """Return a file that restores two weight files, one of them in a folder, and an index."""
    made, unit = Made(), unit_of("U8")
    values = units(8, unit, 3)
    for name in names:
        made.exact(name, buffer_of(chunks.STORED, values, values, unit), values, "U8", (8,), None)
    usual = {
        "model.safetensors": head_of(("one", "U8", (8,), 8)),
        "model.safetensors.index.json": b"{}\n",
        "sub/x.safetensors": head_of(("two", "U8", (8,), 8)),
    }
    files = {}
    for name, head in sorted((usual if heads is None else heads).items()):
        whole = head + (values.tobytes() if name.endswith("s") else b"")
        files[name] = FileRef(blake3(whole).digest(), made.writer.add(head, SECTION_KIND_ATTACHMENTS))
    return made.finish(files=files)


@vector("ok", "an exact tensor for each form of a chunk; chunks of 256 and of 44 units; feature bit 3")
def exact_forms() -> WithBase:
    made = forms()
    return WithBase(made.finish(), made.base)


@vector("ok", "a sorted exact tensor for each dtype; feature bit 3")
def exact_dtypes() -> WithBase:
    made = dtypes()
    return WithBase(made.finish(), made.base)


@vector("ok", "exact tensors whose base has another dtype, fewer or more rows, or is not there; one without elements")
def exact_predictions() -> WithBase:
    made = predictions()
    return WithBase(made.finish(), made.base)


@vector("ok", "two weight files, one in a folder, and an index are restored; feature bit 3")
def restored_files() -> bytes:
    return with_files()
