"""Reads one file with both readers, the library and spec/reader, and compares what they say.

Both must open, refuse or call unsupported the same files. Where a file verifies, the content id, every delta and every
fine-tuned tensor over a made-up base must be the same bytes. Of a file that does not verify, each may read the tensors
that it can.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import xxhash
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

import deltafmt
from c_reader import TOO_LARGE, Driver, Report, Tensor
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.safetensors_file import Tensor as SafetensorsTensor
from deltafmt.delta import DeltaFile, RunDecoder
from deltafmt.errors import DeltafmtError, InvalidFileError, UnsupportedError
from deltafmt.exact.chunk import decode as decode_chunk
from deltafmt.exact.coding import ExactDecoder
from deltafmt.exact.prediction import converted, extended, units_at
from deltafmt.format.constants import byte_count, element_count
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.exact_parts import ExactPart
from deltafmt.pipeline.verify import verify

LIMITS = deltafmt.Limits(max_output=1 << 24)
MOST_ELEMENTS, MOST_WORK = 1 << 18, 1 << 22
NOTHING = bytes(32)
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}


def made_up(length: int) -> NDArray[np.uint8]:
    """Return the bytes of a base, those that ``driver.c`` makes."""
    return (np.arange(length, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(15)).astype(np.uint8)


def status_of(error: DeltafmtError) -> str:
    """Return the word for an error that ``c_reader.STATUS`` has."""
    if isinstance(error, UnsupportedError):
        return "unsupported"
    return "limit" if "raises the limit" in str(error) else "invalid"


def with_library(path: Path) -> tuple[Report, list[str]]:
    """Return the library's report on a file, and the names of its tensors."""
    try:
        delta = deltafmt.open(path, limits=LIMITS)
    except DeltafmtError as error:
        return Report(status_of(error), status_of(error), str(error), b"", ()), []
    with delta:
        verified, message = "ok", ""
        try:
            verify(path, limits=LIMITS)
        except DeltafmtError as error:
            verified, message = status_of(error), str(error)
        names = list(delta)
        content_id = bytes.fromhex(delta.container.content_id.hex())
        return Report("ok", verified, message, content_id, tuple(tensor_of(delta, name) for name in names)), names


def tensor_of(delta: DeltaFile, name: str) -> Tensor:
    """Read one tensor as ``driver.c`` does."""
    try:
        entry = delta.container.entry(name)
        if entry.action == "alias":
            delta.resolve(name)
        if entry.action == "replace":
            (data,) = delta.buffers(name).values()
            return Tensor(0, blake3(np.ascontiguousarray(data).tobytes()).digest(), NOTHING)
        if entry.action == "exact":
            return restored(delta, entry)
        if entry.action != "add":
            return Tensor(0, NOTHING, NOTHING)
        shared = entry.delta_rows * entry.columns
        work = shared + sum(shared * getattr(term.layout, "rank", 0) for term in entry.terms)
        if max(shared, entry.rows * entry.columns) > MOST_ELEMENTS or work > MOST_WORK:
            return Tensor(TOO_LARGE, NOTHING, NOTHING)
        return decoded(delta, name)
    except DeltafmtError as error:
        return Tensor({"invalid": 1, "unsupported": 2, "limit": 3}[status_of(error)], NOTHING, NOTHING)


def decoded(delta: DeltaFile, name: str) -> Tensor:
    """Decode a tensor, and add it to a made-up base, in the runs of rows that the library takes."""
    entry = delta.container.entry(name)
    assert entry.base is not None
    decoder = RunDecoder(delta, entry)
    width = WIDTHS[entry.base.dtype]
    base = made_up(entry.delta_rows * entry.columns * width).view(f"u{width}").reshape(-1, entry.columns)
    change, tuned = [], []
    for start, stop in decoder.ranges():
        rows = np.array(decoder.rows(start, stop), np.float32)
        rows.view(np.uint32)[np.isnan(rows)] = 0x7FC00000  # the bits of a NaN in a delta are not specified
        change.append(rows.tobytes())
        added = decoder.add(start, stop, base[start:stop], entry.base.dtype, entry.dtype)
        tuned.append(np.ascontiguousarray(added).tobytes())
    if entry.data is not None:
        tuned.append(np.ascontiguousarray(delta.container.buffer(entry.data)).tobytes())
    if entry.exact is not None:
        tuned.append(restored_part(delta, entry, base))
    return Tensor(0, blake3(b"".join(change)).digest(), blake3(b"".join(tuned)).digest())


@dataclass(frozen=True)
class MadeUp:
    """A base tensor in memory, as :class:`~deltafmt.pipeline.exact_parts.ExactPart` reads one."""

    dtype: str
    rows: NDArray[np.unsignedinteger]

    @contextlib.contextmanager
    def row_range(self, start: int, stop: int) -> Iterator[NDArray[np.unsignedinteger]]:
        """Give rows, as a tensor of a checkpoint does."""
        yield self.rows[start:stop]


