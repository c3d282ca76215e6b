"""Arguments that the functions of the extension take, and what is out of range among them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def zeros(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, dtype)


def raw(*shape: int) -> NDArray[np.uint16]:
    return np.zeros(shape, np.uint16)


def fields(*shape: int) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


def integers(*shape: int) -> NDArray[np.int64]:
    return np.zeros(shape, np.int64)


def words(*shape: int) -> NDArray[np.uint32]:
    return np.zeros(shape, np.uint32)


@dataclass(frozen=True)
class Case:
    """Arguments that fit, and what is known of them.

    Attributes:
        name: the function's.
        arguments: in their order.
        outputs: places of the arrays that are written.
        free: (place, axis) of lengths that nothing else says.
        fewer: (place, axis) of lengths that may be one less: of rows that end a tile, of columns that end a group.
        wrong: (place, value) of numbers, and of arrays, that are out of range.
    """

    name: str
    arguments: tuple[Any, ...]
    outputs: tuple[int, ...]
    free: tuple[tuple[int, int], ...] = ()
    fewer: tuple[tuple[int, int], ...] = ()
    wrong: tuple[tuple[int, Any], ...] = ()

    def copies(self) -> list[Any]:
        """Return the arguments with arrays of their own."""
        return [value.copy() if isinstance(value, np.ndarray) else value for value in self.arguments]


def _addresses() -> NDArray[np.int64]:
    return np.array([ctypes.cast(call, ctypes.c_void_p).value for call in (_NOTHING,) * 5], np.int64)


# Stands for every function that an upload calls: it does nothing and gives 0.
_NOTHING = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(lambda *_: 0)
# How codes are made: bits, midtread, search, group, scale dtype, factors, refinements.
CODING = (4, True, True, 4, "BF16", np.ones(3, np.float32), 2)
TABLE = np.array([[0, 1, 2, 3], [0, 0, 1, 3]], np.uint64)
HIGH = np.full((32, 2, 2), 16, np.uint8)
# 32 rows of 32 columns, 2:16, each row with positions of its own: 4 kept entries of a row.
KEPT = (fields(32, 2, 2), 16, 1)
# Units of a chunk, how they are sorted (floats, shift, bits), which are marked, and numbers that do not ascend in it.
UNITS = np.array([16000, 16100, 48000, 16000, 16300, 49000, 3, 65535, 16100], np.uint16)
SORTING = (1, 7, 8)
MARKS = np.arange(9) % 2 == 0
NO_MARKS = zeros(0, dtype=np.bool_)
NOT_ASCENDING = tuple(np.array(pair) for pair in ((5, 3), (3, 3), (-1, 3), (3, 9)))
# n log2 n for each n that a sample may count, with 16 bits behind the point.
LOGS = np.rint(np.arange(8193) * np.log2(np.maximum(np.arange(8193), 1)) * 65536).astype(np.uint64)
UPLOAD = (
    *(np.array([[0, 8, 0, 1, 0, 1]]), np.array([[0, 0, 8]]), np.array([[0, 8, 0]])),
    *(0, 1, True, fields(16), integers(2), integers(2), 0, 0, 0, _addresses(), integers(1)),
)


def pieces(**changes: int) -> NDArray[np.int64]:
    """Return the pieces of the upload with changes."""
    names = ("offset", "length", "first_copy", "last_copy", "first_padding", "last_padding")
    row = dict(zip(names, (int(value) for value in UPLOAD[0][0]), strict=True)) | changes
    return np.array([list(row.values())])


CASES = [
    Case("subtract", (raw(9), "BF16", raw(9), "F16", zeros(9)), (4,)),
    Case("add", (raw(9), "BF16", zeros(9), words(9), "F32"), (3,)),
    Case(
        "seeded",
        (fields(3, 5, 2), 7, 0, 16, 8),
        (0,),
        free=((0, 0), (0, 1), (0, 2)),
        wrong=((1, 2**32), (2, 2**63), (3, 1), (3, 12), (3, 256), (4, 0), (4, 5), (4, 32)),
    ),
    Case(
        "uniform",
        (fields(3, 5, 2), 7, 0, 2),
        (0,),
        fewer=((0, 2),),
        free=((0, 0), (0, 1)),
        wrong=((1, 2**32), (2, 2**63), (3, 1), (3, 256)),
    ),
    Case(
        "draw",
        (zeros(3, 5, dtype=np.bool_), 7, 0, 2**31),
        (0,),
        free=((0, 0), (0, 1)),
        wrong=((1, 2**32), (2, 2**63), (3, 2**32 + 1)),
    ),
    Case("ascending", (fields(3, 5, 2), 16), (), free=((0, 0), (0, 1), (0, 2)), wrong=((1, 1), (1, 256))),
    Case(
        "rank",
        (fields(3, 5, 2), TABLE, zeros(3, 5, dtype=np.uint64)),
        (2,),
        free=((1, 1),),
        wrong=((0, np.full((3, 5, 2), 4, np.uint8)), (1, np.zeros((2, 0), np.uint64))),
    ),
    Case(
        "unrank",
        (zeros(3, 5, dtype=np.uint64), TABLE, fields(3, 5, 2)),
        (2,),
        free=((1, 1),),
        wrong=((1, TABLE[:, :1].copy()), (1, np.zeros((2, 256), np.uint64))),
    ),
    Case(
        "pack_words",
        (fields(32, 32), 3, words(1, 3, 32), 1),
        (2,),
        fewer=((0, 0), (0, 1)),
        wrong=((1, 0), (1, 65), (1, 4), (3, 0), (3, 2), (3, 3), (3, 16)),
    ),
    Case(
        "unpack_words",
        (1, words(1, 3, 32), 32, 0, 3, fields(32, 32)),
        (5,),
        fewer=((5, 0), (5, 1)),
        wrong=((0, 3), (0, 16), (0, 2**32 + 1), (2, 2**62), (3, 1), (3, 32), (4, 0), (4, 9), (4, 65)),
    ),
    Case(
        "unpack_words",
        (0, words(5, 8), 70, 32, 3, fields(5, 38)),
        (5,),
        fewer=((5, 1),),
        wrong=((0, 1), (2, 69), (2, 97), (3, 31), (3, 64), (4, 2), (4, 9)),
    ),
    Case(
        "gather",
        (raw(32, 32), "BF16", words(32, 32), "F32", *KEPT, 4.0, zeros(32, 4)),
        (8,),
        wrong=((4, HIGH), (4, fields(32, 2, 17)), (5, 1), (5, 8), (5, 256), (6, 0), (6, 2), (6, 3), (6, 16)),
    ),
    Case(
        "quantize",
        (zeros(3, 10), *CODING, fields(3, 10), zeros(3, 3)),
        (8, 9),
        free=((6, 0),),
        wrong=((1, 0), (1, 1), (1, 9), (2, 2), (3, 2), (4, 0), (4, 2**31), (5, "F16"), (7, 65)),
    ),
    Case(
        "scatter",
        (fields(32, 4), zeros(32, 2), zeros(32, 32), *KEPT, 15, 2),
        (2,),
        fewer=((2, 1),),
        wrong=((3, HIGH), (4, 1), (4, 256), (5, 0), (5, 3), (6, 256), (7, 0), (7, 1), (7, 2**31)),
    ),
    Case(
        "nm_pack",
        (raw(32, 32), "BF16", raw(32, 32), "BF16", *KEPT, 1.0, *CODING, words(1, 1, 32), raw(1, 1, 32)),
        (15, 16),
        free=((13, 0),),
        fewer=((4, 2),),
        wrong=(
            *((4, HIGH), (5, 1), (5, 256), (6, 0), (6, 2), (8, 0), (8, 1), (8, 9), (9, 2), (10, 2), (11, 0), (11, 2)),
            *((12, "F16"), (12, "F32"), (14, 65)),
        ),
    ),
    Case(
        "nm_unpack",
        (words(1, 1, 32), zeros(32, 2), raw(32, 32), "BF16", words(32, 32), "F32", *KEPT, 4, 15, 2),
        (4,),
        wrong=((6, HIGH), (7, 1), (7, 256), (8, 0), (8, 2), (9, 0), (9, 9), (10, 256), (11, 0), (11, 1), (11, 2**31)),
    ),
    Case(
        "dequantize",
        (fields(3, 10), 2, zeros(3, 3, dtype=np.int32), zeros(3, 3), 4, zeros(3, 10)),
        (5,),
        wrong=((1, 0), (1, 3), (4, 0), (4, 2), (4, 2**31)),
    ),
    Case("may_repeat", (fields(300),), (), free=((0, 0),)),
    Case("count_bytes", (fields(300), words(256)), (1,), free=((0, 0),)),
    Case(
        "plane_frame",
        (fields(300), np.array([100, 300], np.uint64), fields(300 + 150 + 8 + 512)),
        (2,),
        free=((2, 0),),
        wrong=(
            *((1, np.array([300, 100], np.uint64)), (1, np.array([0, 300], np.uint64))),
            *((1, np.array([300, 300], np.uint64)), (2, fields(300 + 150 + 8 + 511))),
        ),
    ),
    Case("exact_unrelated", (UNITS, UNITS[::-1].copy(), 1, LOGS), (), wrong=((2, 2),)),
    Case(
        "exact_split",
        (UNITS, UNITS[::-1].copy(), *SORTING, MARKS, fields(2, 9), zeros(512, dtype=np.uint64), fields(18)),
        (6, 7, 8),
        free=((8, 0),),
        wrong=((2, 2), (3, 9), (3, 64), (4, 9), (4, 12), (8, fields(17)), (8, fields(26)[1:])),
    ),
    Case(
        "exact_join",
        (fields(2, 9), UNITS, *SORTING, MARKS, raw(9), fields(18)),
        (6, 7),
        free=((7, 0),),
        wrong=((2, 2), (3, 9), (4, 10), (6, words(9)), (7, fields(17)), (7, fields(26)[1:])),
    ),
    Case(
        "exact_ranks",
        (UNITS, *SORTING, NO_MARKS, np.array([3, 5]), zeros(256, dtype=np.uint64), integers(2)),
        (6, 7),
        free=((0, 0), (4, 0)),
        wrong=((1, 2), (2, 9), (3, 9), (3, 10), (4, MARKS), *((5, wrong) for wrong in NOT_ASCENDING)),
    ),
    Case(
        "exact_find",
        (UNITS, *SORTING, MARKS, np.array([3, 5]), integers(2)),
        (6,),
        wrong=((1, 2), (2, 9), (3, 10), *((5, wrong) for wrong in NOT_ASCENDING)),
    ),
    Case(
        "exact_find",
        (UNITS, *SORTING, NO_MARKS, np.array([3, 5]), integers(2)),
        (6,),
        free=((0, 0), (4, 0)),
        wrong=tuple((5, wrong) for wrong in NOT_ASCENDING),
    ),
    Case(
        "exact_differ",
        (UNITS, UNITS[::-1].copy(), integers(64)),
        (2,),
        free=((2, 0),),
        wrong=((1, words(9)), (2, integers(63))),
    ),
    Case(
        "exact_filled",
        (fields(2, 70), integers(64)),
        (1,),
        free=((0, 0), (0, 1), (1, 0)),
        wrong=((1, integers(63)),),
    ),
    Case(
        "exact_take",
        (UNITS, np.array([3, 5]), raw(2)),
        (2,),
        free=((0, 0),),
        wrong=((1, np.array([-1, 5])), (1, np.array([3, 9])), (2, words(2))),
    ),
    Case(
        "exact_put",
        (UNITS, np.array([3, 5]), raw(2)),
        (0,),
        free=((0, 0),),
        wrong=((1, np.array([-1, 5])), (1, np.array([3, 9])), (2, words(2))),
    ),
    Case(
        "exact_gaps",
        (np.array([3, 5]), 9, zeros(256, dtype=np.uint64)),
        (2,),
        free=((0, 0),),
        wrong=((0, np.array([-1, 5])), (0, np.array([3, 9])), (1, 5), (1, 2**31)),
    ),
    Case("add_outer", (zeros(2, 3), zeros(2, 5), zeros(3, 5)), (2,)),
    Case(
        "sparse_needed",
        (np.full(32, 2), np.array([3, 70]), 128, 64, 7, integers(2)),
        (5,),
        fewer=((0, 0),),
        free=((1, 0),),
        wrong=(
            *((0, np.full(32, 3)), (0, np.full(32, -1)), (0, np.arange(32)[::-1].copy())),
            *((1, np.array([70, 3])), (1, np.array([3, 3])), (1, np.array([-1, 3])), (1, np.array([3, 128]))),
            *((2, 0), (2, 2**31), (3, 0), (3, 32), (3, 65537), (4, 0), (4, 65536)),
        ),
    ),
    Case(
        "sparse_place",
        (np.full(32, 2), np.array([3, 70]), 128, 64, 7, np.array([0, 1, 2]), fields(32, 2), raw(2), raw(32, 2), False),
        (6, 8),
        fewer=((0, 0),),
        wrong=(
            *((0, np.full(32, 3)), (1, np.array([70, 3])), (1, np.array([3, 128])), (2, 0), (3, 0), (4, 0)),
            *((5, np.array([0, 9, 9])), (5, np.array([-9, 1, 2])), (9, True), (9, 2)),
        ),
    ),
    Case(
        "sparse_tile",
        (fields(32, 4), np.array([0, 1, 4]), 64, 7, True, fields(32, 4), zeros(32), 15, zeros(32, 128)),
        (8,),
        fewer=((8, 0), (8, 1)),
        wrong=(
            *((1, np.array([0, 5, 4])), (1, np.array([0, 3, 2])), (1, np.array([-1, 1, 4])), (1, np.array([0, 1, 5]))),
            *((2, 0), (2, 32), (2, 65537), (3, 0), (3, 65536), (4, False), (4, 2), (7, 256)),
        ),
    ),
    Case(
        "sparse_tile",
        (raw(32, 4), np.array([0, 1, 4]), 64, 7, False, words(4, 32), "F32", zeros(32, 128)),
        (7,),
        fewer=((7, 0), (7, 1)),
        wrong=((1, np.array([0, 5, 5])), (4, True), (6, "BF16"), (6, "F64")),
    ),
    Case(
        "sparse_within",
        (fields(32, 4), np.array([0, 1, 4]), np.array([64, 64]), 7),
        (),
        wrong=(
            *((1, np.array([0, 5, 4])), (1, np.array([0, 3, 2])), (1, np.array([-1, 1, 4])), (1, np.array([0, 1, 5]))),
            *((3, 0), (3, 65536)),
        ),
    ),
    Case(
        "upload",
        UPLOAD,
        (6, 13),
        free=((0, 0), (1, 0), (2, 0), (6, 0)),
        wrong=(
            *((0, pieces(offset=-1)), (0, pieces(length=17)), (0, pieces(length=-1)), (0, pieces(length=7))),
            *((0, pieces(first_copy=-1)), (0, pieces(last_copy=2)), (0, pieces(first_copy=2))),
            *((0, pieces(first_padding=-1)), (0, pieces(last_padding=2))),
            *((1, np.array([[1, 0, 8]])), (1, np.array([[-1, 0, 8]])), (1, np.array([[0, 0, -8]]))),
            *((2, np.array([[1, 8, 0]])), (2, np.array([[0, 9, 0]])), (2, np.array([[-1, 8, 0]]))),
            *((3, 2**63), (4, 0), (4, 2**31), (5, 2), (7, np.array([9, 9])), (7, np.array([-1, -1]))),
            *((9, 2**31), (10, 2**64), (11, 2**64)),
        ),
    ),
]
