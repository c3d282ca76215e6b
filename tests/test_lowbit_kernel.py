"""The lowbit kernel, interpreted: products against the reference and against float64; it touches what it may."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.layout.lowbit import LowbitLayout
from deltafmt.layout.nm import NMLayout
from strategies import generators, sizes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted where there is no GPU, or with TRITON_INTERPRET=1", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt.kernels.dense_delta import operand_delta  # noqa: E402 - needs torch
from deltafmt.kernels.lowbit_matmul import launch  # noqa: E402 - needs triton
from deltafmt.kernels.nm_matmul.operand import OperandTable  # noqa: E402
from deltafmt.kernels.nm_matmul.segments import Segments  # noqa: E402
from interpreter import guarded, patch_once  # noqa: E402
from lowbit_operands import LAYOUTS, check_lowbit, random_lowbit  # noqa: E402
from operands import random_operand  # noqa: E402
from test_kernels import examples  # noqa: E402

patch_once()
F32, F16 = torch.float32, torch.float16
check = functools.partial(check_lowbit, guard=guarded)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LowbitLayout.describe)
def test_products(layout: LowbitLayout) -> None:
    check(np.random.default_rng(layout.bits), layout, [45], 150, [0, 1, -1, 0], F32)


@examples(12)
@given(
    layout=st.sampled_from(LAYOUTS),
    parts=st.lists(sizes(70), min_size=1, max_size=4),
    columns=sizes(300),
    tokens=st.lists(st.integers(-1, 2), min_size=1, max_size=6),
    dtype=st.sampled_from((F32, F16)),
    rng=generators(),
)
def test_any_product(layout, parts, columns, tokens, dtype, rng) -> None:
    check(rng, layout, parts, columns, tokens, dtype)


def test_many_tokens_make_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "tile_tokens", lambda _: 4)
    rng = np.random.default_rng(0)
    check(rng, LowbitLayout(4, "asymmetric", "BF16", 32), [33], 70, rng.integers(-1, 2, 11).tolist(), F32)


def test_other_kinds_are_left_to_others() -> None:
    rng = np.random.default_rng(0)
    table = OperandTable(1, [40], 64, "cpu")
    operand = random_lowbit(rng, LowbitLayout(2, "midrise"), 40, 64)
    table.put(0, [[random_operand(rng, NMLayout(1, 32, 4), 40, 64), operand]])
    x, y = torch.randn(1, 64), torch.zeros(1, 40)
    launch.launch_products([y], x, table, Segments(torch.tensor([0], dtype=torch.int32), 1))
    expected = x @ operand_delta(operand).T
    assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert [operand for _, _, operand in table.packed()] == [operand]


def test_no_slot_is_asked_for_where_the_kernel_takes_every_term(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltafmt.kernels import products

    def by_kernel(*arguments: object) -> bool:
        launch.launch_products(*arguments)
        return True

    rng = np.random.default_rng(0)
    table = OperandTable(1, [40], 64, "cpu")
    operand = random_lowbit(rng, LowbitLayout(2, "midrise"), 40, 64)
    table.put(0, [[operand]])
    segments = Segments(torch.tensor([0], dtype=torch.int32), 1)
    x, y = torch.randn(1, 64), torch.zeros(1, 40)
    monkeypatch.setattr(products, "lowbit_matmul_", by_kernel)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("the host waits for the device"))
    monkeypatch.setattr(products, "nm_matmul_", lambda *_: None)
    products.matmul_([y], x, table, segments)
    expected = x @ operand_delta(operand).T
    assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()
