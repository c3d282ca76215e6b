"""Products for a GPU: few kernels, because each takes seconds to compile; shapes that no tile divides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from deltafmt.kernels.nm.launch import launch_expand
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.products import fused_linear, matmul_, operand_delta
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.nm.layout import NMLayout
from operands import Product, product, random_operand

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One layout with one shape: what is drawn does not change which kernels are compiled.

    Attributes:
        layout: of all deltas.
        parts: rows of each part.
        columns: of all parts.
        slots: deltas.
        few, many: tokens that are spread over the slots (and none), and tokens of slot 0 in addition.
        dtype: of x and of the outputs.
    """

    layout: NMLayout
    parts: tuple[int, ...]
    columns: int
    slots: int
    few: int
    many: int
    dtype: torch.dtype

    def __str__(self) -> str:
        """Name the case in pytest's output."""
        shape = "+".join(map(str, self.parts)) + f"x{self.columns}"
        return f"{self.layout.describe()}, {shape}, {self.few}+{self.many} tokens, {str(self.dtype)[6:]}"

    def operands(self, rng: np.random.Generator, device: str = "cuda") -> list[list[Operand]]:
        """Draw a slot's operands, by part and term; a part may have fewer rows than the base, or no delta."""
        held = []
        for rows in self.parts:
            fewer = rows if rng.random() < 0.7 else int(rng.integers(0, rows))
            held.append([random_operand(rng, self.layout, fewer, self.columns, device)] if fewer else [])
        return held

    def draw(self, seed: int, device: str = "cuda") -> Product:
        """Draw a product."""
        rng = np.random.default_rng(seed)
        slots = [self.operands(rng, device) for _ in range(self.slots)]
        spread = rng.integers(-1, self.slots + 1, self.few)
        spread[0] = rng.integers(self.slots)
        tokens = rng.permutation(np.concatenate([spread, np.zeros(self.many, np.int64)])).tolist()
        return product(rng, self.parts, self.columns, slots, tokens, self.dtype, device)


CASES = [
    # One token, and a few: small programs. Columns that the steps divide, and columns that end in a group.
    Case(NMLayout(1, 32, 4), (1021,), 2047, 1, 1, 0, BF16),
    Case(NMLayout(1, 32, 4, share=4), (1000, 260, 77), 4096, 3, 5, 0, BF16),
    Case(NMLayout(4, 16, 4, "fixed", share=4), (515,), 1500, 2, 3, 0, F16),
    Case(NMLayout(4, 16, 4), (700, 33), 1111, 2, 2, 0, F32),
    Case(NMLayout(1, 8, 1, "seeded", "midrise", 4), (300,), 2048, 2, 4, 0, BF16),
    Case(NMLayout(2, 16, 3, "seeded", "midrise", 2, "F32"), (300,), 999, 2, 4, 0, BF16),
    Case(NMLayout(2, 32, 5, "fixed"), (300, 300, 1), 999, 2, 2, 0, BF16),
    Case(NMLayout(1, 128, 6, "fixed", "midrise", 2), (400,), 3001, 2, 1, 0, F16),
    Case(NMLayout(2, 8, 8, "seeded", "midtread", 8), (700,), 517, 3, 4, 0, F32),
    Case(NMLayout(1, 2, 2, "fixed", "midrise", 1), (65,), 300, 2, 2, 0, BF16),
    Case(NMLayout(16, 64, 8, "seeded"), (129,), 700, 1, 1, 0, BF16),
    # Many programs: more rows each.
    Case(NMLayout(1, 32, 4), (4100,), 415, 12, 60, 0, BF16),
    Case(NMLayout(1, 8, 3, "fixed", "midtread", 4), (4200, 1100), 250, 9, 40, 0, F16),
    # Entry by entry.
    Case(NMLayout(3, 7, 3, "fixed"), (500,), 1000, 2, 4, 0, BF16),
    Case(NMLayout(5, 12, 6, "fixed", "midtread", 2, "F32"), (300, 44), 1003, 3, 8, 0, F32),
    Case(NMLayout(4, 16, 4, "seeded", "midrise", 4, scale_group=32), (300,), 1003, 3, 3, 0, F16),
    # Many tokens: dense tiles, beside slots with few.
    Case(NMLayout(1, 32, 4), (300, 200), 999, 3, 5, 130, BF16),
    Case(NMLayout(4, 16, 4, "fixed", share=4), (500,), 640, 2, 3, 115, F16),
    Case(NMLayout(3, 7, 3, "fixed", "midrise", 2), (100,), 500, 2, 3, 200, BF16),
    Case(NMLayout(1, 8, 8, "seeded", "midrise"), (100,), 500, 1, 2, 60, BF16),
    Case(NMLayout(2, 16, 2, "seeded", "midtread", 1, "F32", 16), (100,), 500, 1, 2, 140, F32),
]


FUSED = [CASES[0], CASES[1], CASES[2], CASES[5]]
DENSE = [
    (NMLayout(1, 32, 4, share=4), BF16),
    (NMLayout(3, 7, 3, "fixed", "midrise", 2), F16),
    (NMLayout(6, 100, 5, "fixed", "midtread", 8, scale_group=4), F32),
]
DENSE_SHAPE = (555, 1003)


def draw_fused(case: Case, seed: int) -> tuple[torch.Tensor, list[torch.Tensor], OperandTable]:
    """Draw one token, the base's weights, and a table whose slot 1 has a whole delta."""
    rng = np.random.default_rng(seed)
    table = OperandTable(2, case.parts, case.columns, "cuda")
    for slot in range(2):
        table.put(slot, [[random_operand(rng, case.layout, rows, case.columns, "cuda")] for rows in case.parts])
    weights = [torch.randn(rows, case.columns, device="cuda", dtype=case.dtype) for rows in case.parts]
    return torch.randn(1, case.columns, device="cuda", dtype=case.dtype), weights, table


def compile_case(number: int) -> None:
    """Launch the kernels of a case once, so that Triton's cache holds them."""
    made = CASES[number].draw(0)
    matmul_([output.inner for output in made.outputs], made.x, made.table, made.segments)


def compile_fused(number: int) -> None:
    """Likewise for base and delta in one kernel."""
    x, weights, table = draw_fused(FUSED[number], 0)
    fused_linear(x, weights, table, 1)


def compile_dense(number: int) -> None:
    """Likewise for dense rows."""
    layout, dtype = DENSE[number]
    rows, columns = DENSE_SHAPE
    operand = random_operand(np.random.default_rng(0), layout, rows, columns, "cuda")
    base = torch.zeros(467, columns + 7, dtype=dtype, device="cuda")[:, 3:-4]
    launch_expand(operand, base, base, 33, 500)
    operand_delta(operand)
    operand_delta(operand, 33, 500)


def compile_job(job: tuple[Callable[[int], None], int]) -> None:
    """Do one of :data:`JOBS`."""
    compile_numbered, number = job
    compile_numbered(number)
    torch.cuda.synchronize()


JOBS = [(compile_case, number) for number in range(len(CASES))]
JOBS += [(compile_fused, number) for number in range(len(FUSED))]
JOBS += [(compile_dense, number) for number in range(len(DENSE))]
