"""The methods' hot loops as one object: the numpy reference, or the same functions compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods import quantize, sampling
from deltafmt.terms.codec_routines import REFERENCE, CodecRoutines, codec_routines


@dataclass(frozen=True, slots=True)
class Routines:
    """One implementation of every hot loop that packing needs."""

    codec: CodecRoutines
    uniform: Callable[[int, int, int, int, int, int], NDArray[np.uint8]]
    gather_difference: Callable[..., tuple[NDArray[np.float32], bool]]
    quantize: Callable[..., tuple[NDArray[np.uint8], NDArray[np.float32]]]


def select_routines(compiled: bool) -> Routines:
    """Return the compiled loops where they are wanted and numba is there, the reference otherwise.

    As with :func:`deltafmt.terms.codec_routines.codec_routines`, every thread needs routines of its own.
    """
    codec = codec_routines(compiled)
    if codec is REFERENCE:
        return Routines(codec, sampling.uniform, sampling.gather_difference, quantize.quantize)
    from deltafmt.methods import method_numba as fast
    from deltafmt.terms.codec_numba import Scratch

    loops = (fast.uniform, fast.gather_difference, fast.quantize)
    scratch = Scratch()
    bound: list[Any] = [functools.partial(loop, scratch) for loop in loops]
    return Routines(codec, *bound)
