"""The Triton kernels, interpreted: products, dense rows and embeddings against the reference and against float64.

Every load and store is checked against the tensors that a kernel may touch. ``tests/test_kernels_gpu.py`` holds the
same checks for a GPU; what the compiler makes of the kernels is in ``tests/test_kernels_compile.py``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.nm.layout import BITS, SHARES, NMLayout
from index_cases import INDEX_CASES
from strategies import generators, sizes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted where there is no GPU, or with TRITON_INTERPRET=1", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt.kernels.launching import launch_embeddings, launch_products
from deltafmt.kernels.nm import dense, elements, fused, gather, launch
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from interpreter import guarded, patch_once, pick_directly
from operands import (
    ROUNDING,
    Inside,
    Product,
    damaged_operand,
    fused_exactly,
    product,
    random_operand,
)
from reference import naive_delta, naive_embedding_, naive_matmul_

patch_once()
F32, F16 = torch.float32, torch.float16


@pytest.fixture(scope="module", autouse=True)
def small_batches_fill_tiles() -> Iterator[None]:
    """Cut few tokens into tiles of several, as launches cut many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tile_tokens", lambda longest: 1 if longest == 1 else 2 if longest == 2 else 4)
        yield


Rng = np.random.Generator


def examples(count: int) -> settings:
    """Return the settings of a slow property: the same ``count`` examples each time, and none made smaller."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


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


def operands(rng: Rng, layout: NMLayout, parts: Sequence[int], columns: int) -> list[list[Operand]]:
    """Return a slot's operands: one term for each part, none where a part has no rows."""
    return [[random_operand(rng, layout, rows, columns)] if rows else [] for rows in parts]


def fewer_rows(rng: Rng, layout: NMLayout, parts: Sequence[int], columns: int) -> list[list[Operand]]:
    """Return a slot's operands; a delta has at most the rows of its part, and may leave a part to the base."""
    return operands(rng, layout, [int(rng.integers(0, rows, endpoint=True)) for rows in parts], columns)


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


@pytest.mark.parametrize("layout", GATHERED, ids=NMLayout.describe)
def test_gather(layout: NMLayout) -> None:
    rng = np.random.default_rng(layout.bits)
    rows = min(32 * layout.share + 9, 137)
    made = product(rng, [rows], 141, [operands(rng, layout, [rows], 141)], [0, 0], F32)
    assert run(made) == ["gather_kernel"]


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


@examples(25)
@given(st.data(), gathered(), generators(), st.sampled_from((F32, F16)))
def test_gather_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    parts = data.draw(st.lists(sizes(70), min_size=1, max_size=3), "parts")
    columns = data.draw(sizes(200), "columns")
    slots = data.draw(st.integers(1, 3), "slots")
    tokens = data.draw(st.lists(st.integers(-1, slots), min_size=1, max_size=4), "tokens")
    held = [fewer_rows(rng, layout, parts, columns) for _ in range(slots)]
    shape = data.draw(st.tuples(st.sampled_from((32, 64, 128)), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 4))))
    with blocks(*shape):
        assert set(run(product(rng, parts, columns, held, tokens, dtype))) <= {"gather_kernel"}


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("layout", [GATHERED[0], GATHERED[9]], ids=NMLayout.describe)
def test_gather_tiles_of_any_size(layout: NMLayout, count: int) -> None:
    rng = np.random.default_rng(count)
    tokens = rng.permutation([0] * count + [1] + [-1]).tolist()
    held = [operands(rng, layout, [40], 70) for _ in range(2)]
    with blocks(32, 2, 4):
        run(product(rng, [40], 70, held, tokens, F32))


def test_gather_more_tokens_than_a_tile() -> None:
    rng = np.random.default_rng(0)
    held = [operands(rng, GATHERED[4], [35], 40) for _ in range(3)]
    with blocks(32, 4, 2):
        run(product(rng, [35], 40, held, rng.integers(-1, 4, 25).tolist(), F16))


@pytest.mark.parametrize("columns", [1, 3, 31, 32, 64, 128, 256])
def test_gather_columns_that_fill_steps_and_that_do_not(columns: int) -> None:
    rng = np.random.default_rng(columns)
    for layout in (NMLayout(1, 32, 4), NMLayout(4, 16, 3, "fixed", share=2)):
        with blocks(32, 2, 4):
            run(product(rng, [33], columns, [operands(rng, layout, [33], columns)], [0], F32))


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


