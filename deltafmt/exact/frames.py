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


def decompress_into(frame: Bytes, content: memoryview) -> None:
    """Write the content of a frame into memory of its size.

    Args:
        frame: exactly one frame.
        content: where its content goes.

    Raises:
        InvalidFileError: the bytes are not one frame of that size as the specification allows it.
    """
    size = len(content)
    check_frame(frame, size)
    try:
        if frame_end(memoryview(frame).cast("B")) != len(frame):
            raise InvalidFileError("a frame does not end where its plane ends")
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        with _local.decompressor.stream_reader(frame, read_size=len(frame)) as reader:
            found = reader.readinto(content)
            rest = reader.read(1)
    except zstandard.ZstdError as error:
        raise InvalidFileError(f"not a zstd frame: {str(error).splitlines()[0]}") from error
    if found != size or rest:
        raise InvalidFileError(f"a frame has {found + len(rest)} bytes, not {size}")
