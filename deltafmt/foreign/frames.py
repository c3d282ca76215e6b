"""Zstd frames of other programs, decoded piece by piece in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import zstandard

from deltafmt.checkpoint.safetensors_file import STEP
from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import ZSTD_MAX_WINDOW
from deltafmt.format.zstd_frame import frame_end

LEVEL = 1
# A frame may have so many blocks, and one more for so many bytes of content.
_SPARE_BLOCKS, _BLOCK = 4096, 512


class Frame:
    """One frame, whose content is read from its beginning.

    Args:
        data: exactly one frame.
        most: the bytes that its content has at most.

    Raises:
        InvalidFileError: the bytes are not one frame, or it asks for a dictionary, a window of more than 128 MiB, or
            blocks beyond number.
    """

    def __init__(self, data: memoryview, most: int) -> None:
        try:
            parameters = zstandard.get_frame_parameters(data)
            # The smallest window has 1 KiB, and so have full blocks then. Writers that split them stay far above.
            end = frame_end(data, _SPARE_BLOCKS + most // _BLOCK)
        except zstandard.ZstdError as error:
            raise InvalidFileError("not a zstd frame") from error
        if end != len(data):
            raise InvalidFileError("it is not one whole zstd frame" if end > len(data) else "bytes follow a zstd frame")
        if parameters.dict_id:
            raise InvalidFileError("a zstd frame uses a dictionary")
        if parameters.window_size > ZSTD_MAX_WINDOW:
            raise InvalidFileError(f"a zstd frame has a window of {parameters.window_size:,} bytes")
        declared = parameters.content_size
        self.size = None if declared == zstandard.CONTENTSIZE_UNKNOWN else declared
        self._reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).stream_reader(data)

    def expect(self, size: int) -> None:
        """Refuse a frame that declares a content of another size.

        Raises:
            InvalidFileError: says both sizes.
        """
        if self.size not in (None, size):
            raise InvalidFileError(f"a zstd frame declares {self.size:,} bytes, not {size:,}")

    def read(self, size: int) -> bytearray:
        """Return the next bytes of the content.

        Raises:
            InvalidFileError: there are fewer.
        """
        found = bytearray()
        for piece in self.pieces(size):
            found += piece
        return found

    def pieces(self, size: int) -> Iterator[bytes]:
        """Give the next bytes of the content, at most 8 MiB at a time.

        Raises:
            InvalidFileError: there are fewer.
        """
        left = size
        while left:
            piece = self._next(min(left, STEP))
            if not piece:
                raise InvalidFileError(f"a zstd frame ends {left:,} bytes early")
            left -= len(piece)
            yield piece

    def finish(self) -> None:
        """Refuse a frame that has more content than was read.

        Raises:
            InvalidFileError: it has.
        """
        if self._next(1):
            raise InvalidFileError("a zstd frame has more content than it should")

    def _next(self, size: int) -> bytes:
        try:
            piece: bytes = self._reader.read(size)
        except zstandard.ZstdError as error:
            raise InvalidFileError(f"not a zstd frame: {str(error).splitlines()[0]}") from error
        return piece


def compressor(size: int) -> zstandard.ZstdCompressionObj:
    """Return an object that compresses so many bytes to one frame, which declares them.

    Some readers decode a frame in one call, which needs its size.
    """
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compressobj(size=size)