@pytest.mark.parametrize("layout", NOT_UNROLLED, ids=NMLayout.describe)
def test_entries(layout: NMLayout) -> None:
    rng = np.random.default_rng(1)
    parts = [70, 33, 5]
    held = [operands(rng, layout, parts, 150), operands(rng, layout, [64, 0, 4], 150)]
    assert run(product(rng, parts, 150, held, [1, 0, -1, 1, 2], F32)) == ["element_kernel"]


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


@examples(20)
@given(st.data(), any_layout())
def test_entries_any(data: st.DataObject, layout: NMLayout) -> None:
    made = data.draw(products(layout, 3, 4, 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "step_elements", lambda _: 0)
        assert set(run(made)) <= {"element_kernel"}


def decoded_rounding(layout: NMLayout, dtype: torch.dtype) -> float:
    """Return what the dot kernel loses of a value: nothing, unless groups of entries have scales of their own."""
    return ROUNDING[dtype] if layout.scale_group and dtype != F32 else 0.0


@examples(15)
@given(st.data(), any_layout(20))
def test_dot_any(data: st.DataObject, layout: NMLayout) -> None:
    made = data.draw(products(layout, 2, 6, 120))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "gather_tokens", lambda _: 0)
        assert set(run(made, values=decoded_rounding(layout, made.x.dtype))) <= {"dot_kernel"}


