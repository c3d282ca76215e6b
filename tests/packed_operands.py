"""Random packed operands of every kind but ``nm``, and products of them that are compared with float64."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from deltafmt.kernels.launching import launch_products
from deltafmt.kernels.lowrank.naive import vectors
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.buffers import blank
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.sparse.codec import SparseArrays
from deltafmt.terms.sparse.layout import SparseLayout
from operands import ROUNDING, Device, Inside
from reference import naive_delta

Guard = Callable[[list[torch.Tensor], list[torch.Tensor]], contextlib.AbstractContextManager[object]]

LOWBIT = [
    *(LowbitLayout(bits, "midrise") for bits in range(1, 9)),
    LowbitLayout(4),
    LowbitLayout(3, "midtread", "F32", 32),
    LowbitLayout(4, "asymmetric", "BF16", 64),
    LowbitLayout(7, "asymmetric"),
    LowbitLayout(1, "midrise", "BF16", 0, "column"),
    LowbitLayout(2, "midrise", "F32", 0, "column"),
]
LOW_RANK = [
    LowRankLayout(20, "BF16"),
    LowRankLayout(3, "F32"),
    LowRankLayout(45, Coding(1, "midrise", "BF16", 0)),
    LowRankLayout(33, Coding(2, "midrise", "BF16", 128)),
    LowRankLayout(17, Coding(3, "asymmetric", "F32", 32)),
    LowRankLayout(2, Coding(8, "midtread", "BF16", 64)),
    LowRankLayout(9, Coding(7, "asymmetric", "BF16", 0)),
]
SPARSE = [
    SparseLayout("BF16", 8),
    SparseLayout("F32", 3, 256),
    SparseLayout(Coding(4, "midtread"), 4),
    SparseLayout(Coding(1, "midrise"), 5, 256),
    SparseLayout(Coding(3, "midrise", "F32"), 1),
    SparseLayout(Coding(7, "midtread"), 16),
]
LAYOUTS: list[TermLayout] = [*LOWBIT, *LOW_RANK, *SPARSE]


def random_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw scales of about one that BF16 holds."""
    return widen(narrow(rng.uniform(0.5, 2, shape).astype(np.float32), "BF16"), "BF16")


def random_codes(rng: np.random.Generator, coding: Coding, rows: int, columns: int) -> LowbitArrays:
    """Draw the codes of rows of numbers."""
    codes = rng.integers(0, coding.top + 1, (rows, columns)).astype(np.uint8)
    shape = rows, coding.scales(columns)
    zeros = rng.integers(0, coding.top + 1, shape).astype(np.uint8) if coding.has_zero_points else None
    return LowbitArrays(codes, random_scales(rng, shape), zeros)


def random_arrays(rng: np.random.Generator, layout: TermLayout, rows: int, columns: int) -> TermArrays:
    """Draw the content of a term."""
    if isinstance(layout, LowbitLayout):
        drawn = random_codes(rng, layout, rows, columns)
        return dataclasses.replace(drawn, scales=random_scales(rng, (1, columns))) if layout.axis == "column" else drawn
    if isinstance(layout, LowRankLayout):
        sides = []
        for length in (rows, columns):
            if isinstance(layout.factors, Coding):
                side = random_codes(rng, layout.factors, layout.rank, length)
                # Sums of products of two codes of 8 bits would leave F16.
                sides.append(dataclasses.replace(side, scales=side.scales / np.float32(16)))
            else:
                sides.append(narrow(rng.standard_normal((layout.rank, length), np.float32), layout.factors))
        return LowRankArrays(*sides)
    assert isinstance(layout, SparseLayout)
    kept = rng.random((rows, columns)) < rng.choice((0.0, 0.02, 0.3)) * rng.random((rows, 1)) * 2
    ends, column = np.cumsum(kept.sum(axis=1)), np.nonzero(kept)[1]
    if isinstance(layout.values, str):
        return SparseArrays(ends, column, narrow(rng.standard_normal(column.size, np.float32), layout.values))
    codes = rng.integers(0, layout.values.top + 1, column.size).astype(np.uint8)
    return SparseArrays(ends, column, codes, random_scales(rng, (rows, 1)))


