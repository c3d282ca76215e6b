"""Products of packed operands of every kind but ``nm``, compared with float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from deltafmt.kernels.launching import launch_products
from deltafmt.kernels.products import matmul_
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.layout import TermLayout
from operands import ROUNDING, Device, Inside, random_operand, reach
from reference import naive_delta
from term_kinds import CASES

Guard = Callable[[list[torch.Tensor], list[torch.Tensor]], contextlib.AbstractContextManager[object]]

# The samples of every kind that has a kernel, but for nm, whose kernels have tests of their own.
SAMPLES: dict[str, list[TermLayout]] = {
    kind: samples
    for kind, cases in CASES.items()
    if kind != "nm" and (samples := [one for one in cases.samples if kernels_of(one).most_tokens(one) != 0])
}
LAYOUTS = [layout for samples in SAMPLES.values() for layout in samples]
SOME_LAYOUTS = [layout for samples in SAMPLES.values() for layout in (samples[0], samples[-1])]


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
        [[random_operand(rng, layout, rows, columns, device)] for rows in parts],
        [[random_operand(rng, layout, max(rows - 3, 1), columns, device)] for rows in parts],
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
        # In the interpreter the kernels alone; on a GPU the product, which decodes what has too many tokens for them.
        multiply = launch_products if x.inner.device.type == "cpu" else matmul_
        multiply([output.inner for output in outputs], x.inner, table, segments)
    for output, wanted, magnitude in zip(outputs, exact, size, strict=True):
        changed = output.changed()
        changed[1:-1, 3:-4] = False
        assert not changed.any()
        allowed = 32 * ROUNDING[torch.float32] * magnitude + 1.01 * ROUNDING[dtype] * wanted.abs() + 2.0**-24
        assert ((output.inner.double() - wanted).abs() <= allowed).all()
