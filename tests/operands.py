"""Random packed operands, products of them to compare kernels with, and poisoned memory around outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.layout import NMLayout
from reference import naive_delta
from term_kinds import CASES

Device = torch.device | str
# Half the distance of two neighbours at 1: what one rounding loses.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random_operand(
    rng: np.random.Generator, layout: TermLayout, rows: int, columns: int, device: Device = "cpu"
) -> Operand:
    """Draw a valid operand of any kind; its seed may use all 32 bits."""
    seed = int(rng.integers(2**32)) if layout.seeded else 0
    arrays = CASES[layout.kind].arrays(rng, layout, rows, columns, seed)
    layout, slots = fitted(layout, arrays, columns)
    packed = blank(layout, rows, columns, slots)
    term_codec(layout, rows, columns, seed, slots).encode(arrays, packed, 0)
    buffers = {}
    for name, form in layout.buffers(rows, columns, slots).items():
        raw = torch.frombuffer(bytearray(packed[name].tobytes() or b"\0" * 8), dtype=BUFFER_DTYPES[form.dtype])
        buffers[name] = raw[: math.prod(form.shape)].view(form.shape).to(device)
    return Operand(layout, rows, columns, buffers, seed, slots)


def damaged_operand(
    rng: np.random.Generator, layout: NMLayout, rows: int, columns: int, device: Device = "cpu"
) -> Operand:
    """Draw an operand whose words are any bits, those of rows that do not exist included; scales are finite."""
    operand = random_operand(rng, layout, rows, columns, device)

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-(2**31), 2**31, tuple(tensor.shape)).astype(np.int32)).to(device)

    damaged = {name: bits(words) for name, words in operand.buffers.items() if name != "scales"}
    return dataclasses.replace(operand, buffers={**operand.buffers, **damaged})


def reach(operand: Operand) -> torch.Tensor:
    """Return the magnitude of what is summed for each element of a delta, float64: rounding errors scale with it."""
    return CASES[operand.layout.kind].magnitude(operand)


def fused_exactly(x: torch.Tensor, weight: torch.Tensor, operand: Operand) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x @ (weight + delta).T`` and the magnitude of what is summed, both float64."""
    wide, base = x.double(), weight.double()
    exact = wide @ (base + naive_delta(operand).double()).T
    return exact, wide.abs() @ (base.abs() + reach(operand).double()).T


class Inside:
    """A tensor inside a wider one, its rows further apart than they are long.

    What surrounds it is NaN where it is read, so that it would spread, and numbers where it is written, so that adding
    to them would show.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: Device, *, read: bool = False) -> None:
        self.wide = torch.empty((rows + 2, columns + 7), dtype=dtype, device=device)
        if read:
            self.wide.fill_(torch.nan)
        else:
            self.wide.normal_(generator=torch.Generator(device).manual_seed(columns))
        self.inner = self.wide[1:-1, 3 : 3 + columns]
        self._before = self.wide.clone()

    def remember(self) -> None:
        """Take what is in memory now as what was before."""
        self._before = self.wide.clone()

    def changed(self) -> torch.Tensor:
        """Tell which elements of the wide tensor have other bits than before."""
        return _bits(self.wide) != _bits(self._before)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@dataclass
class Product:
    """A table of operands, a batch of tokens for it, and outputs inside poisoned memory.

    Tokens without a slot have NaN for x: should a kernel read it, the outputs show it.
    """

    table: OperandTable
    segments: Segments
    x: torch.Tensor
    outputs: list[Inside]

    def readable(self) -> list[torch.Tensor]:
        """Return the memory that kernels may read."""
        held = [self.x, self.segments.slots]
        for slot in range(self.table.slots):
            held += [
                tensor for terms in self.table.operands(slot) for term in terms for tensor in term.buffers.values()
            ]
        return held

    def expected(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Return for each part the exact outputs, the magnitudes of their sums, and which elements are summed to."""
        exact = [output.inner.double() for output in self.outputs]
        size = [output.abs() for output in exact]
        touched = [torch.zeros_like(output, dtype=torch.bool) for output in exact]
        slots = self.segments.slots.cpu()
        for slot in range(self.table.slots):
            tokens = (slots == slot).nonzero()[:, 0].to(self.x.device)
            for part, terms in enumerate(self.table.operands(slot) if len(tokens) else ()):
                for term in terms:
                    x = self.x[tokens].double()
                    exact[part][tokens, : term.rows] += x @ naive_delta(term).double().T
                    size[part][tokens, : term.rows] += x.abs() @ reach(term).double().T
                    touched[part][tokens, : term.rows] = True
        return exact, size, touched

    def check(
        self,
        exact: Sequence[torch.Tensor],
        size: Sequence[torch.Tensor],
        touched: Sequence[torch.Tensor],
        terms: int = 1,
        values: float = 0.0,
    ) -> float:
        """Compare the outputs with the exact ones, and all memory around them with what it was.

        Args:
            exact, size, touched: of :meth:`expected`, taken before.
            terms: how often an output is rounded to its dtype.
            values: what the rounding of a decoded value to the dtype of x loses, of 1.

        Returns:
            The largest error, of what is allowed.
        """
        worst = 0.0
        for output, wanted, magnitude, changes in zip(self.outputs, exact, size, touched, strict=True):
            changed = output.changed()
            changed[1:-1, 3:-4] &= ~changes
            assert not changed.any(), f"{int(changed.sum())} elements changed that are none of the product's"
            allowed = magnitude * (32 * ROUNDING[torch.float32] + values)
            if output.inner.dtype != torch.float32:
                # Roundings to the output's dtype, of a sum that itself is off by what is allowed.
                allowed = allowed + terms * (ROUNDING[output.inner.dtype] * (magnitude if terms > 1 else wanted.abs()))
                allowed = allowed * 1.01 + 2.0**-25
            error = (output.inner.double() - wanted).abs()[changes]
            ratio = error / allowed[changes]
            assert torch.isfinite(ratio).all()
            worst = max(worst, float(ratio.max()) if ratio.numel() else 0.0)
        assert worst <= 1, f"an error of {worst:.3g} times what rounding explains"
        return worst


def product(
    rng: np.random.Generator,
    parts: Sequence[int],
    columns: int,
    slots: Sequence[Sequence[Sequence[Operand]]],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: Device = "cpu",
) -> Product:
    """Build a product.

    Args:
        rng: draws x.
        parts: rows of each part.
        columns: of all operands.
        slots: the operands of each slot, by part and term.
        tokens: each token's slot.
        dtype: of x and of the outputs.
        device: of everything.
    """
    table = OperandTable(len(slots), parts, columns, device)
    for number, operands in enumerate(slots):
        table.put(number, operands)
    segments = Segments(torch.tensor(tokens, dtype=torch.int32, device=device), len(slots))

    x = Inside(len(tokens), columns, dtype, device, read=True)
    outputs = [Inside(len(tokens), rows, dtype, device) for rows in parts]
    for token, slot in enumerate(tokens):
        if 0 <= slot < len(slots):
            x.inner[token] = torch.from_numpy(rng.standard_normal(columns, np.float32)).to(device, dtype)
    return Product(table, segments, x.inner, outputs)
