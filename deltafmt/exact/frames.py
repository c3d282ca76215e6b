"""The zstd frames in which planes lie are read here (spec/deltafmt-v1.md, sections 6.2 and 17.5).

A frame's declared size is checked before it is decoded, and so is that nothing follows it.
"""

from __future__ import annotations

import threading

import zstandard

from deltafmt.errors import InvalidFileError
from deltafmt.format.zstd_frame import check_frame, frame_end
from deltafmt.output import Bytes

_local = threading.local()


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
