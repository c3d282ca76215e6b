"""The lowbit kernel, interpreted: products against the reference and against float64; it touches what it may."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.codecs.buffers import blank
from deltafmt.codecs.lowbit import LowbitArrays
from deltafmt.codecs.terms import term_codec
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
from deltafmt.kernels.packed import BUFFER_DTYPES, PackedOperand  # noqa: E402
from interpreter import guarded, patch_once  # noqa: E402
from operands import ROUNDING, Inside, random_operand  # noqa: E402
from test_kernels import examples  # noqa: E402

patch_once()
F32, F16 = torch.float32, torch.float16


def random_lowbit(rng: np.random.Generator, layout: LowbitLayout, rows: int, columns: int) -> PackedOperand:
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
        buffers[name] = raw.view(BUFFER_DTYPES[form.dtype]).view(form.shape)
    return PackedOperand(layout, rows, columns, buffers)


def check(
    rng: np.random.Generator,
    layout: LowbitLayout,
    parts: list[int],
    columns: int,
    tokens: list[int],
    dtype: torch.dtype,
) -> None:
    """Compare one product of two slots, the second with fewer rows, with float64."""
    table = OperandTable(2, parts, columns, "cpu")
    held = [
        [[random_lowbit(rng, layout, rows, columns)] for rows in parts],
        [[random_lowbit(rng, layout, max(rows - 3, 1), columns)] for rows in parts],
    ]
    for slot, terms in enumerate(held):
        table.put(slot, terms)
    segments = Segments(torch.tensor(tokens, dtype=torch.int32), 2)
    x = Inside(len(tokens), columns, dtype, "cpu", read=True)
    outputs = [Inside(len(tokens), rows, dtype, "cpu") for rows in parts]
    for token, slot in enumerate(tokens):
        if slot in (0, 1):
            x.inner[token] = torch.from_numpy(rng.standard_normal(columns, np.float32)).to(dtype)
    exact = [output.inner.double() for output in outputs]
    size = [output.abs() for output in exact]
    for token, slot in enumerate(tokens):
        for part, terms in enumerate(held[slot] if slot in (0, 1) else ()):
            delta, wide = operand_delta(terms[0]).double(), x.inner[token].double()
            reach = delta.abs().max(0).values + 2 * layout.top  # codes and zero points are summed apart
            exact[part][token, : terms[0].rows] += delta @ wide
            size[part][token, : terms[0].rows] += (wide.abs() * reach).sum()
    readable = [x.inner, *(tensor for terms in held for (term,) in terms for tensor in term.tensors())]
    with guarded(readable, [output.inner for output in outputs]):
        launch.launch_products([output.inner for output in outputs], x.inner, table, segments)
    for output, wanted, magnitude in zip(outputs, exact, size, strict=True):
        changed = output.changed()
        changed[1:-1, 3:-4] = False
        assert not changed.any()
        allowed = 32 * ROUNDING[F32] * magnitude + 1.01 * ROUNDING[dtype] * wanted.abs() + 2.0**-24
        assert ((output.inner.double() - wanted).abs() <= allowed).all()


LAYOUTS = [
    *(LowbitLayout(bits, "midrise") for bits in range(1, 9)),
    LowbitLayout(4),
    LowbitLayout(3, "midtread", "F32", 32),
    LowbitLayout(4, "asymmetric", "BF16", 64),
    LowbitLayout(7, "asymmetric"),
    LowbitLayout(1, "midrise", "BF16", 0, "column"),
    LowbitLayout(2, "midrise", "F32", 0, "column"),
]


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
