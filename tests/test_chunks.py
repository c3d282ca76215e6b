"""Compressed sections: any range of chunks is read, and chunks that break the rules are refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.container.chunks import ChunkCompressor, ChunkReader
from deltafmt.errors import InvalidFileError
from deltafmt.format import constants as c
from strategies import examples, generators


def chunked(data: bytes) -> bytes:
    """Compress bytes into frames and their table."""
    compressor = ChunkCompressor()
    return b"".join([*compressor.feed(data), *compressor.finish()])


def table(*frames: bytes) -> bytes:
    """Put frames and their table together."""
    return b"".join(frames) + struct.pack(f"<{len(frames)}I", *map(len, frames))


def compress(data: bytes, **options: Any) -> bytes:
    """Make one zstd frame."""
    return zstandard.ZstdCompressor(level=3, **options).compress(data)


@examples(25)
@given(generators(), st.integers(0, 3 * c.ZSTD_CHUNK), st.integers(1, 256))
def test_any_range_of_chunks_is_read(rng: np.random.Generator, size: int, alphabet: int) -> None:
    data = rng.integers(0, alphabet, size, np.uint8).tobytes()
    reader = ChunkReader(memoryview(chunked(data)), size, "section 3")
    assert reader.read(0, size) == data
    for _ in range(5):
        start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
        assert reader.read(start, stop - start) == data[start:stop]


HUNDRED = bytes(range(100))


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        (table(compress(HUNDRED[:99])), "declares 99 bytes, not 100"),
        (table(compress(HUNDRED + b"x")), "declares 101 bytes, not 100"),
        (table(compress(HUNDRED, write_content_size=False)), "not 100"),
        (table(compress(HUNDRED, write_checksum=True)), "dictionary or a checksum"),
        (table(compress(HUNDRED) + b"\0"), "does not end where its chunk ends"),
        (table(compress(HUNDRED) + compress(b"more")), "does not end where its chunk ends"),
        (table(compress(HUNDRED) + compress(b"")), "does not end where its chunk ends"),
        (table(compress(HUNDRED) + b"\x50\x2a\x4d\x18\0\0\0\0"), "does not end where its chunk ends"),  # skippable
        (table(b"\x50\x2a\x4d\x18\0\0\0\0" + compress(HUNDRED)), "not 100"),
        (table(compress(HUNDRED)[:-1]), "chunk 0"),
        (table(compress(HUNDRED)[:6]), "chunk 0"),
        (table(b""), "not a zstd frame"),
        (table(b"not a frame"), "not a zstd frame"),
        (compress(HUNDRED) + struct.pack("<I", len(compress(HUNDRED)) + 1), "the chunks take"),
        (compress(HUNDRED) + struct.pack("<I", len(compress(HUNDRED)) - 1), "the chunks take"),
        (b"\0" + table(compress(HUNDRED)), "the chunks take"),
        (table(compress(HUNDRED), compress(b"x")), "the chunks take"),
        (b"abc", "cannot hold a table of 1 chunks"),
    ],
)
def test_a_chunk_that_breaks_the_rules_is_refused(stored: bytes, match: str) -> None:
    assert ChunkReader(memoryview(table(compress(HUNDRED))), 100, "section 3").read(0, 100) == HUNDRED
    with pytest.raises(InvalidFileError, match=f"section 3.*{match}"):
        ChunkReader(memoryview(stored), 100, "section 3").read(0, 100)


def test_a_frame_whose_content_is_not_as_long_as_it_declares() -> None:
    # The size field of a single-segment frame of under 256 bytes is its sixth byte.
    stored = bytearray(compress(HUNDRED[:50]))
    assert (stored[4], stored[5]) == (0x20, 50)
    stored[5] = 100
    with pytest.raises(InvalidFileError, match="section 3, chunk 0"):
        ChunkReader(memoryview(table(bytes(stored))), 100, "section 3").read(0, 100)


def test_chunks_cannot_trade_places() -> None:
    rng = np.random.default_rng(0)
    size = c.ZSTD_CHUNK + 100
    data = rng.integers(0, 4, size, np.uint8).tobytes()
    frames = [compress(data[: c.ZSTD_CHUNK]), compress(data[c.ZSTD_CHUNK :])]
    assert ChunkReader(memoryview(table(*frames)), size, "s").read(0, size) == data
    with pytest.raises(InvalidFileError, match="s, chunk 0: the frame declares 100 bytes, not 262144"):
        ChunkReader(memoryview(table(*frames[::-1])), size, "s").read(0, size)


@examples(100)
@given(st.data())
def test_any_damage_to_chunks_is_refused_or_harmless(data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=1, max_size=300)) * 20
    stored = bytearray(chunked(raw))
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = ChunkReader(memoryview(bytes(stored)), len(raw), "s").read(0, len(raw))
    except InvalidFileError:
        return
    # A checksum of the section tells the difference; here only the length is certain.
    assert len(found) == len(raw)
