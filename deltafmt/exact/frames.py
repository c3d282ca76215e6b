"""The zstd frames in which planes lie (spec/deltafmt-v1.md, sections 6.2 and 17.5).

A frame's declared size is checked before it is decoded, and so is that nothing follows it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import zstandard

from deltafmt.errors import InvalidFileError
from deltafmt.format.zstd_frame import check_frame, frame_end
from deltafmt.output import Bytes

# Planes have statistics worth coding, but hardly anything that repeats, unless it is long. zstd shall therefore find
# few matches: it looks for seven bytes, and remembers the last place of 64 of them.
PARAMETERS: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=17,
    write_content_size=True,
    write_checksum=False,
)

_local = threading.local()


def compress(data: memoryview, ends: Sequence[int] = ()) -> bytes:
    """Return one frame.

    Args:
        data: its content, at least a byte.
        ends: where the statistics of the content change, ascending; a block of the frame ends at each.
    """
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=PARAMETERS)
    compressor: zstandard.ZstdCompressor = _local.compressor
    if not ends:
        return compressor.compress(data)
    frame = compressor.compressobj(size=len(data))
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
