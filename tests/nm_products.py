"""Helpers of the tests of interpreted nm kernels: layouts, drawn products, and one product launched and compared.

``test_kernels.py`` and ``test_kernels_rows.py`` use them. A test skips itself before it imports this module, which
needs torch and Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deltafmt.kernels.launching import launch_products
from deltafmt.kernels.nm import dense, elements, gather, launch
from deltafmt.kernels.operand import Operand
from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.nm.layout import BITS, SHARES, NMLayout
from index_cases import INDEX_CASES
from interpreter import guarded, pick_directly
from operands import ROUNDING, Product, product, random_operand
from reference import naive_matmul_
from strategies import generators, sizes

F32, F16 = torch.float32, torch.float16
Rng = np.random.Generator


SAMPLES = [layout for known in INDEX_CASES.values() for layout in known.samples]
# The encodings that kernels read.
READ = [name for name, encoding in ENCODINGS.items() if encoding.plain == name]

# Each width and each share, seeded and fixed, one and several planes of codes and positions; the columns end within a
# group, and rows within a super-tile.
GATHERED = [
    NMLayout(1, 32, 4, "seeded", share=4),
    NMLayout(4, 16, 4, "seeded"),
    NMLayout(1, 8, 1, "seeded", "midrise"),
    NMLayout(2, 16, 2, "seeded", "midrise", 2),
    NMLayout(2, 4, 6, "seeded", "midtread", 2, "F32"),
    NMLayout(8, 8, 8, "seeded", "midrise", 8),
    NMLayout(1, 128, 4, "seeded", "midrise", 2),
    NMLayout(16, 64, 8, "seeded"),
    NMLayout(1, 2, 5, "seeded", "midtread", 4),
    NMLayout(4, 16, 4, "fixed", share=4),
    NMLayout(1, 8, 3, "fixed", "midtread", 2),
    NMLayout(2, 32, 8, "fixed", "midrise", 1, "F32"),
    NMLayout(1, 4, 1, "fixed", "midrise", 8),
    NMLayout(4, 128, 6, "fixed", "midtread", 2),
    NMLayout(1, 64, 5, "fixed", "midrise", 4),
    NMLayout(2, 2, 2, "fixed"),
    *(layout for layout in SAMPLES if launch.step_elements(layout)),
]

NOT_UNROLLED = [
    NMLayout(3, 7, 3, "fixed"),
    NMLayout(5, 12, 6, "fixed", "midtread", 2, "F32"),
    NMLayout(6, 100, 5, "fixed", "midrise", 8, scale_group=4),
    NMLayout(3, 16, 4, "seeded", "midtread", 4),
    NMLayout(4, 16, 2, "seeded", "midrise", 2, "F32", 8),
    NMLayout(1, 8, 1, "seeded", "midrise", 1, "BF16", 5),
    NMLayout(2, 255, 8, "fixed", "midrise", 4),
    *(layout for layout in SAMPLES if not launch.step_elements(layout)),
]


@contextmanager
def small_tiles() -> Iterator[None]:
    """Cut few tokens into tiles of several, as launches cut many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tile_tokens", lambda longest: 1 if longest == 1 else 2 if longest == 2 else 4)
        yield


@contextmanager
def kernels_called() -> Iterator[list[str]]:
    """Give the names of the kernels that are launched meanwhile."""
    called: list[str] = []

    class Recorder:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            called.append(self.kernel.__name__)
            return self.kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((gather, "gather_kernel"), (elements, "element_kernel"), (dense, "dot_kernel")):
            patch.setattr(module, name, Recorder(getattr(module, name)))
        yield called


def run(made: Product, *, terms: int = 1, values: float = 0.0) -> list[str]:
    """Launch a product and compare it; return the kernels that were launched."""
    exact, size, touched = made.expected()
    by_naive = [output.inner.clone() for output in made.outputs]
    naive_matmul_(by_naive, made.x, made.table, made.segments)
    outputs = [output.inner for output in made.outputs]
    with guarded(made.readable(), outputs) as memory, kernels_called() as called:
        launch_products(outputs, made.x, made.table, made.segments)
    for output, changes in zip(outputs, touched, strict=True):
        assert torch.equal(memory.stored_to(output), changes)
    made.check(exact, size, touched, terms, values)
    for output, reference, magnitude, changes in zip(outputs, by_naive, size, touched, strict=True):
        rounding = 32 * ROUNDING[F32] + (2 * terms * ROUNDING[F16] if output.dtype == F16 else 0) + values
        error = (output.double() - reference.double()).abs()[changes]
        assert (error <= magnitude[changes] * rounding + 2.0**-24).all()
    return called


