"""Decoding a delta on the CPU: torch's decoder of each kind beside the codec's, one thread, one matrix.

    python benchmarks/decode.py [--size 4096] [--tokens 128] [--repeats 5]

A merge and a prompt decode a delta once. For each kind, the table gives the seconds of the numpy decoder and, as shares
of them, the time of the compiled one, of torch's decoder, and of a prompt of ``--tokens`` tokens through the product
that serves it, less what the same product costs with a delta that is dense already.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from common import Figure, report, seconds

from deltafmt import core
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.kernels.products import operand_delta
from deltafmt.kernels.registry import kernels_of
from deltafmt.methods import DARE, RTN, SVD, DeltaDQ, Method
from deltafmt.methods.base import DeltaRows
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.layout import TermLayout

# The kinds by a method that gives them; sparse keeps one element of eight in 4 bits.
METHODS: dict[str, Method] = {
    "sparse 1:8 k=4": DARE(drop=0.875, bits=4),
    "nm 4:16 k=4": DeltaDQ(4, 16, 4),
    "nm 4:16 k=4 fixed": DeltaDQ(4, 16, 4, index="fixed"),
    "lowbit k=4": RTN(bits=4),
    "lowrank 64 BF16": SVD(rank=64),
}
# What a merge or a prompt may take of the numpy decoder's time.
MOST = 1.5


def packed_term(method: Method, size: int) -> tuple[TermLayout, dict[str, np.ndarray], int]:
    """Return the layout, the packed arrays and the slots of a random delta."""
    rng = np.random.default_rng(0)
    finetuned = rng.standard_normal((size, size), np.float32) * np.float32(0.01)
    if method.name == "svd":
        # A matrix of low rank, so that its factorization is quick.
        finetuned = (rng.standard_normal((size, 64), np.float32) @ rng.standard_normal((64, size), np.float32)) / 64
    raw = finetuned.view(np.uint32)
    rows = DeltaRows(raw, "F32", np.zeros_like(raw), "F32", 0)
    (planned,), (arrays,) = method.layouts(size, size), method.compress(rows, 1)
    layout, slots = fitted(planned, arrays, size)
    packed = blank(layout, size, size, slots)
    term_codec(layout, size, size, 1 if layout.seeded else 0, slots).encode(arrays, packed, 0)
    return layout, packed, slots


def measure(size: int, tokens: int, repeats: int) -> Iterator[Figure]:
    """Yield the figures of every kind."""
    x = torch.randn(tokens, size)
    for name, method in METHODS.items():
        layout, packed, slots = packed_term(method, size)
        seed = 1 if layout.seeded else 0
        codec = term_codec(layout, size, size, seed, slots)
        buffers = {}
        for key, form in layout.buffers(size, size, slots).items():
            raw = torch.from_numpy(packed[key].reshape(-1).view(np.uint8))
            buffers[key] = raw.view(BUFFER_DTYPES[form.dtype]).view(form.shape)
        operand = Operand(layout, size, size, buffers, seed, slots)
        delta = operand_delta(operand)
        with core.reference_only():
            by_numpy = seconds(lambda codec=codec, packed=packed: codec.decode(packed, 0, size), repeats)
        compiled = seconds(lambda codec=codec, packed=packed: codec.decode(packed, 0, size), repeats)
        by_torch = seconds(lambda operand=operand: operand_delta(operand), repeats)
        kernels = kernels_of(layout)
        prompt = seconds(lambda kernels=kernels, operand=operand: kernels.multiply(x, operand), repeats)
        dense = seconds(lambda delta=delta: x @ delta.T, repeats)
        target = MOST if layout.kind == "sparse" else None
        yield Figure(f"{name}: numpy decoder", by_numpy, "s")
        yield Figure(f"{name}: {core.describe()} decoder", compiled / by_numpy, "of numpy")
        yield Figure(f"{name}: torch decoder (merge)", by_torch / by_numpy, "of numpy", target, at_most=True)
        label = f"{name}: prompt of {tokens} tokens, less its dense product"
        yield Figure(label, (prompt - dense) / by_numpy, "of numpy", target, at_most=True)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for figure in measure(options.size, options.tokens, options.repeats):
        figures.append(figure)
        print(*figure.row(), flush=True)
    report("decode", figures, torch=torch.__version__)


if __name__ == "__main__":
    main()
