"""What a zstd frame of a delta file may say of itself (spec/deltafmt-v1.md, section 6.2)."""

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
