"""Packed words: planes, tiles and bit order of the specification, and the compiled loops against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.terms import words
from deltafmt.terms.nm.layout import SHARES
from deltafmt.terms.tiles import planes, stream_words, tiles
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from strategies import examples, generators, shapes, sizes

WIDTHS = st.integers(0, 64)
BYTE_WIDTHS = st.integers(1, 8)


def random_fields(rng: np.random.Generator, rows: int, count: int, width: int) -> NDArray[np.uint64]:
    """Draw fields below 2**width, the largest among them."""
    fields = rng.integers(0, 2**64 - 1, (rows, count), np.uint64, endpoint=True)
    fields[rng.random((rows, count)) < 0.2] = np.uint64(2**64 - 1)
    return fields & np.uint64(2**width - 1)


def pack_by_definition(fields: NDArray[np.unsignedinteger], width: int, share: int) -> NDArray[np.uint32]:
    """Pack with one Python integer a plane and row, and place each word by its number in the buffer."""
    rows, count = fields.shape
    number_of_tiles = -(-rows // (32 * share)) * share
    parts, low = [], 0
    while low < width:
        plane = next(size for size in (32, 16, 8, 4, 2, 1) if size <= width - low)
        parts.append((low, plane, -(-count * plane // 32)))
        low += plane
    per_row = sum(words_of_plane for _, _, words_of_plane in parts)
    buffer = np.zeros(number_of_tiles * per_row * 32, np.uint32)
    for row in range(rows):
        found = []
        for low, plane, words_of_plane in parts:
            stream = sum((int(field) >> low & 2**plane - 1) << i * plane for i, field in enumerate(fields[row]))
            found += [stream >> 32 * w & 0xFFFFFFFF for w in range(words_of_plane)]
        mask_row, turn = divmod(row, share)
        tile = mask_row // 32 * share + turn
        for w, word in enumerate(found):
            buffer[32 * (tile * per_row + w) + mask_row % 32] = word
    return buffer.reshape(number_of_tiles, per_row, 32)


def test_planes_are_powers_of_two_lowest_bits_first() -> None:
    known = {0: (), 1: (1,), 3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 37: (32, 4, 1), 64: (32, 32)}
    assert {width: planes(width) for width in known} == known
    for width in range(65):
        assert sum(planes(width)) == width
        assert all(plane in (1, 2, 4, 8, 16, 32) for plane in planes(width))


@examples(80)
@given(generators(), shapes(200, 40), WIDTHS, st.sampled_from(SHARES))
def test_pack_is_the_definition_and_unpack_undoes_it(
    rng: np.random.Generator, shape: tuple[int, int], width: int, share: int
) -> None:
    fields = random_fields(rng, *shape, width)
    packed = words.pack(fields, width, share)
    np.testing.assert_array_equal(packed, pack_by_definition(fields, width, share), strict=True)
    found = words.unpack(packed, *shape, width, share)
    np.testing.assert_array_equal(found, fields.astype(words.field_dtype(width)), strict=True)


def test_pack_of_a_known_row() -> None:
    # 3-bit fields: the lower two bits in one word, the upper ones in the next, none across.
    fields = np.array([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7]], np.uint8)
    packed = words.pack(fields, 3)
    assert packed.shape == (1, 2, 32)
    assert [int(word) for word in packed[0, :, 0]] == [0b11_10_01_00_11_10_01_00_11_10_01, 0b100_0111_1000]
    assert not packed[0, :, 1:].any()


def test_rows_of_a_mask_row_share_a_lane() -> None:
    rows = np.arange(100, dtype=np.uint8)[:, None]
    packed = words.pack(rows, 8, 2)
    assert packed.shape == (4, 1, 32)
    np.testing.assert_array_equal(packed[0, 0], np.arange(0, 64, 2))
    np.testing.assert_array_equal(packed[1, 0], np.arange(1, 64, 2))
    np.testing.assert_array_equal(packed[2, 0], [*range(64, 100, 2), *[0] * 14])
    np.testing.assert_array_equal(packed[3, 0], [*range(65, 100, 2), *[0] * 14])


@examples(40)
@given(generators(), shapes(300, 9), st.sampled_from([np.uint16, np.uint32, np.float32]), st.sampled_from(SHARES))
def test_tiles_hold_the_rows_and_zeros(
    rng: np.random.Generator, shape: tuple[int, int], dtype: type, share: int
) -> None:
    by_row = rng.integers(1, 1000, shape).astype(dtype)
    tiled = words.to_tiles(by_row, share)
    assert tiled.shape == (tiles(shape[0], share), shape[1], 32)
    np.testing.assert_array_equal(words.from_tiles(tiled, shape[0], share), by_row, strict=True)
    assert np.count_nonzero(tiled) == by_row.size


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("width", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("share", [1, 4])
def test_empty_arrays(shape: tuple[int, int], width: int, share: int) -> None:
    fields = np.zeros(shape, np.uint8)
    packed = words.pack(fields, width, share)
    assert packed.shape == (tiles(shape[0], share), stream_words(shape[1], width), 32)
    out = np.empty_like(packed)
    for implementation in IMPLEMENTATIONS:
        out[...] = 0xA5A5A5A5
        with running(implementation):
            words.pack_into(fields, width, out, share)
            assert words.unpack(packed, *shape, width, share).shape == shape
        np.testing.assert_array_equal(out, packed, strict=True)


@examples(120)
@given(
    generators(),
    shapes(200, 300),
    WIDTHS,
    st.sampled_from(SHARES),
    st.sampled_from(["whole", "strided", "wide", "odd"]),
)
def test_compiled_pack_equals_the_reference(
    rng: np.random.Generator, shape: tuple[int, int], width: int, share: int, form: str
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
    expected = words.pack(fields, width, share)
    # Whatever the array held before must be gone, in the lanes beyond the rows too.
    for implementation in IMPLEMENTATIONS:
        out = np.full_like(expected, 0xA5A5A5A5)
        with running(implementation):
            words.pack_into(fields, width, out, share)
        np.testing.assert_array_equal(out, expected, strict=True)


@needs_core
@examples(120)
@given(generators(), shapes(200, 300), st.one_of(BYTE_WIDTHS, WIDTHS), st.sampled_from(SHARES))
def test_compiled_unpack_equals_the_reference(
    rng: np.random.Generator, shape: tuple[int, int], width: int, share: int
) -> None:
    rows, count = shape
    # Any words, so that unused bits and lanes that are not zero are tried too.
    packed = rng.integers(0, 2**32, (tiles(rows, share), stream_words(count, width), 32), np.uint32)
    packed.flags.writeable = False
    expected = words.unpack.reference(packed, rows, count, width, share)
    assert expected.dtype == words.field_dtype(width)
    for implementation in COMPILED:
        with running(implementation):
            found = words.unpack(packed, rows, count, width, share)
        np.testing.assert_array_equal(found, expected, strict=True)


@examples(30)
@given(generators(), shapes(300, 60), BYTE_WIDTHS, st.sampled_from(SHARES), st.integers(0, 6))
def test_super_tiles_of_a_run_pack_as_they_do_in_the_whole(
    rng: np.random.Generator, shape: tuple[int, int], width: int, share: int, cut: int
) -> None:
    fields = random_fields(rng, *shape, width).astype(np.uint8)
    cut = min(cut * share, tiles(shape[0], share))
    for implementation in IMPLEMENTATIONS:
        out = np.full((tiles(shape[0], share), stream_words(shape[1], width), 32), 0xA5A5A5A5, np.uint32)
        with running(implementation):
            for rows, run in ((slice(0, 32 * cut), slice(0, cut)), (slice(32 * cut, None), slice(cut, None))):
                words.pack_into(fields[rows], width, out[run], share)
        np.testing.assert_array_equal(out, words.pack(fields, width, share), strict=True)


@needs_core
@examples(120)
@given(generators(), shapes(70, 300), st.one_of(BYTE_WIDTHS, st.integers(1, 64)))
def test_compiled_parts_of_lines_and_tiles_equal_the_reference(
    rng: np.random.Generator, shape: tuple[int, int], width: int
) -> None:
    rows, count = shape
    start = int(rng.integers(count)) // 32 * 32
    stop = int(rng.integers(start, count, endpoint=True))
    cuts = {(0, count), (start, stop), (start, count), (start, start)}
    # Any words, so that unused bits that are not zero are tried too.
    by_row = rng.integers(0, 2**32, (rows, stream_words(count, width)), np.uint32)
    tile = rng.integers(0, 2**32, (stream_words(count, width), 32), np.uint32)
    for array in (by_row, tile):
        array.flags.writeable = False
    for first, last in cuts:
        for unpack, packed in ((words.unpack_part, by_row), (words.unpack_lanes, tile)):
            expected = unpack.reference(packed, count, width, first, last)
            for implementation in COMPILED:
                with running(implementation):
                    found = unpack(packed, count, width, first, last)
                np.testing.assert_array_equal(found, expected, strict=True)


@examples(60)
@given(generators(), st.integers(1, 64), sizes(40), sizes(300))
def test_a_part_is_that_of_the_whole(rng: np.random.Generator, width: int, rows: int, count: int) -> None:
    fields = random_fields(rng, rows, count, width).astype(words.field_dtype(width))
    packed = words.pack(fields, width)
    start = int(rng.integers(count)) // 32 * 32
    stop = int(rng.integers(start, count)) + 1
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            part = words.unpack_part(words.from_tiles(packed, rows), count, width, start, stop)
            lanes = words.unpack_lanes(packed[0], count, width, start, stop)
        np.testing.assert_array_equal(part, fields[:, start:stop], strict=True)
        there = min(rows, 32)
        np.testing.assert_array_equal(lanes[:there], fields[:there, start:stop], strict=True)
        assert lanes.shape[0] == 32
        assert not lanes[there:].any()
