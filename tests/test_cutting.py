"""A cut of a term, cut out by rows and columns, has the bits that the whole term has there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import CODECS, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.cut_term import CutTerm
from deltafmt.terms.cutting import CUTS, cut
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout
from strategies import examples, fitting, generators, shapes
from term_kinds import ANY_LAYOUT
from test_every_kind import packed_codec


def test_every_kind_is_cut() -> None:
    assert list(CUTS) == list(CODECS)


def matrix(part: CutTerm) -> np.ndarray:
    """Return a cut's matrix, after checking that it is packed in canonical form."""
    codec = term_codec(part.layout, part.rows, part.columns, part.seed, part.slots)
    forms = part.layout.buffers(part.rows, part.columns, part.slots)
    assert {name: array.shape for name, array in part.packed.items()} == {n: form.shape for n, form in forms.items()}
    assert part.layout.plain() == part.layout
    return codec.decode(part.packed, 0, part.rows, check_form=True)


def compare(
    rng: np.random.Generator, layout: TermLayout, shape: tuple[int, int], rows: range, columns: range
) -> CutTerm:
    """Cut a random term, and compare the cut with the same place of the whole matrix."""
    codec, packed = packed_codec(rng, layout, *shape)
    part = cut(codec, packed, rows, columns)
    whole = codec.decode(packed, 0, shape[0])
    assert matrix(part).tobytes() == whole[rows.start : rows.stop, columns.start : columns.stop].tobytes()
    return part


@st.composite
def runs(draw: st.DrawFn, size: int, step: int) -> range:
    """Give a run that is not empty and begins and ends on multiples of a step, or with the whole."""
    ends = [*range(0, size, step), size]
    start = draw(st.integers(0, len(ends) - 2))
    return range(ends[start], ends[draw(st.integers(start + 1, len(ends) - 1))])


@examples(150)
@given(st.data(), ANY_LAYOUT, shapes(100, 400), generators())
def test_any_part_has_the_bits_of_the_whole(
    data: st.DataObject, layout: TermLayout, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    layout = fitting(layout, *shape)
    rows = data.draw(runs(shape[0], data.draw(st.sampled_from([1, 4, 32]))))
    columns = data.draw(runs(shape[1], layout.m if isinstance(layout, NMLayout) else 1))
    if isinstance(layout, LowRankLayout) and layout.rank > min(len(rows), len(columns)):
        with pytest.raises(UsageError, match="has no"):
            compare(rng, layout, shape, rows, columns)
    else:
        compare(rng, layout, shape, rows, columns)


@pytest.mark.parametrize("index", ["seeded", "fixed", "rank"])
@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("nm", [(1, 32), (4, 16)])
def test_halves_of_nm(nm: tuple[int, int], share: int, index: str) -> None:
    """Both halves of rows keep their seed; the second half of columns has its positions stored."""
    rng = np.random.default_rng(0)
    layout = NMLayout(*nm, bits=4, index=index, share=share)
    for rows in (range(256), range(256, 512)):
        part = compare(rng, layout, (512, 320), rows, range(320))
        assert part.layout == layout.plain()
    for columns in (range(160), range(160, 320)):
        part = compare(rng, layout, (64, 320), range(64), columns)
        assert part.layout == layout.plain() or (index == "seeded" and columns.start)


def test_rows_that_begin_within_a_mask_row() -> None:
    """Their positions are stored, because no seed draws them for other rows of a mask row."""
    layout = NMLayout(4, 16, 4, share=4)
    rng = np.random.default_rng(2)
    assert compare(rng, layout, (64, 320), range(6, 40), range(160)).layout == replace(layout, index="fixed", share=1)
    assert compare(rng, layout, (64, 320), range(8, 40), range(160)).layout == layout


def test_groups_of_scales_that_go_along() -> None:
    rng = np.random.default_rng(1)
    for group in (3, 6, 8, 1000):
        compare(rng, NMLayout(4, 16, 4, scale_group=group), (40, 320), range(7, 40), range(160, 320))
        compare(rng, LowbitLayout(4, scale_group=group), (40, 320), range(8, 40), range(164, 320))
        compare(rng, LowRankLayout(5, Coding(4, scale_group=group)), (40, 320), range(20, 40), range(160, 320))


def test_a_part_of_a_group_is_refused() -> None:
    layout = NMLayout(4, 16, 4)
    codec, packed = term_codec(layout, 32, 64), blank(layout, 32, 64)
    with pytest.raises(UsageError, match=r"^columns 24 to 64 are not whole groups of 16$"):
        cut(codec, packed, range(32), range(24, 64))


def test_an_empty_sparse_part() -> None:
    layout = SparseLayout("BF16", 4)
    codec, packed = term_codec(layout, 40, 64), blank(layout, 40, 64)
    assert not matrix(cut(codec, packed, range(3, 40), range(5, 64))).any()
