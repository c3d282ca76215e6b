"""The methods' hot loops as one object: the numpy reference, or the same functions compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt import accel
from deltafmt.codecs.routines import CodecRoutines, codec_routines
from deltafmt.methods import quantize, sampling


@dataclass(frozen=True, slots=True)
class Routines:
    """One implementation of every hot loop that packing needs."""

    codec: CodecRoutines
    uniform: Callable[[int, int, int, int, int, int], NDArray[np.uint8]]
    gather: Callable[..., NDArray[np.float32]]
    quantize: Callable[..., tuple[NDArray[np.uint8], NDArray[np.float32]]]


@functools.cache
def select_routines(compiled: bool) -> Routines:
    """Return the compiled loops where they are wanted and numba is there, the reference otherwise."""
    codec = codec_routines(compiled)
    if not compiled or not accel.available():
        return Routines(codec, sampling.uniform, sampling.gather, quantize.quantize)
    from deltafmt.methods import fast

    return Routines(codec, fast.uniform, fast.gather, fast.quantize)
