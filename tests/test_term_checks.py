"""What a verifier asks of a term, without making its matrix: the same as decoding it and packing it again."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import unused
from deltafmt.terms.buffers import blank, views
from deltafmt.terms.codec import TermCodec
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank import codec as lowrank
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse import checks
from deltafmt.terms.sparse.layout import SparseLayout
from implementations import IMPLEMENTATIONS, running
from strategies import examples, fitting, generators, layouts, shapes
from term_kinds import CASES

Packed = dict[str, NDArray[np.generic]]


@st.composite
def terms(draw: st.DrawFn) -> tuple[TermCodec[Any, Any], Packed]:
    """Give the codec and the canonical buffers of a term of any kind."""
    rows, columns = draw(shapes(70, 300))
    kind = draw(st.sampled_from(sorted(CASES)))
    layout = fitting(draw(layouts() if kind == "nm" else CASES[kind].layouts), rows, columns)
    rng, seed = draw(generators()), draw(st.integers(0, 2**32 - 1))
    arrays = CASES[kind].arrays(rng, layout, rows, columns, seed)
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed if layout.seeded else 0, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    return codec, packed


def refused(codec: TermCodec[Any, Any], packed: Packed, *, by_decoding: bool) -> bool:
    """Tell whether a term is refused, by decoding and packing again or by the checks."""
    try:
        if by_decoding:
            codec.decode(packed, 0, codec.shape[0], check_form=True)
        else:
            codec.check(packed)
    except InvalidFileError:
        return True
    return False


def small_blocks(patched: pytest.MonkeyPatch) -> None:
    """Cut the work into blocks of a few fields."""
    patched.setattr(unused, "BLOCK_FIELDS", 100)
    patched.setattr(lowrank, "BLOCK_ELEMENTS", 64)
    patched.setattr(checks, "RUN_SLOTS", 5)
    patched.setattr(checks, "RUN_BLOCKS", 3)


@examples(300)
@given(st.data(), terms(), generators(), st.booleans())
def test_the_checks_refuse_what_packing_again_does_not_give(
    data: st.DataObject, term: tuple[TermCodec[Any, Any], Packed], rng: np.random.Generator, small: bool
) -> None:
    codec, packed = term
    for _ in range(data.draw(st.integers(0, 3))):
        raw = packed[data.draw(st.sampled_from(sorted(packed)))].reshape(-1).view(np.uint8)
        if raw.size:
            # Often at an end: bits behind the last field, rows behind the last row.
            at = data.draw(st.one_of(st.integers(0, raw.size - 1), st.integers(max(raw.size - 140, 0), raw.size - 1)))
            raw[at] ^= np.uint8(rng.choice([1, 2, 16, 128, 255]))
    read = views(codec.layout, *codec.shape, {key: memoryview(a.tobytes()) for key, a in packed.items()}, codec.slots)
    expected = refused(codec, read, by_decoding=True)
    with pytest.MonkeyPatch.context() as patched:
        if small:
            small_blocks(patched)
        for implementation in IMPLEMENTATIONS:
            with running(implementation):
                assert refused(codec, read, by_decoding=False) == expected


@examples(40)
@given(terms())
def test_what_is_canonical_is_accepted(term: tuple[TermCodec[Any, Any], Packed]) -> None:
    codec, packed = term
    codec.check(packed)
    with pytest.MonkeyPatch.context() as patched:
        small_blocks(patched)
        codec.check(packed)


HUGE: list[tuple[TermLayout, int, int, int]] = [
    (SparseLayout("BF16", 16, 65536), 2**24, 2**18, 0),
    (SparseLayout(Coding(4, "midtread"), 1, 65536), 32, 2**20, 2**20),
    (LowRankLayout(1, Coding(1, "midrise")), 2**24, 2**24, 0),
    (LowRankLayout(1, "F16"), 2**20, 2**20, 0),
    (NMLayout(1, 128, 1, "seeded", "midrise"), 32, 2**27 + 1, 0),
    (NMLayout(254, 255, 1, "rank", "midrise"), 32, 2**22, 0),
    (NMLayout(1, 128, 4, "fixed"), 2**18, 100, 0),
    (LowbitLayout(3, "midtread"), 1, 2**22, 0),
]


@pytest.mark.parametrize(("layout", "rows", "columns", "slots"), HUGE, ids=lambda value: str(value)[:40])
def test_the_memory_follows_the_bytes_and_not_the_shape(
    layout: TermLayout, rows: int, columns: int, slots: int
) -> None:
    """A matrix of 2**48 elements, of which few bytes say that nothing is kept, is checked in the memory of a block."""
    packed = blank(layout, rows, columns, slots)
    if slots:
        packed["starts"].view(np.uint32)[1:] = np.arange(1, packed["starts"].size) * 65536
    size = sum(array.nbytes for array in packed.values())
    assert size < 140 << 20
    tracemalloc.start()
    try:
        term_codec(layout, rows, columns, 0, slots).check(packed)
        assert tracemalloc.get_traced_memory()[1] < (size // 2) + (24 << 20)
    finally:
        tracemalloc.stop()
