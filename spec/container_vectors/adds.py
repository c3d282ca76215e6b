"""Vectors of entries of action ``add`` (section 7.4): dtypes, shapes, new rows, terms, leading dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draft import Draft, header
from vector_tools import change, one_tensor, small, vector

from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.nm.layout import NMLayout

from .entries import entry_is


def with_shapes(shape: list[int], base: list[int], data: bytes | None = None, rows: int = 4, columns: int = 8) -> bytes:
    """Return a file with one term of some rows and columns, whose entry says other shapes, and perhaps has data."""
    draft = Draft.of(one_tensor(NMLayout(1, 4, 4), rows, columns))
    draft.entry["shape"], draft.entry["base"]["shape"] = shape, base
    if data is not None:
        end = len(draft.raw[0]) + -len(draft.raw[0]) % 256
        draft.raw[0] += bytes(end - len(draft.raw[0])) + data
        draft.index["tensors"]["w"] = dict(sorted({**draft.entry, "data": [0, end, len(data)]}.items()))
    return draft.build()


def of_no_rows(shape: list[int], base: list[int], data: bytes) -> bytes:
    """Return a file with a term of no rows."""
    draft = Draft.of(small())
    draft.entry["shape"], draft.entry["base"]["shape"], draft.raw[0] = shape, base, bytearray(data)
    draft.term["buffers"] = {"codes": [0, 0, 0], "scales": [0, 0, 0]}
    more = {"data": [0, 0, len(data)]} if data else {}
    draft.index["tensors"]["w"] = dict(sorted({**draft.entry, **more}.items()))
    return draft.build()


def many_terms(count: int) -> bytes:
    """Return a file with a tensor of many terms, which are equal but for their seeds."""
    draft = Draft.of(small())
    first, raw = draft.term, draft.raw[0]
    raw += bytes(-len(raw) % 256)
    size, terms = len(raw), []
    for i in range(count):
        buffers = {name: [0, ref[1] + i * size, ref[2]] for name, ref in first["buffers"].items()}
        terms.append({**first, "buffers": buffers, "seed": i})
    draft.raw[0] = (raw * count)[: terms[-1]["buffers"]["scales"][1] + first["buffers"]["scales"][2]]
    draft.entry["terms"] = terms
    return draft.build()


@vector("invalid", "a delta of a tensor of F64", "a delta from F64 to F64 is not defined")
def add_f64() -> bytes:
    base = {"digest": bytes(32), "dtype": "F64", "shape": [4, 8]}
    return change(small(), entry_is(dtype="F64", base=base))


@vector("invalid", "a delta from integers to F32", "a delta from I32 to F32 is not defined")
def add_to_integers() -> bytes:
    base = {"digest": bytes(32), "dtype": "I32", "shape": [4, 8]}
    return change(small(), entry_is(dtype="F32", base=base))


@vector("invalid", "a delta from BF16 to I16", "a delta from BF16 to I16 is not defined")
def add_integers() -> bytes:
    return change(small(), entry_is(dtype="I16"))


@vector("invalid", "a delta of a tensor of no dimensions", "differ beyond the first dimension")
def add_0d() -> bytes:
    return with_shapes([], [], rows=1, columns=1)


@vector("invalid", "a delta from a matrix to a tensor of three dimensions", "differ beyond the first dimension")
def add_other_dimensions() -> bytes:
    return with_shapes([4, 1, 8], [4, 8])


@vector("invalid", "a delta from 4 x 8 to 4 x 9", "differ beyond the first dimension")
def add_other_columns() -> bytes:
    return with_shapes([4, 9], [4, 8], columns=9)


@vector("invalid", "a delta of a vector that grew", "a 1-d tensor cannot grow")
def add_1d_grown() -> bytes:
    return with_shapes([9], [8], rows=1, columns=9)


@vector("invalid", "a delta of a vector that shrank", "a 1-d tensor cannot grow")
def add_1d_shrunk() -> bytes:
    return with_shapes([8], [9], rows=1)


@vector("invalid", "a delta of a tensor of no rows", "a tensor without elements has no delta")
def add_empty() -> bytes:
    return of_no_rows([0, 8], [4, 8], b"")


@vector("invalid", "a delta of a base of no rows, which grew to four", "a tensor without elements has no delta")
def add_to_empty() -> bytes:
    return of_no_rows([4, 8], [0, 8], bytes(64))


@vector("invalid", "a tensor of two new rows holds one", "new rows take 32 bytes, not 16")
def add_new_rows_short() -> bytes:
    return with_shapes([6, 8], [4, 8], bytes(16))


@vector("invalid", "a tensor of two new rows holds none", "new rows take 32 bytes, not 0")
def add_new_rows_missing() -> bytes:
    return with_shapes([6, 8], [4, 8])


@vector("invalid", "a tensor that did not grow holds an empty buffer of new rows", "new rows take 0 bytes")
def add_new_rows_empty() -> bytes:
    return with_shapes([4, 8], [4, 8], b"")


@vector("invalid", "a tensor that shrank holds a new row", "new rows take 0 bytes, not 16")
def add_shrunk_with_data() -> bytes:
    return with_shapes([4, 8], [6, 8], bytes(16))


@vector("invalid", "the new rows are held in the base's dtype", "new rows take 32 bytes, not 16")
def add_new_rows_of_base() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"].update(dtype="F32")

    return Draft.of(with_shapes([5, 8], [4, 8], bytes(16))).build(edit)


@vector("invalid", "an add of no terms", "a list of 1 to 16 terms")
def terms_none() -> bytes:
    draft = Draft.of(small())
    draft.index.update(layouts=[], sections=[])
    draft.entry["terms"] = []
    draft.raw = []
    return draft.build()


@vector("invalid", "an add of 17 terms", "a list of 1 to 16 terms")
def terms_17() -> bytes:
    return many_terms(17)


@vector("ok", "an add of 16 terms, which is the most")
def terms_16() -> bytes:
    return many_terms(16)


def term_is(**changes: Any) -> Callable[[Any], None]:
    """Return an edit of the first term of ``w``."""
    return lambda index: index["tensors"]["w"]["terms"][0].update(**changes)


@vector("invalid", "a seed of 2**32", "is not an integer from 0 to 4294967295")
def seed_beyond() -> bytes:
    return change(small(), term_is(seed=1 << 32))


@vector("ok", "a seed of 2**32 - 1, and one of 0")
def seed_bounds() -> bytes:
    draft = Draft.of(many_terms(2))
    draft.entry["terms"][1]["seed"] = 2**32 - 1
    return draft.build()


@vector("invalid", "an nm term with a fixed index, which draws nothing, has a seed", "has seed 0")
def seed_of_fixed() -> bytes:
    return change(one_tensor(NMLayout(1, 4, 4, "fixed"), 4, 8), term_is(seed=1))


@vector("invalid", "a term has a layout that does not exist", "is not one of the 1 layouts")
def layout_beyond() -> bytes:
    return change(small(), term_is(layout=1))


@vector("invalid", "a term's layout is negative", "is not an integer from 0")
def layout_negative() -> bytes:
    return change(small(), term_is(layout=-1))


@vector("invalid", "a buffer of codes is 128 bytes shorter than the shape needs", "where the shape needs")
def buffer_length() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(4), 4, 16))
    codes, scales = draft.term["buffers"]["codes"], draft.term["buffers"]["scales"]
    assert (codes[2], scales[1]) == (256, 256)
    codes[2] = 128
    draft.raw[0][128:256] = bytes(128)
    return draft.build()


@vector("invalid", "a buffer of scales is two bytes longer than the shape needs", "where the shape needs")
def buffer_longer() -> bytes:
    draft = Draft.of(small())
    draft.term["buffers"]["scales"][2] += 2
    draft.raw[0] += bytes(2)
    return draft.build()


def with_leading(leading: int, shape: list[int], features: int = 2, rows: int = 4, columns: int = 8) -> bytes:
    """Return a file whose only tensor has leading dimensions."""
    draft = Draft.of(one_tensor(NMLayout(1, 4, 4), rows, columns))
    draft.header = header(incompatible=features)
    draft.entry["base"]["shape"] = shape
    draft.index["tensors"]["w"] = dict(sorted({**draft.entry, "leading": leading, "shape": shape}.items()))
    return draft.build()


@vector("ok", "leading: a kernel of shape [7, 2, 3, 3] as 7 rows of 18 columns; feature bit 1")
def leading_dimensions() -> bytes:
    return with_leading(1, [7, 2, 3, 3], rows=7, columns=18)


@vector("ok", "leading: a tensor of shape [3, 2, 4, 2] as 6 rows of 8 columns")
def leading_two() -> bytes:
    return with_leading(2, [3, 2, 4, 2], rows=6)


@vector("invalid", "an entry has leading dimensions, and the header does not say so", "bit 1")
def leading_without_feature() -> bytes:
    return with_leading(1, [4, 4, 2], 0)


@vector("invalid", "no dimension leads: all elements in one row", "0 is not 1 to 1")
def leading_none() -> bytes:
    return with_leading(0, [4, 4, 2], rows=1, columns=32)


@vector("invalid", "all dimensions but the last lead, which is what the key's absence says", "1 is not 1 to 0")
def leading_all() -> bytes:
    return with_leading(1, [4, 8])


@vector("invalid", "all dimensions lead: a column of one element", "3 is not 1 to 1")
def leading_too_many() -> bytes:
    return with_leading(3, [4, 4, 2], rows=32, columns=1)
