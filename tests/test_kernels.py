"""The Triton kernels, interpreted: products against the reference and against float64.

Every load and store is checked against the tensors that a kernel may touch. ``tests/test_kernels_rows.py`` has dense
rows and embeddings, ``tests/test_kernels_gpu.py`` the same checks for a GPU; what the compiler makes of the kernels is
in ``tests/test_kernels_compile.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.terms.nm.layout import NMLayout
from strategies import generators, same_examples, sizes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted where there is no GPU, or with TRITON_INTERPRET=1", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt.kernels.nm import launch
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.segments import Segments
from interpreter import patch_once
from nm_products import (
    GATHERED,
    NOT_UNROLLED,
    any_layout,
    blocks,
    decoded_rounding,
    fewer_rows,
    gathered,
    operands,
    products,
    run,
    small_tiles,
)
from operands import product, random_operand

patch_once()
F32, F16 = torch.float32, torch.float16
Rng = np.random.Generator


@pytest.fixture(scope="module", autouse=True)
def small_batches_fill_tiles() -> Iterator[None]:
    """Cut few tokens into tiles of several, as launches cut many."""
    with small_tiles():
        yield


@pytest.mark.parametrize("layout", GATHERED, ids=NMLayout.describe)
def test_gather(layout: NMLayout) -> None:
    rng = np.random.default_rng(layout.bits)
    rows = min(32 * layout.share + 9, 137)
    made = product(rng, [rows], 141, [operands(rng, layout, [rows], 141)], [0, 0], F32)
    assert run(made) == ["gather_kernel"]


@same_examples(25)
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


@pytest.mark.parametrize("layout", NOT_UNROLLED, ids=NMLayout.describe)
def test_entries(layout: NMLayout) -> None:
    rng = np.random.default_rng(1)
    parts = [70, 33, 5]
    held = [operands(rng, layout, parts, 150), operands(rng, layout, [64, 0, 4], 150)]
    assert run(product(rng, parts, 150, held, [1, 0, -1, 1, 2], F32)) == ["element_kernel"]


@same_examples(20)
@given(st.data(), any_layout())
def test_entries_any(data: st.DataObject, layout: NMLayout) -> None:
    made = data.draw(products(layout, 3, 4, 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "step_elements", lambda _: 0)
        assert set(run(made)) <= {"element_kernel"}


@same_examples(15)
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
