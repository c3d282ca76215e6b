"""Packed words: the bit order of the specification, identity of packing, and the compiled loops against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.codecs import words
from deltafmt.codecs.routines import CodecRoutines
from deltafmt.layout.nm import stream_words, tiles
from strategies import examples, generators, shapes

WIDTHS = st.integers(0, 64)
BYTE_WIDTHS = st.integers(1, 8)


def random_fields(rng: np.random.Generator, rows: int, count: int, width: int) -> NDArray[np.uint64]:
    """Draw fields below 2**width, the largest among them."""
    fields = rng.integers(0, 2**64 - 1, (rows, count), np.uint64, endpoint=True)
    fields[rng.random((rows, count)) < 0.2] = np.uint64(2**64 - 1)
    return fields & np.uint64(2**width - 1)


def pack_by_definition(fields: NDArray[np.unsignedinteger], width: int) -> NDArray[np.uint32]:
    """Pack with one Python integer a row, and place each word by its number in the buffer."""
    rows, count = fields.shape
    per_row = stream_words(count, width)
    buffer = np.zeros(tiles(rows) * per_row * 32, np.uint32)
    for row in range(rows):
        stream = sum(int(field) << i * width for i, field in enumerate(fields[row]))
        for w in range(per_row):
            buffer[32 * (row // 32 * per_row + w) + row % 32] = stream >> 32 * w & 0xFFFFFFFF
    return buffer.reshape(tiles(rows), per_row, 32)


@examples(60)
@given(generators(), shapes(70, 40), WIDTHS)
def test_pack_is_the_definition_and_unpack_undoes_it(
    rng: np.random.Generator, shape: tuple[int, int], width: int
) -> None:
    fields = random_fields(rng, *shape, width)
    packed = words.pack(fields, width)
    np.testing.assert_array_equal(packed, pack_by_definition(fields, width), strict=True)
    np.testing.assert_array_equal(words.unpack(packed, *shape, width), fields, strict=True)


def test_pack_of_a_known_row() -> None:
    # 3-bit fields 1, 2, ..., 7, 0, 1, 2, 3: the eleventh field has its top bit in the second word.
    fields = np.array([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7]], np.uint8)
    packed = words.pack(fields, 3)
    assert packed.shape == (1, 2, 32)
    assert [int(word) for word in packed[0, :, 0]] == [0xD11F58D1, 0x1]
    assert not packed[0, :, 1:].any()


@examples(40)
@given(generators(), shapes(100, 9), st.sampled_from([np.uint16, np.uint32, np.float32]))
def test_tiles_hold_the_rows_and_zeros(rng: np.random.Generator, shape: tuple[int, int], dtype: type) -> None:
    by_row = rng.integers(1, 1000, shape).astype(dtype)
    tiled = words.to_tiles(by_row)
    assert tiled.shape == (tiles(shape[0]), shape[1], 32)
    np.testing.assert_array_equal(words.from_tiles(tiled, shape[0]), by_row, strict=True)
    assert np.count_nonzero(tiled) == by_row.size


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("width", [0, 1, 4, 9])
def test_empty_arrays(compiled: CodecRoutines, shape: tuple[int, int], width: int) -> None:
    fields = np.zeros(shape, np.uint8)
    packed = words.pack(fields, width)
    assert packed.shape == (tiles(shape[0]), stream_words(shape[1], width), 32)
    out = np.full_like(packed, 0xA5A5A5A5)
    compiled.pack_into(fields, width, out)
    np.testing.assert_array_equal(out, packed, strict=True)
    assert words.unpack(packed, *shape, width).shape == compiled.unpack(packed, *shape, width).shape == shape


@examples(120)
@given(generators(), shapes(70, 300), WIDTHS, st.sampled_from(["whole", "strided", "wide", "odd"]))
def test_compiled_pack_equals_the_reference(
    compiled: CodecRoutines, rng: np.random.Generator, shape: tuple[int, int], width: int, form: str
) -> None:
    width = width % 9 if form != "wide" else width
    fields = random_fields(rng, *shape, width)
    if form != "wide":
        fields = fields.astype(np.uint8)
    if form == "strided":
        fields = np.repeat(fields, 2, axis=1)[:, ::2]
    if form == "odd":
        unaligned = np.zeros(fields.size + 1, np.uint8)[1:].reshape(shape)
        unaligned[...] = fields
        fields = unaligned
    expected = words.pack(fields, width)
    # Whatever the array held before must be gone, in the lanes beyond the rows too.
    for pack_into in (words.pack_into, compiled.pack_into):
        out = np.full_like(expected, 0xA5A5A5A5)
        pack_into(fields, width, out)
        np.testing.assert_array_equal(out, expected, strict=True)


@examples(120)
@given(generators(), shapes(70, 300), st.one_of(BYTE_WIDTHS, WIDTHS))
def test_compiled_unpack_equals_the_reference(
    compiled: CodecRoutines, rng: np.random.Generator, shape: tuple[int, int], width: int
) -> None:
    rows, count = shape
    # Any words, so that unused bits and lanes that are not zero are tried too.
    packed = rng.integers(0, 2**32, (tiles(rows), stream_words(count, width), 32), np.uint32)
    packed.flags.writeable = False
    expected = words.unpack(packed, rows, count, width)
    found = compiled.unpack(packed, rows, count, width)
    assert found.dtype == (np.uint8 if 1 <= width <= 8 else np.uint64)
    np.testing.assert_array_equal(found, expected)


@examples(30)
@given(generators(), shapes(200, 60), BYTE_WIDTHS, st.integers(0, 6))
def test_tiles_of_a_run_pack_as_they_do_in_the_whole(
    compiled: CodecRoutines, rng: np.random.Generator, shape: tuple[int, int], width: int, cut: int
) -> None:
    fields = random_fields(rng, *shape, width).astype(np.uint8)
    cut = min(cut, tiles(shape[0]))
    out = np.full((tiles(shape[0]), stream_words(shape[1], width), 32), 0xA5A5A5A5, np.uint32)
    for rows, run in ((slice(0, 32 * cut), slice(0, cut)), (slice(32 * cut, None), slice(cut, None))):
        compiled.pack_into(fields[rows], width, out[run])
    np.testing.assert_array_equal(out, words.pack(fields, width), strict=True)
