"""The naive torch decoders of each kind, written from the specification alone, agree with the numpy decoders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.sparse.layout import SparseLayout
from strategies import dense_arrays, dense_layouts, examples, fitting, shapes, sparse_arrays, sparse_layouts

torch = pytest.importorskip("torch")

from deltafmt.kernels.dense_delta import operand_delta
from deltafmt.kernels.packed import BUFFER_DTYPES, PackedOperand


def operand_of(
    layout: TermLayout, packed: dict[str, NDArray[np.generic]], rows: int, columns: int, slots: int = 0
) -> PackedOperand:
    buffers = {}
    for name, form in layout.buffers(rows, columns, slots).items():
        buffers[name] = torch.empty(form.shape, dtype=BUFFER_DTYPES[form.dtype])
        if form.nbytes:
            raw = torch.from_numpy(packed[name].reshape(-1).view(np.uint8).copy())
            buffers[name] = raw.view(BUFFER_DTYPES[form.dtype]).view(form.shape)
    return PackedOperand(layout, rows, columns, buffers, 0, slots)


@examples(80)
@given(st.data(), dense_layouts(), shapes(70, 120))
def test_dense_deltas_agree(data: st.DataObject, layout: TermLayout, shape: tuple[int, int]) -> None:
    rows, columns = shape
    layout = fitting(layout, rows, columns)
    codec = term_codec(layout, rows, columns)
    packed = blank(layout, rows, columns)
    codec.encode(data.draw(dense_arrays(layout, rows, columns)), packed, 0)
    expected = codec.decode(packed, 0, rows)
    operand = operand_of(layout, packed, rows, columns)
    assert operand.nbytes == sum(layout.buffer_lengths(rows, columns).values())
    found = operand_delta(operand)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert torch.equal(operand_delta(operand, 3, 9).nan_to_num(), found[3:9].nan_to_num())


@examples(40)
@given(st.data(), sparse_layouts(), shapes(70, 400))
def test_sparse_deltas_agree(data: st.DataObject, layout: SparseLayout, shape: tuple[int, int]) -> None:
    rows, columns = shape
    arrays = data.draw(sparse_arrays(layout, rows, columns))
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, 0, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    found = operand_delta(operand_of(layout, packed, rows, columns, slots))
    np.testing.assert_array_equal(found.numpy(), codec.decode(packed, 0, rows))


def test_buffers_of_another_form_are_refused() -> None:
    layout = LowbitLayout(4)
    operand = operand_of(layout, blank(layout, 33, 50), 33, 50)
    for name, changed in (("codes", operand.buffers["codes"][:1]), ("scales", operand.buffers["scales"].float())):
        with pytest.raises(UsageError, match=f"{name}: expected contiguous"):
            PackedOperand(layout, 33, 50, {**operand.buffers, name: changed})
    with pytest.raises(UsageError, match="a lowbit term has the buffers codes, scales"):
        PackedOperand(layout, 33, 50, {"codes": operand.buffers["codes"]})
