"""The loop of one upload thread, compiled: read, check the padding, copy, without the interpreter's lock.

Importing this module imports numba (optional, extra ``fast``). The loop calls the C library and the CUDA driver by the
addresses of their functions, so that numba can keep its machine code on disk.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deltafmt.accel import compiled

DONE, STOPPED, NOT_READ, PADDING, DRIVER = range(5)


class Calls(NamedTuple):
    """Addresses of the functions that the loop calls; arguments and results are 64-bit integers.

    Attributes:
        read: ``pread(file, buffer, bytes, offset)``.
        bind: ``cuCtxSetCurrent(context)``; like all that follow, gives 0, or an error's number in its low 32 bits.
        copy: ``cuMemcpyHtoDAsync(device address, host address, bytes, stream)``.
        record: ``cuEventRecord(event, stream)``.
        wait: ``cuEventSynchronize(event)``.
    """

    read: int
    bind: int
    copy: int
    record: int
    wait: int


@functools.cache
def driver_calls() -> Calls | None:
    """Return the functions of the C library and of the CUDA driver, or None where one is not to be had."""
    try:
        driver, library = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(None)
        found = (
            library.pread,
            driver.cuCtxSetCurrent,
            driver.cuMemcpyHtoDAsync_v2,
            driver.cuEventRecord,
            driver.cuEventSynchronize,
        )
    except (OSError, AttributeError, TypeError):
        return None
    return Calls(*(address_of(function) for function in found))


def address_of(function: Any) -> int:
    """Return the address of a ctypes function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def current_context() -> int:
    """Return the CUDA context of this thread, as the driver knows it."""
    context = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value or 0


def _calling(typing, function, a, b, c, d):  # type: ignore[no-untyped-def]  # noqa: ARG001 - numba's form
    """Call a function by its address; it does not see the arguments that it does not have."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001 - numba's form
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 4)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), list(arguments[1:]))

    return types.int64(*[types.int64] * 5), codegen


_call: Any = intrinsic(_calling)
_ERROR = 0xFFFFFFFF


@compiled
def move(  # type: ignore[no-untyped-def]  # noqa: PLR0912 - every step can fail
    pieces, copies, paddings, first, step, is_read, ring, slots, events, file, context, stream, calls, stop
):
    """Move pieces ``first``, ``first + step`` and so on.

    Args:
        pieces: int64, (pieces, 6): offset in the file, length, and the ranges of its rows in the next two.
        copies: int64, (copies, 3): place in the piece, device address, length.
        paddings: int64, (paddings, 3): place in the piece, length, section.
        first, step: the pieces of this thread.
        is_read: whether the first of them already lies in its buffer.
        ring: uint8, all buffers.
        slots: int64, where this thread's buffers begin; a piece goes to that of its number in the thread.
        events: int64, one for each of them: recorded behind the copies from it.
        file, context, stream: handles.
        calls: int64, the addresses of :class:`Calls`.
        stop: int64, (1,): other than 0 once an error has come up elsewhere.

    Returns:
        One of the five outcomes, the piece at which it came, and the row of the padding or the driver's error.
    """
    base = np.int64(ring.ctypes.data)
    error = _call(calls[1], context, 0, 0, 0) & _ERROR
    if error:
        return DRIVER, first, error
    for piece in range(first, pieces.shape[0], step):
        if stop[0]:
            return STOPPED, piece, 0
        slot = piece // step % slots.shape[0]
        offset, length = pieces[piece, 0], pieces[piece, 1]
        if not (is_read and piece == first):
            error = _call(calls[4], events[slot], 0, 0, 0) & _ERROR
            if error:
                return DRIVER, piece, error
            done = 0
            while done < length:
                count = _call(calls[0], file, base + slots[slot] + done, length - done, offset + done)
                if count <= 0:
                    return NOT_READ, piece, 0
                done += count
        for row in range(pieces[piece, 4], pieces[piece, 5]):
            start = slots[slot] + paddings[row, 0]
            for byte in ring[start : start + paddings[row, 1]]:
                if byte:
                    return PADDING, piece, row
        for row in range(pieces[piece, 2], pieces[piece, 3]):
            source = base + slots[slot] + copies[row, 0]
            error = _call(calls[2], copies[row, 1], source, copies[row, 2], stream) & _ERROR
            if error:
                return DRIVER, piece, error
        error = _call(calls[3], events[slot], stream, 0, 0) & _ERROR
        if error:
            return DRIVER, piece, error
    return DONE, first, 0
