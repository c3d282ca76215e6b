"""Compressed sections: independent zstd frames and a chunk table (spec/deltafmt-v1.md, section 6).

python-zstandard ignores ``max_output_size`` when a frame declares its size, and it drops the bytes that follow the
first frame. The reader therefore checks the declared size of each frame before decoding it, and its exact end after.
"""

from __future__ import annotations

import struct

import zstandard

from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import ZSTD_CHUNK
from deltafmt.format.zstd_frame import check_frame

LEVEL = 9

# A decompressor must not be shared between threads; each thread makes one.
Decompressor = zstandard.ZstdDecompressor


class ChunkCompressor:
    """Turn raw bytes, which may come in pieces of any size, into frames followed by the table of their lengths."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._lengths: list[int] = []
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False)

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Take raw bytes and return the frames that they complete."""
        self._pending += data
        frames = []
        while len(self._pending) >= ZSTD_CHUNK:
            frames.append(self._frame(bytes(self._pending[:ZSTD_CHUNK])))
            del self._pending[:ZSTD_CHUNK]
        return frames

    def finish(self) -> list[bytes]:
        """Return the last frame, if bytes are left for one, and the chunk table."""
        frames = [self._frame(bytes(self._pending))] if self._pending else []
        return [*frames, struct.pack(f"<{len(self._lengths)}I", *self._lengths)]

    def _frame(self, chunk: bytes) -> bytes:
        frame = self._compressor.compress(chunk)
        self._lengths.append(len(frame))
        return frame


class ChunkReader:
    """Random access to the raw bytes of a zstd section.

    Args:
        stored: the section's stored bytes.
        raw_length: the section's raw length, as the index gives it.
        where: the name of the section in messages.

    Raises:
        InvalidFileError: the chunk table does not cover the stored bytes exactly.
    """

    def __init__(self, stored: memoryview, raw_length: int, where: str) -> None:
        count = -(-raw_length // ZSTD_CHUNK)
        table_start = len(stored) - 4 * count
        if table_start < 0:
            raise InvalidFileError(f"{where}: {len(stored)} bytes cannot hold a table of {count} chunks")
        lengths = struct.unpack(f"<{count}I", stored[table_start:])
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)
        if self._starts[-1] != table_start:
            raise InvalidFileError(f"{where}: the chunks take {self._starts[-1]} bytes, not {table_start}")
        self._stored = stored
        self._raw_length = raw_length
        self._where = where
        self._decompressor = Decompressor()

    def read(self, offset: int, length: int) -> bytearray:
        """Return ``length`` raw bytes from ``offset`` on; the range must lie inside the section."""
        out = bytearray(length)
        position = 0
        while position < length:
            number, skip = divmod(offset + position, ZSTD_CHUNK)
            chunk = self.chunk(number, self._decompressor)
            part = chunk[skip : skip + length - position]
            out[position : position + len(part)] = part
            position += len(part)
        return out

    def chunk(self, number: int, decompressor: Decompressor) -> bytes:
        """Return the raw bytes of one chunk; several threads may call this, each with its own decompressor.

        Raises:
            InvalidFileError: the chunk's frame breaks section 6 of the specification.
        """
        where = f"{self._where}, chunk {number}"
        frame = self._stored[self._starts[number] : self._starts[number + 1]]
        expected = min(ZSTD_CHUNK, self._raw_length - number * ZSTD_CHUNK)
        try:
            check_frame(frame, expected)
        except InvalidFileError as error:
            raise error.located(where) from error
        decoder = decompressor.decompressobj()
        try:
            chunk = decoder.decompress(frame)
        except zstandard.ZstdError as error:
            raise InvalidFileError(f"{where}: {error}") from error
        if len(chunk) != expected or not decoder.eof or decoder.unused_data:
            raise InvalidFileError(f"{where}: the frame does not end where its chunk ends")
        return chunk
