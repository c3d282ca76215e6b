"""The Triton kernels on a GPU: products, dense rows and embeddings against the reference and against float64."""

from __future__ import annotations

import fcntl
import multiprocessing
import os

import numpy as np
import pytest

from deltafmt.terms.nm.layout import NMLayout

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU, and a Triton that compiles", allow_module_level=True)

from deltafmt.kernels.nm import launch
from deltafmt.kernels.products import can_fuse, embedding_, fused_linear, matmul_, operand_delta
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from gpu_cases import BF16, CASES, DENSE, DENSE_SHAPE, F16, F32, FUSED, JOBS, Case, compile_job, draw_fused
from operands import ROUNDING, Inside, Product, damaged_operand, fused_exactly, product, random_operand
from reference import naive_delta, naive_embedding_, naive_matmul_

SEEDS = 6


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile all cases at once, in as many processes as there are cores; the tests then find them in the cache.

    Where tests run in parallel, the first process to come here compiles, and the others wait for it.
    """
    cores = min(len(os.sched_getaffinity(0)), len(JOBS), 16)
    if cores < 4:
        return
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with open(shared / "kernels-compiled", "a+") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        done.seek(0)
        if not done.read():
            with multiprocessing.get_context("spawn").Pool(cores) as pool:
                pool.map(compile_job, JOBS, chunksize=1)
            done.write("done")


def decoded_rounding(layout: NMLayout, dtype: torch.dtype) -> float:
    """Return what the dot kernel loses of a value: nothing, unless groups of entries have scales of their own."""
    return ROUNDING[dtype] if layout.scale_group and dtype != F32 else 0.0


def run(made: Product, *, terms: int = 1, values: float = 0.0) -> None:
    """Launch a product and compare it with float64 and with the reference on the GPU."""
    exact, size, touched = made.expected()
    by_naive = [output.inner.clone() for output in made.outputs]
    naive_matmul_(by_naive, made.x, made.table, made.segments)
    outputs = [output.inner for output in made.outputs]
    matmul_(outputs, made.x, made.table, made.segments)
    made.check(exact, size, touched, terms, values)
    for output, reference, magnitude, changes in zip(outputs, by_naive, size, touched, strict=True):
        rounding = 32 * ROUNDING[F32] + (2 * terms * ROUNDING[output.dtype] if output.dtype != F32 else 0) + values
        error = (output.double() - reference.double()).abs()[changes]
        assert (error <= magnitude[changes] * rounding + 2.0**-24).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: Case) -> None:
    for seed in range(SEEDS):
        run(case.draw(seed), values=decoded_rounding(case.layout, case.dtype) if case.many else 0.0)


def test_sums_and_slots_of_several_layouts() -> None:
    first, second, columns = CASES[0].layout, CASES[13].layout, 1000
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)

        def term(layout: NMLayout, rows: int, rng: np.random.Generator = rng):
            return random_operand(rng, layout, rows, columns, "cuda")

        held = [
            [[term(first, 500), term(first, 333)]],
            [[term(first, 500), term(second, 500)]],
            [[term(second, 20)]],
            [[]],
        ]
        run(product(rng, [500], columns, held, [0, 1, 2, 3, -1, 2, 0], BF16, "cuda"), terms=2)


def test_no_token_has_a_delta() -> None:
    rng = np.random.default_rng(0)
    for tokens in ([], [-1], [-1, -1, 9]):
        made = product(rng, [300], 999, [CASES[16].operands(rng)[:1]], tokens, BF16, "cuda")
        run(made)
        made.segments = Segments.of(tokens, 1, "cuda")
        run(made)


@pytest.mark.parametrize("tokens", [1, 230])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_base_and_delta_at_once(case: Case, tokens: int) -> None:
    for seed in range(SEEDS):
        x, weights, table = draw_fused(case, seed)
        assert can_fuse(table, 1, tokens)
        x = torch.randn(tokens, case.columns, device="cuda", dtype=case.dtype)
        outputs = fused_linear(x, weights, table, 1)
        for output, weight, terms in zip(outputs, weights, table.operands(1), strict=True):
            exact, magnitude = fused_exactly(x, weight, terms[0])
            # One token: float32, rounded once. More: the sum of base and delta is rounded, and the library's sums are.
            allowed = 32 * ROUNDING[F32] * magnitude + 1.01 * ROUNDING[case.dtype] * exact.abs()
            if tokens > 1:
                allowed += 1.01 * ROUNDING[case.dtype] * (exact.abs() + magnitude)
            assert ((output.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("case", [CASES[1], CASES[13], CASES[16]], ids=str)
def test_captured_graph(case: Case) -> None:
    rng = np.random.default_rng(1)
    made = case.draw(0)
    x, slots = torch.zeros_like(made.x), torch.zeros_like(made.segments.slots)
    outputs = [Inside(x.shape[0], rows, case.dtype, "cuda") for rows in case.parts]

    def multiply() -> None:
        # Sorting the tokens is part of the graph.
        segments = Segments(slots, case.slots)
        matmul_([output.inner for output in outputs], x, made.table, segments)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        multiply()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply()

    for seed in range(8):
        # Other tokens, other activations; and in some slots other deltas, or none.
        drawn = case.draw(seed)
        for slot in range(case.slots):
            kind = rng.integers(3)
            if kind == 0:
                made.table.put(slot, case.operands(rng))
            elif kind == 1 and case.slots > 1:
                made.table.clear(slot)
        made.table.layout_tables(slice(0, len(case.parts)))
        x.copy_(torch.randn_like(x))
        slots.copy_(drawn.segments.slots)
        for output in outputs:
            output.inner.normal_()
            output.remember()
        now = Product(made.table, Segments(slots.clone(), case.slots), x, outputs)
        exact, size, touched = now.expected()
        graph.replay()
        now.check(exact, size, touched)


@pytest.mark.parametrize(("layout", "dtype"), DENSE, ids=str)
def test_expand(layout: NMLayout, dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        operand = random_operand(rng, layout, *DENSE_SHAPE, "cuda")
        delta = naive_delta(operand)
        assert torch.equal(operand_delta(operand), delta)
        start, stop = 33, 500
        assert torch.equal(operand_delta(operand, start, stop), delta[start:stop])
        out, base = (Inside(stop - start, 1003, dtype, "cuda") for _ in range(2))
        base.inner.normal_()
        launch.launch_expand(operand, base.inner, out.inner, start, stop)
        assert torch.equal(out.inner, (base.inner.float() + delta[start:stop]).to(dtype))
        outside = out.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


@pytest.mark.parametrize(("layout", "dtype"), DENSE, ids=str)
def test_embedding(layout: NMLayout, dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        table = OperandTable(2, [600], 1003, "cuda")
        table.put(0, [[random_operand(rng, layout, 600, 1003, "cuda")]])
        table.put(1, [[random_operand(rng, layout, 555, 1003, "cuda")] * 2])
        ids = torch.from_numpy(rng.integers(0, 600, 40)).to("cuda")
        ids[:6] = torch.tensor([0, 554, 555, 599, 600, 2**31 - 1])
        slots = torch.from_numpy(rng.integers(-1, 3, 40).astype(np.int32)).to("cuda")
        segments = Segments(slots, 2)
        output = Inside(40, 1003, dtype, "cuda")
        wanted = output.wide.clone()
        naive_embedding_(wanted[1:-1, 3:-4], ids, table, segments)
        embedding_(output.inner, ids, table, segments)
        assert torch.equal(output.wide, wanted)


@pytest.mark.parametrize("layout", [CASES[2].layout, CASES[13].layout], ids=NMLayout.describe)
def test_damaged_words_stay_inside(layout: NMLayout) -> None:
    # Whole, so that reads beyond the end of the buffers would be seen by compute-sanitizer.
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        operand = damaged_operand(rng, layout, 500, 1000, "cuda")
        made = product(rng, [515], 1000, [[[operand]]], [0, -1, 0, 0], F16, "cuda")
        matmul_([made.outputs[0].inner], made.x, made.table, made.segments)
        changed = made.outputs[0].changed()
        assert not changed[2].any()
        assert not changed[:, 503:].any()
        assert not changed[:, :3].any()
        assert not changed[[0, -1]].any()
        assert torch.isfinite(made.outputs[0].inner[[0, 2, 3], :500]).all()
        assert torch.isfinite(operand_delta(operand)).all()
