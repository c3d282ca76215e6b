"""What a zstd frame of a delta file may say of itself (spec/deltafmt-v1.md, section 6.2), and where a frame ends."""

from __future__ import annotations

import zstandard

from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import ZSTD_MAX_WINDOW


def check_frame(frame: bytes | bytearray | memoryview, size: int) -> None:
    """Check the header of a frame, before anything is decoded.

    Args:
        frame: the frame.
        size: bytes of its content.

    Raises:
        InvalidFileError: it is no frame, declares another size, or asks for what no frame may ask for.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise InvalidFileError("not a zstd frame") from error
    if parameters.content_size != size:
        raise InvalidFileError(f"the frame declares {parameters.content_size} bytes, not {size}")
    if parameters.window_size > ZSTD_MAX_WINDOW:
        raise InvalidFileError(f"the frame has a window of {parameters.window_size:,} bytes")
    if parameters.dict_id or parameters.has_checksum:
        raise InvalidFileError("the frame uses a dictionary or a checksum")


def frame_end(frame: memoryview, most: int | None = None) -> int:
    """Return where a frame ends, or a number behind the end of the bytes.

    python-zstandard drops the bytes that follow a frame. So the lengths of its blocks are followed (RFC 8878, section
    3.1.1).

    Args:
        frame: bytes that begin with a frame's header.
        most: how many blocks it may have; None for any number. A block is three bytes at least, and may be empty.

    Raises:
        InvalidFileError: it has more.
        zstandard.ZstdError: they do not.
    """
    position = zstandard.frame_header_size(frame)
    last, blocks = False, 0
    while not last and position + 3 <= len(frame):
        head = int.from_bytes(frame[position : position + 3], "little")
        last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
        position += 3 + (1 if kind == 1 else size)
        blocks += 1
        if most is not None and blocks > most:
            raise InvalidFileError(f"a zstd frame has more than {most:,} blocks")
    if last and zstandard.get_frame_parameters(frame).has_checksum:
        position += 4
    return position if last else len(frame) + 1
