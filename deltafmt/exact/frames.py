"""The zstd frames in which planes lie (spec/deltafmt-v1.md, sections 6.2 and 17.5).

A frame's declared size is checked before it is decoded, and so is that nothing follows it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

import zstandard

from deltafmt.errors import InvalidFileError
from deltafmt.format.zstd_frame import check_frame, frame_end
from deltafmt.output import Bytes

LEVEL: Final = 1

# zstd has statistics for a block of at most so many bytes.
BLOCK_BYTES: Final = 128 * 1024

_local = threading.local()


def compress(data: memoryview, ends: Iterable[int] = (), level: int = LEVEL) -> bytes:
    """Return one frame.

    Args:
        data: its content, at least a byte.
        ends: where the statistics of the content change, ascending; a block of the frame ends at each.
        level: the level of zstd.
    """
    compressors: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        compressors[level] = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
    frame = compressors[level].compressobj(size=len(data))
    parts, start = [], 0
    for end in ends:
        if start < end < len(data):
            parts += [frame.compress(data[start:end]), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
            start = end
    return b"".join((*parts, frame.compress(data[start:]), frame.flush()))


def decompress(frame: Bytes, size: int) -> bytes:
    """Return the content of a frame.

    Args:
        frame: exactly one frame.
        size: bytes of its content.

    Raises:
        InvalidFileError: the bytes are not one frame of that size as the specification allows it.
    """
    check_frame(frame, size)
    try:
        if frame_end(memoryview(frame).cast("B")) != len(frame):
            raise InvalidFileError("a frame does not end where its plane ends")
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        content: bytes = _local.decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise InvalidFileError(f"not a zstd frame: {str(error).splitlines()[0]}") from error
    if len(content) != size:
        raise InvalidFileError(f"a frame has {len(content)} bytes, not {size}")
    return content