@pytest.mark.parametrize("layout", [*GATHERED[:12:2], *NOT_UNROLLED[::2]], ids=NMLayout.describe)
def test_dot_beside_gather(layout: NMLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    # Slot 0 has few tokens, slot 1 many, slot 2 none.
    monkeypatch.setattr(launch, "gather_tokens", lambda _: 2)
    rng = np.random.default_rng(2)
    held = [operands(rng, layout, [70, 35], 90) for _ in range(3)]
    tokens = [1, 0, 1, -1, 1, 0, 1]
    with blocks(32, 2, 4):
        called = run(product(rng, [70, 35], 90, held, tokens, F16), values=decoded_rounding(layout, F16))
    assert called == ["gather_kernel" if launch.step_elements(layout) else "element_kernel", "dot_kernel"]


def test_dot_more_tokens_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gather_tokens", lambda _: 48)
    rng = np.random.default_rng(3)
    held = [operands(rng, GATHERED[0], [35], 70) for _ in range(2)]
    tokens = rng.permutation([0] * 131 + [1] * 70 + [-1] * 5).tolist()
    assert run(product(rng, [35], 70, held, tokens, F32)) == ["gather_kernel", "dot_kernel"]


@pytest.mark.parametrize("dtype", [F32, F16])
def test_sums_and_slots_of_several_layouts(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    first, second, third = GATHERED[1], NOT_UNROLLED[0], GATHERED[10]
    parts, columns = [40, 70], 66

    def term(layout: NMLayout, rows: int) -> Operand:
        return random_operand(rng, layout, rows, columns)

    held = [
        [[term(first, 40), term(first, 33)], [term(first, 70)]],
        [[term(first, 40), term(second, 40)], []],
        [[], [term(third, 70), term(first, 20), term(third, 69)]],
        [[], []],
    ]
    with blocks(32, 2, 4):
        called = run(product(rng, parts, columns, held, [0, 1, 2, 3, -1, 2, 0], dtype), terms=3)
    assert sorted(called) == ["element_kernel"] + ["gather_kernel"] * 4


def test_more_parts_than_a_launch_takes() -> None:
    rng = np.random.default_rng(5)
    parts = [40, 3, 33, 64, 7]
    held = [operands(rng, GATHERED[1], parts, 50), operands(rng, GATHERED[1], [0, 0, 0, 60, 7], 50)]
    with blocks(32, 2, 4):
        assert run(product(rng, parts, 50, held, [1, 0, -1], F32)) == ["gather_kernel"] * 2


def test_replaced_and_cleared_slots() -> None:
    rng = np.random.default_rng(6)
    layout, parts, columns = GATHERED[1], [40, 33], 50
    made = product(rng, parts, columns, [operands(rng, layout, parts, columns) for _ in range(3)], [0, 1, 2], F32)
    with blocks(32, 2, 4):
        run(made)
        records = made.table.layout_tables(slice(0, 3))[0].records
        made.table.put(0, operands(rng, layout, [33, 0], columns))
        made.table.clear(2)
        for output in made.outputs:
            output.remember()
        run(made)
    assert made.table.layout_tables(slice(0, 3))[0].records is records


@pytest.mark.parametrize("tokens", [[], [-1], [-1, -1, 5]])
def test_no_token_has_a_delta(tokens: list[int]) -> None:
    rng = np.random.default_rng(7)
    made = product(rng, [40], 50, [operands(rng, GATHERED[1], [40], 50)], tokens, F32)
    run(made)
    made.segments = Segments.of(tokens, 1, "cpu")
    run(made)


def check_fused(rng: Rng, layout: NMLayout, parts: Sequence[int], columns: int, dtype: torch.dtype) -> None:
    """Compare base and delta in one kernel with float64; the delta is that of the second of three slots."""
    table = OperandTable(3, parts, columns, "cpu")
    for slot in range(3):
        table.put(slot, operands(rng, layout, parts, columns))
    weights = [torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(dtype) for rows in parts]
    x = torch.from_numpy(rng.standard_normal((1, columns), np.float32)).to(dtype)
    outputs = [Inside(1, rows, dtype, "cpu") for rows in parts]
    exact = [fused_exactly(x, weight, terms[0]) for weight, terms in zip(weights, table.operands(1), strict=True)]
    held = [tensor for terms in table.operands(1) for term in terms for tensor in term.buffers.values()]
    with guarded(held, [output.inner for output in outputs]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "pick", pick_directly)
        launch.launch_fused([output.inner for output in outputs], x, weights, table.layout_tables(slice(0, 3))[0], 1)
    for output, (wanted, magnitude) in zip(outputs, exact, strict=True):
        error = (output.inner.double() - wanted).abs()
        rounding = ROUNDING[dtype] * wanted.abs() if dtype != F32 else 0.0
        assert (error <= 32 * ROUNDING[F32] * magnitude + rounding * 1.01).all()
        outside = output.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


@pytest.mark.parametrize("layout", GATHERED, ids=NMLayout.describe)
def test_fused(layout: NMLayout) -> None:
    check_fused(np.random.default_rng(11), layout, [70], 141, F32)


@examples(15)
@given(st.data(), gathered(), generators(), st.sampled_from((F32, F16)))
def test_fused_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    parts = data.draw(st.lists(sizes(70), min_size=1, max_size=3), "parts")
    check_fused(rng, layout, parts, data.draw(st.sampled_from((32, 128, 33, 200, 600)), "columns"), dtype)


@pytest.mark.parametrize("group", [12, 16, 128, 200])
@pytest.mark.parametrize("keep", [1, 4])
def test_damaged_words_stay_inside(group: int, keep: int) -> None:
    rng = np.random.default_rng(group + keep)
    layout = NMLayout(keep, group, 4, "fixed", share=2)
    operand = damaged_operand(rng, layout, 45, 230)
    made = product(rng, [50], 230, [[[operand]]], [0, -1, 0], F32)
    ids = torch.tensor([44, 3, 0])
    for limit in (100, 0):
        made.outputs[0].remember()
        with blocks(32, 2, 4), guarded(made.readable(), [made.outputs[0].inner]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "gather_tokens", lambda _, limit=limit: limit)
            launch_products([made.outputs[0].inner], made.x, made.table, made.segments)
        changed = made.outputs[0].changed()
        assert not changed[2].any()
        assert not changed[:, 48:].any()
        assert not changed[:, :3].any()
        assert torch.isfinite(made.outputs[0].inner[::2, :45]).all()
    out = Inside(45, 230, F32, "cpu")
    embedded = Inside(3, 230, F32, "cpu")
    # Damaged positions may be equal.
    with guarded(made.readable(), [out.inner, embedded.inner], twice=True):
        launch.launch_expand(operand, None, out.inner, 0, 45)
        launch_embeddings(embedded.inner, ids, made.table, made.segments)
    for result in (out, embedded):
        assert torch.isfinite(result.inner).all()
        outside = result.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


def check_expand(
    rng: Rng, layout: NMLayout, rows: int, columns: int, start: int, stop: int, dtype: torch.dtype
) -> None:
    """Compare rows of a delta, and of a base with it added, bit for bit."""
    operand = random_operand(rng, layout, rows, columns)
    delta = naive_delta(operand)[start:stop]
    out, base = Inside(stop - start, columns, dtype, "cpu"), Inside(stop - start, columns, dtype, "cpu")
    base.inner[:] = torch.from_numpy(rng.standard_normal((stop - start, columns), np.float32))
    for given_base, wanted in ((None, delta), (base.inner, base.inner.float() + delta)):
        with guarded([*operand.buffers.values(), base.inner], [out.inner]):
            launch.launch_expand(operand, given_base, out.inner, start, stop)
        assert torch.equal(out.inner, wanted.to(dtype))
        outside = out.changed()
        outside[1:-1, 3:-4] = False
        assert not outside.any()


@pytest.mark.parametrize("layout", [*GATHERED, *NOT_UNROLLED], ids=NMLayout.describe)
def test_expand(layout: NMLayout) -> None:
    rows = min(32 * layout.share + 9, 80)
    check_expand(np.random.default_rng(8), layout, rows, 141, 0, rows, F32)


@examples(20)
@given(st.data(), any_layout(40), generators(), st.sampled_from((F32, F16)))
def test_expand_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    rows, columns = data.draw(sizes(100)), data.draw(sizes(200))
    start, stop = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    check_expand(rng, layout, rows, columns, start, stop, dtype)


def check_embedding(table: OperandTable, slots: Sequence[int], ids: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare an embedding's output with the reference; what no delta reaches keeps its bits."""
    segments = Segments(torch.tensor(slots, dtype=torch.int32), table.slots)
    output = Inside(len(slots), table.columns, dtype, "cpu")
    wanted = output.wide.clone()
    naive_embedding_(wanted[1:-1, 3:-4], ids, table, segments)
    held = [
        tensor for slot in range(table.slots) for term in table.operands(slot)[0] for tensor in term.buffers.values()
    ]
    with guarded(held, [output.inner]) as memory:
        launch_embeddings(output.inner, ids, table, segments)
    rows = [max((term.rows for term in table.operands(slot)[0]), default=0) for slot in range(table.slots)]
    has_row = [0 <= slot < table.slots and 0 <= ids[token] < rows[slot] for token, slot in enumerate(slots)]
    # A row may have nothing to store: where its only entries lie beyond the last column.
    assert not (memory.stored_to(output.inner).any(1) & ~torch.tensor(has_row)).any()
    assert torch.equal(output.wide, wanted)


@examples(25)
@given(st.data(), any_layout(255), generators(), st.sampled_from((F32, F16)))
def test_embedding_any(data: st.DataObject, layout: NMLayout, rng: Rng, dtype: torch.dtype) -> None:
    rows, columns = data.draw(sizes(150)), data.draw(sizes(600))
    table = OperandTable(2, [rows], columns, "cpu")
    for slot in range(2):
        table.put(slot, [[random_operand(rng, layout, int(rng.integers(1, rows, endpoint=True)), columns)]])
    slots = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=6))
    ids = torch.from_numpy(rng.integers(0, rows + 3, len(slots))).to(
        data.draw(st.sampled_from((torch.int32, torch.int64)))
    )
    check_embedding(table, slots, ids, dtype)


def test_embedding_sums_and_ids_outside() -> None:
    rng = np.random.default_rng(9)
    table = OperandTable(3, [70], 90, "cpu")
    first, second = (random_operand(rng, layout, 60, 90) for layout in (GATHERED[0], NOT_UNROLLED[0]))
    table.put(0, [[first, second, random_operand(rng, GATHERED[0], 70, 90)]])
    table.put(1, [[random_operand(rng, GATHERED[0], 70, 90)]])
    ids = torch.tensor([0, 59, 60, 69, 70, 2**31 - 1, 5, 6, 7, 69])
    check_embedding(table, [0, 0, 0, 0, 0, 0, -1, 3, 2, 1], ids, F32)


@pytest.mark.parametrize("number", [-1, -60, -(2**31)])
def test_embedding_negative_ids(number: int) -> None:
    rng = np.random.default_rng(10)
    table = OperandTable(1, [70], 90, "cpu")
    table.put(0, [[random_operand(rng, GATHERED[0], 60, 90)]])
    check_embedding(table, [0, 0], torch.tensor([number, 0]), F32)
