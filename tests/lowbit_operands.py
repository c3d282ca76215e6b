"""Random packed ``lowbit`` operands, and products of them that are compared with float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from deltafmt.codecs.buffers import blank
from deltafmt.codecs.lowbit import LowbitArrays
from deltafmt.codecs.terms import term_codec
from deltafmt.kernels.dense_delta import operand_delta
from deltafmt.kernels.lowbit_matmul.launch import launch_products
from deltafmt.kernels.nm_matmul.operand import OperandTable
from deltafmt.kernels.nm_matmul.segments import Segments
from deltafmt.kernels.packed import BUFFER_DTYPES, PackedOperand
from deltafmt.layout.lowbit import LowbitLayout
from operands import ROUNDING, Device, Inside

Guard = Callable[[list[torch.Tensor], list[torch.Tensor]], contextlib.AbstractContextManager[object]]


LAYOUTS = [
    *(LowbitLayout(bits, "midrise") for bits in range(1, 9)),
    LowbitLayout(4),
    LowbitLayout(3, "midtread", "F32", 32),
    LowbitLayout(4, "asymmetric", "BF16", 64),
    LowbitLayout(7, "asymmetric"),
    LowbitLayout(1, "midrise", "BF16", 0, "column"),
    LowbitLayout(2, "midrise", "F32", 0, "column"),
]


def random_lowbit(
    rng: np.random.Generator, layout: LowbitLayout, rows: int, columns: int, device: Device = "cpu"
) -> PackedOperand:
    """Draw an operand."""
    scales = (1, columns) if layout.axis == "column" else (rows, layout.scales(columns))
    values = rng.uniform(0.5, 2, scales).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    codes = rng.integers(0, layout.top + 1, (rows, columns)).astype(np.uint8)
    zeros = rng.integers(0, layout.top + 1, scales).astype(np.uint8) if layout.has_zero_points else None
    packed = blank(layout, rows, columns)
    term_codec(layout, rows, columns).encode(LowbitArrays(codes, values, zeros), packed, 0)
    buffers = {}
    for name, form in layout.buffers(rows, columns).items():
        raw = torch.from_numpy(np.ascontiguousarray(packed[name]).reshape(-1).view(np.uint8).copy())
        buffers[name] = raw.view(BUFFER_DTYPES[form.dtype]).view(form.shape).to(device)
    return PackedOperand(layout, rows, columns, buffers)


def check_lowbit(
    rng: np.random.Generator,
    layout: LowbitLayout,
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
        [[random_lowbit(rng, layout, rows, columns, device)] for rows in parts],
        [[random_lowbit(rng, layout, max(rows - 3, 1), columns, device)] for rows in parts],
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
    for token, slot in enumerate(tokens):
        for part, terms in enumerate(held[slot] if slot in (0, 1) else ()):
            delta, wide = operand_delta(terms[0]).double(), x.inner[token].double()
            reach = delta.abs().max(0).values + 2 * layout.top  # codes and zero points are summed apart
            exact[part][token, : terms[0].rows] += delta @ wide
            size[part][token, : terms[0].rows] += (wide.abs() * reach).sum()
    readable = [x.inner, *(tensor for terms in held for (term,) in terms for tensor in term.tensors())]
    with guard(readable, [output.inner for output in outputs]):
        launch_products([output.inner for output in outputs], x.inner, table, segments)
    for output, wanted, magnitude in zip(outputs, exact, size, strict=True):
        changed = output.changed()
        changed[1:-1, 3:-4] = False
        assert not changed.any()
        allowed = 32 * ROUNDING[torch.float32] * magnitude + 1.01 * ROUNDING[dtype] * wanted.abs() + 2.0**-24
        assert ((output.inner.double() - wanted).abs() <= allowed).all()