def random_packed(
    rng: np.random.Generator, layout: TermLayout, rows: int, columns: int, device: Device = "cpu"
) -> Operand:
    """Draw an operand; a low-rank one has no more vectors than its shape allows."""
    if isinstance(layout, LowRankLayout):
        layout = dataclasses.replace(layout, rank=min(layout.rank, rows, columns))
    arrays = random_arrays(rng, layout, rows, columns)
    layout, slots = fitted(layout, arrays, columns)
    packed = blank(layout, rows, columns, slots)
    term_codec(layout, rows, columns, 0, slots).encode(arrays, packed, 0)
    buffers = {}
    for name, form in layout.buffers(rows, columns, slots).items():
        raw = torch.frombuffer(bytearray(packed[name].tobytes() or b"\0" * 8), dtype=BUFFER_DTYPES[form.dtype])
        buffers[name] = raw[: math.prod(form.shape)].view(form.shape).to(device)
    return Operand(layout, rows, columns, buffers, slots=slots)


def reach(operand: Operand) -> torch.Tensor:
    """Return the magnitude of what is summed for each element of a delta, float64: what rounding errors scale with."""
    layout, buffers = operand.layout, dict(operand.buffers)
    for name, buffer in buffers.items():
        if name.endswith("codes"):
            buffers[name] = torch.full_like(buffer, -1)
        elif name.endswith("zero_points"):
            buffers[name] = torch.zeros_like(buffer)
    if isinstance(layout, LowRankLayout):
        sides = (("u", operand.rows), ("v", operand.columns))
        left, right = (vectors(layout, buffers, side, length).abs().double() for side, length in sides)
        return 4 * left.T @ right
    # Codes and zero points are summed apart.
    return 2 * naive_delta(dataclasses.replace(operand, buffers=buffers)).abs().double()


def check_packed(
    rng: np.random.Generator,
    layout: TermLayout,
    parts: Sequence[int],
    columns: int,
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: Device = "cpu",
    guard: Guard = lambda _readable, _writable: contextlib.nullcontext(),
) -> None:
    """Compare one product of two slots, the second with fewer rows, with float64; run it under a guard of memory."""
    table = OperandTable(2, parts, columns, device)
    held = [
        [[random_packed(rng, layout, rows, columns, device)] for rows in parts],
        [[random_packed(rng, layout, max(rows - 3, 1), columns, device)] for rows in parts],
    ]
    for slot, terms in enumerate(held):
        table.put(slot, terms)
    segments = Segments(torch.tensor(tokens, dtype=torch.int32, device=device), 2)
    x = Inside(len(tokens), columns, dtype, device, read=True)
    outputs = [Inside(len(tokens), rows, dtype, device) for rows in parts]
    for token, slot in enumerate(tokens):
        if slot in (0, 1):
            x.inner[token] = torch.from_numpy(rng.standard_normal(columns, np.float32)).to(device, dtype)
    exact = [output.inner.double() for output in outputs]
    size = [output.abs() for output in exact]
    for slot, parted in enumerate(held):
        chosen = [token for token, own in enumerate(tokens) if own == slot]
        for part, (term,) in enumerate(parted):
            wide = x.inner[chosen].double()
            exact[part][chosen, : term.rows] += wide @ naive_delta(term).double().T
            size[part][chosen, : term.rows] += wide.abs() @ reach(term).T
    readable = [x.inner, *(tensor for terms in held for (term,) in terms for tensor in term.buffers.values())]
    with guard(readable, [output.inner for output in outputs]):
        launch_products([output.inner for output in outputs], x.inner, table, segments)
    for output, wanted, magnitude in zip(outputs, exact, size, strict=True):
        changed = output.changed()
        changed[1:-1, 3:-4] = False
        assert not changed.any()
        allowed = 32 * ROUNDING[torch.float32] * magnitude + 1.01 * ROUNDING[dtype] * wanted.abs() + 2.0**-24
        assert ((output.inner.double() - wanted).abs() <= allowed).all()
