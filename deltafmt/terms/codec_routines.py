"""The codecs' hot loops as one object: the numpy reference, or the same functions compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt import accel
from deltafmt.terms import floats, levels, words
from deltafmt.terms.nm import hashing, scatter


@dataclass(frozen=True, slots=True)
class CodecRoutines:
    """One implementation of every hot loop of the codecs."""

    seeded: Callable[[int, int, int, int, int, int], NDArray[np.uint8]]
    pack_into: Callable[[NDArray[np.unsignedinteger], int, NDArray[np.uint32], int], None]
    unpack: Callable[[NDArray[np.uint32], int, int, int, int], NDArray[np.unsignedinteger]]
    scatter: Callable[..., NDArray[np.float32]]
    dequantize: Callable[..., NDArray[np.float32]]
    add_outer: Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]], None]
    subtract: Callable[[floats.Raw, str, floats.Raw, str], tuple[floats.Floats, bool]]
    add: Callable[[floats.Raw, str, floats.Floats, str], floats.Raw]


REFERENCE = CodecRoutines(
    hashing.seeded,
    words.pack_into,
    words.unpack,
    scatter.scatter,
    levels.dequantize,
    levels.add_outer,
    floats.subtract,
    floats.add,
)


def codec_routines(compiled: bool) -> CodecRoutines:
    """Return the compiled loops if they are wanted and numba can be imported; otherwise the reference.

    Compiled loops reuse the memory of their results. Every thread therefore needs routines of its own, and a result is
    valid until the thread calls the same routine again.
    """
    if not compiled or not accel.available():
        return REFERENCE
    try:
        from deltafmt.terms import codec_numba as fast
    except ImportError:  # numba is there but does not go with this numpy
        return REFERENCE
    loops = (
        *(fast.seeded, fast.pack_into, fast.unpack, fast.scatter),
        *(fast.dequantize, fast.add_outer, fast.subtract, fast.add),
    )
    scratch = fast.Scratch()
    bound: list[Any] = [functools.partial(loop, scratch) for loop in loops]
    return CodecRoutines(*bound)