def restored_part(delta: DeltaFile, entry: TensorEntry, base: NDArray[np.unsignedinteger]) -> bytes:
    """Restore a tensor from its exact part; where a chunk does not fit this base, the rest is the prediction."""
    assert entry.exact is not None
    assert entry.base is not None
    part = ExactPart(delta, entry, cast("SafetensorsTensor", MadeUp(entry.base.dtype, base)), entry.exact.factors)
    units, marks = part.predicted(0, entry.rows * entry.columns)
    with contextlib.suppress(InvalidFileError):
        decoder = ExactDecoder(delta.container.buffer(entry.exact.data), entry.dtype, entry.shape, entry.exact.chunk)
        for number in range(len(decoder)):
            (first, end), (checksum, form, data) = decoder.span(number), decoder.stored(number)
            found = decode_chunk(form, data, units[first:end].copy(), decoder.unit, marks[first:end])
            units[first:end] = found
            if xxhash.xxh3_64_intdigest(found.tobytes()) != checksum:
                break
    return units.tobytes()


def restored(delta: DeltaFile, entry: TensorEntry) -> Tensor:
    """Restore an exact tensor over a made-up base; of one that is refused for it, the second digest is zeros."""
    assert entry.exact is not None
    base = entry.base
    if max(element_count(entry.shape), element_count(base.shape) if base else 0) > MOST_ELEMENTS:
        return Tensor(TOO_LARGE, NOTHING, NOTHING)
    buffer = delta.container.buffer(entry.exact.data)
    stored = blake3(buffer).digest()
    decoder = ExactDecoder(buffer, entry.dtype, entry.shape, entry.exact.chunk)
    given = units_at(made_up(byte_count(base.dtype, base.shape)).data, base.dtype) if base else None
    digest, out = hasher(entry.dtype, entry.shape), b""
    try:
        for number in range(len(decoder)):
            first, end = decoder.span(number)
            known = units_at(memoryview(b""), entry.dtype)
            if given is not None and base is not None:
                known = converted(given[first:end], base.dtype, entry.dtype)
            out += decoder.decode(number, extended(known, end - first)).tobytes()
    except InvalidFileError:
        return Tensor(0, stored, NOTHING)
    digest.update(out)
    return Tensor(0, stored, blake3(out).digest() if digest.digest() == entry.exact.digest else NOTHING)


def zstd_differs(data: bytes) -> bool:
    """Tell whether the second reader's libzstd and Python's disagree on a frame of a file.

    Versions of zstd do not all refuse the same damaged frames, nor decode them to the same bytes. Checksums tell then
    (sections 5.3 and 17.4).
    """
    system = ctypes.CDLL("libzstd.so.1")
    for name in ("ZSTD_decompress", "ZSTD_findFrameCompressedSize"):
        getattr(system, name).restype = ctypes.c_size_t
    for found in re.finditer(re.escape(zstandard.FRAME_HEADER), data):
        frame = data[found.start() :]
        size = system.ZSTD_findFrameCompressedSize(frame, ctypes.c_size_t(len(frame)))
        mine = None
        with contextlib.suppress(zstandard.ZstdError):
            mine = zstandard.ZstdDecompressor().decompress(frame[:size], max_output_size=1 << 20)
        out = ctypes.create_string_buffer(1 << 20)
        length = system.ZSTD_decompress(out, ctypes.c_size_t(len(out)), frame, ctypes.c_size_t(min(size, len(frame))))
        if (out.raw[:length] if length <= len(out) else None) != mine:
            return True
    return False


@dataclass(frozen=True)
class Comparison:
    """What both readers found: the word for the file, and where they differ; an empty text where they agree."""

    verified: str
    difference: str


def compare(data: bytes, driver: Driver, scratch: Path) -> Comparison:
    """Read a file with both readers.

    Args:
        data: the file's bytes.
        driver: the running second reader.
        scratch: a path that this function may write.
    """
    scratch.write_bytes(data)
    theirs, names = with_library(scratch)
    mine = driver.read(data)
    said = f" (library: {theirs.message!r}, second reader: {mine.message!r})"
    if "limit" in {theirs.verified, mine.verified}:
        return Comparison("limit", "")
    for what in ("opened", "verified"):
        if getattr(theirs, what) != getattr(mine, what) and not zstd_differs(data):
            return Comparison(mine.verified, f"{what}: {getattr(theirs, what)} and {getattr(mine, what)}{said}")
    if theirs.content_id != mine.content_id:
        return Comparison(mine.verified, f"content id: {theirs.content_id.hex()} and {mine.content_id.hex()}")
    for name, one, other in zip(names, theirs.tensors, mine.tensors, strict=True):
        if mine.verified == "ok" and one != other and not zstd_differs(data):
            return Comparison(mine.verified, f"{name!r}: {one} and {other}")
        if other.status not in {0, 1, TOO_LARGE}:
            return Comparison(mine.verified, f"{name!r}: reading ended with status {other.status}{said}")
    return Comparison(mine.verified, "")