@contextmanager
def blocks(mask_rows: int, steps: int, classes: int) -> Iterator[None]:
    """Shape gather programs otherwise than such small matrices would be: many chunks, several warps of rows."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = launch.gather_blocks

        def shaped(*arguments) -> launch.Blocks:
            few = chosen(*arguments)
            return dataclasses.replace(few, mask_rows=mask_rows, steps=min(steps, few.steps), classes=classes)

        patch.setattr(launch, "gather_blocks", shaped)
        patch.setattr(gather, "pick", pick_directly)
        yield


def decoded_rounding(layout: NMLayout, dtype: torch.dtype) -> float:
    """Return what the dot kernel loses of a value: nothing, unless groups of entries have scales of their own."""
    return ROUNDING[dtype] if layout.scale_group and dtype != F32 else 0.0


def operands(rng: Rng, layout: NMLayout, parts: Sequence[int], columns: int) -> list[list[Operand]]:
    """Return a slot's operands: one term for each part, none where a part has no rows."""
    return [[random_operand(rng, layout, rows, columns)] if rows else [] for rows in parts]


def fewer_rows(rng: Rng, layout: NMLayout, parts: Sequence[int], columns: int) -> list[list[Operand]]:
    """Return a slot's operands; a delta has at most the rows of its part, and may leave a part to the base."""
    return operands(rng, layout, [int(rng.integers(0, rows, endpoint=True)) for rows in parts], columns)


@st.composite
def gathered(draw: st.DrawFn) -> NMLayout:
    """Give layouts that the gather kernel unrolls, at most 32 entries."""
    log_group = draw(st.integers(1, 7))
    keep, group = 2 ** draw(st.integers(0, min(log_group, 4))), 2**log_group
    bits = draw(st.sampled_from(BITS))
    layout = NMLayout(
        keep,
        group,
        bits,
        draw(st.sampled_from([name for name in READ if keep in INDEX_CASES[name].n(group)])),
        draw(st.sampled_from(("midrise",) if bits == 1 else ("midtread", "midrise"))),
        draw(st.sampled_from(SHARES)),
        draw(st.sampled_from(("BF16", "F32"))),
    )
    return layout if 0 < launch.step_elements(layout) <= 32 else dataclasses.replace(layout, n=1, bits=8)


@st.composite
def any_layout(draw: st.DrawFn, max_group: int = 128) -> NMLayout:
    """Give layouts of any N:M."""
    index = draw(st.sampled_from(READ))
    group = draw(INDEX_CASES[index].m(max_group))
    bits = draw(st.sampled_from(BITS))
    return NMLayout(
        draw(st.sampled_from(INDEX_CASES[index].n(group))),
        group,
        bits,
        index,
        draw(st.sampled_from(("midrise",) if bits == 1 else ("midtread", "midrise"))),
        draw(st.sampled_from(SHARES)),
        draw(st.sampled_from(("BF16", "F32"))),
        draw(st.one_of(st.just(0), st.integers(1, 200))),
    )


@st.composite
def products(draw: st.DrawFn, layout: NMLayout, most: int, max_tokens: int, max_columns: int) -> Product:
    """Give products with deltas of one layout; at most ``most`` parts and slots."""
    rng = draw(generators())
    parts, columns = draw(st.lists(sizes(70), min_size=1, max_size=most)), draw(sizes(max_columns))
    slots = draw(st.integers(1, most))
    tokens = draw(st.lists(st.integers(-1, slots), min_size=1, max_size=max_tokens))
    held = [fewer_rows(rng, layout, parts, columns) for _ in range(slots)]
    return product(rng, parts, columns, held, tokens, draw(st.sampled_from((F32, F16))))
