"""The vectors of ``lowbit`` terms, good and bad."""

from __future__ import annotations

from vector_tools import change, change_buffer, coded, makes_arrays, one_tensor, vector

from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout


@makes_arrays("lowbit")
def arrays(layout: LowbitLayout, rows: int, columns: int, seed: int) -> LowbitArrays:  # noqa: ARG001
    """Return made-up content of a ``lowbit`` term."""
    if layout.axis == "column":
        scales = coded(layout, 1, columns, columns, 3).scales
        return LowbitArrays(coded(layout, rows, columns, 1, 3).codes, scales)
    return coded(layout, rows, columns, layout.scales(columns), 3)


@vector("ok", "lowbit 1 bit midrise: signs, one scale a row, ragged rows and columns")
def lowbit_k1() -> bytes:
    return one_tensor(LowbitLayout(1, "midrise"), 37, 45)


@vector(
    "ok",
    "lowbit 7 bits midtread in planes of 4, 2 and 1 bits, F32 scales for every 20 columns, of which the last has 5",
)
def lowbit_k7_groups() -> bytes:
    return one_tensor(LowbitLayout(7, "midtread", "F32", 20), 33, 45)


@vector("ok", "lowbit 3 bits asymmetric: a zero point for every scale")
def lowbit_k3_zero_points() -> bytes:
    return one_tensor(LowbitLayout(3, "asymmetric", "BF16", 16), 70, 70)


@vector("ok", "lowbit 1 bit midrise, one scale a column")
def lowbit_k1_columns() -> bytes:
    return one_tensor(LowbitLayout(1, "midrise", axis="column"), 40, 50)


@vector("invalid", "a lowbit layout with scales of columns and a scale group", "scale group 0")
def lowbit_column_groups() -> bytes:
    data = one_tensor(LowbitLayout(1, "midrise", axis="column"), 32, 32)
    return change(data, lambda index: index["layouts"][0].update(scale_group=8))


@vector("invalid", "a lowbit term, which draws nothing, has a seed", "has seed 0")
def lowbit_seed() -> bytes:
    return change(one_tensor(LowbitLayout(4), 32, 32), lambda index: index["tensors"]["w"]["terms"][0].update(seed=1))


@vector("invalid", "a lowbit field of 7 on a midtread grid of 3 bits", "the grid ends at 6")
def lowbit_field_beyond_grid() -> bytes:
    # Planes of 2 and 1 bits: one word each.
    data = one_tensor(LowbitLayout(3), 32, 4)
    return change_buffer(change_buffer(data, "codes", 0, 0xFF), "codes", 128, 0x0F)


@vector("invalid", "a zero point of 8 on a grid of 3 bits", "a zero point is 8")
def lowbit_zero_point_beyond_grid() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(3, "asymmetric"), 32, 32), "zero_points", 5, 8)


@vector("invalid", "the zero point of a row that does not exist is set", "unused bits of the zero_points")
def lowbit_zero_point_of_no_row() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(3, "asymmetric"), 30, 32), "zero_points", 31, 1)


@vector("invalid", "the scale of a column is negative", "negative or not finite")
def lowbit_negative_column_scale() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(1, "midrise", axis="column"), 32, 32), "scales", 9, 0xBF)


@vector("invalid", "a lowbit term has a number of slots", "expected the keys")
def lowbit_with_slots() -> bytes:
    return change(one_tensor(LowbitLayout(4), 32, 32), lambda index: index["tensors"]["w"]["terms"][0].update(slots=0))
