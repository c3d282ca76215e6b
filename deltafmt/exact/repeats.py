"""Planes that repeat: zstd's own compressor finds matches that a frame of counted bytes has not.

Planes of deltas hardly repeat, and searching takes most of zstd's time. So a few bytes are looked at first. What the
look misses costs bytes, and what it finds wrongly costs time: the smallest frame is kept.

Compiled: ``kernels/cpu/loops/repeats.c``.
"""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
import zstandard
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from deltafmt.core import Native, loop

Plane = NDArray[np.uint8]


def _parameters(places: int) -> zstandard.ZstdCompressionParameters:
    """Return what zstd searches with: seven bytes, which it remembers in 2**places places."""
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=places,
        chain_log=6,
        search_log=1,
        window_log=17,
        write_content_size=True,
        write_checksum=False,
    )


# Few places find what lies near, and take no chance matches; many places find what lies far.
_PARAMETERS: Final = (_parameters(6), _parameters(14))

# Shorter planes are not worth a look.
_SHORT: Final = 256

# Pairs of words of eight bytes that are looked at all over a plane; one of so many has to be equal.
_PAIRS: Final = 256
_EQUAL: Final = 32

# The words at each of the first places of a window are looked for at every so many places behind them. Windows lie at
# the beginning and at the end of a plane.
_STEP: Final = 128
_WINDOW: Final = 1 << 15

# A word comes again by chance where most bytes are zeros. So many bytes from there have to come again with it, and so
# many of them are no zeros.
_SAME: Final = 256
_SET: Final = 4

_local = threading.local()


def searched_frame(plane: Plane) -> bytes:
    """Return the smallest frame that zstd's own compressor makes of a plane."""
    if not hasattr(_local, "compressors"):
        _local.compressors = [zstandard.ZstdCompressor(compression_params=each) for each in _PARAMETERS]
    compressors: list[zstandard.ZstdCompressor] = _local.compressors
    return min((compressor.compress(plane.data) for compressor in compressors), key=len)


def _may_repeat(native: Native, plane: Plane) -> bool:
    found: bool = native.may_repeat(plane)
    return found


@loop(_may_repeat)
def may_repeat(plane: Plane) -> bool:
    """Tell whether a look at some bytes of a plane promises that zstd finds matches in it."""
    if plane.size < _SHORT:
        return False
    return _repeats_near(plane) or any(map(_repeats_far, (plane[:_WINDOW], plane[-_WINDOW:])))


def _repeats_near(plane: Plane) -> bool:
    """Tell whether words are often followed by their like. Zeros are not counted: runs of them are matches anyway."""
    words = plane[: plane.size - plane.size % 8].view(np.uint64)
    # Rows often have a power of two of bytes. An odd step looks at all of their parts.
    step = max(2, words.size // _PAIRS) | 1
    words, behind = words[:-1:step], words[1::step]
    return int(np.count_nonzero((words == behind) & (words > 0))) * _EQUAL > words.size


def _repeats_far(window: Plane) -> bool:
    """Tell whether bytes at the beginning of a window come again in it, whatever the distance."""
    words = sliding_window_view(window, 8)
    first, later = words[:_STEP], words[_STEP::_STEP]
    is_same = (first[:, None] == later[None]).all(axis=2) & later.any(axis=1)
    for old, number in np.argwhere(is_same).tolist():
        same = window[_STEP * (number + 1) :][:_SAME]
        if np.count_nonzero(same) >= _SET and np.array_equal(window[old : old + same.size], same):
            return True
    return False
