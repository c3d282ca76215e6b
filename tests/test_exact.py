"""Chunks of exact tensors: every dtype and bit pattern round, bad chunks refused (spec, section 17)."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.errors import InvalidFileError
from deltafmt.exact import chunk as chunks
from deltafmt.exact.coding import ExactDecoder, assemble, encode_chunk
from deltafmt.exact.differences import (
    Marks,
    exponents,
    joined,
    ordered,
    sorted_planes,
    unordered,
    unzigzag,
    zigzag,
)
from deltafmt.exact.few import differing, filled, gap_counts, places_of, put, ranks_of, taken
from deltafmt.exact.frames import decompress_into
from deltafmt.exact.plane_frames import plane_frame
from deltafmt.exact.units import Unit, Units, unit_count, unit_of
from deltafmt.format.constants import DTYPE_BITS
from implementations import IMPLEMENTATIONS, running

DTYPES = sorted(DTYPE_BITS)
FLOATS = [name for name in DTYPES if unit_of(name).is_float]


def drawn_units(data: st.DataObject, unit: Unit, most: int = 3000) -> tuple[Units, Units]:
    """Draw values and a prediction: any bits, some of them related, some equal."""
    count = data.draw(st.integers(1, most))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    prediction = rng.integers(0, 256, count * unit.width, np.uint8).view(unit.dtype)
    if data.draw(st.booleans()) and unit.is_float:  # as weights are: few exponents
        keep = unit.dtype.type(~(((1 << unit.bits) - 4) << unit.shift) & (1 << 8 * unit.width) - 1)
        prediction = prediction & keep
    steps = rng.integers(-3, 4, count).astype(f"i{unit.width}").view(unit.dtype)
    steps[rng.random(count) >= data.draw(st.sampled_from((0.0, 0.01, 0.3, 1.0)))] = 0
    with np.errstate(over="ignore"):
        values = prediction + steps
    if data.draw(st.booleans()):
        wild = rng.random(count) < 0.05
        values[wild] = rng.integers(0, 256, count * unit.width, np.uint8).view(unit.dtype)[wild]
    return values, prediction


def drawn_marks(data: st.DataObject, count: int) -> Marks | None:
    """Draw which units are marked, or that there are no marks."""
    share = data.draw(st.sampled_from((None, 0.0, 0.25, 1.0)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    return None if share is None else rng.random(count) < share


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_bit_pattern_comes_back_through_the_sorted_planes(name: str, data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(DTYPES)))
    values, prediction = drawn_units(data, unit, 40000)
    key = data.draw(st.sampled_from((unit, Unit(unit.width))))
    marks = drawn_marks(data, values.size)
    planes, counts = sorted_planes.reference(values, prediction, unit, key, marks)
    assert np.array_equal(joined.reference(planes, prediction, unit, key, marks), values)
    with running(name):
        found, numbers = sorted_planes(values, prediction, unit, key, marks)
        assert np.array_equal(found, planes)
        assert np.array_equal(numbers, counts)
        assert np.array_equal(joined(found, prediction, unit, key, marks), values)
        assert np.array_equal(joined(planes, prediction, unit, key, marks), values)


@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_sample_tells_the_same_to_every_loop(name: str, data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(DTYPES)))
    values, prediction = drawn_units(data, unit, chunks._SAMPLE)
    counts = chunks.byte_counts.reference(values.view(np.uint8))
    unrelated = chunks.is_unrelated.reference(values, prediction, unit)
    with running(name):
        assert np.array_equal(chunks.byte_counts(values.view(np.uint8)), counts)
        assert chunks.is_unrelated(values, prediction, unit) == unrelated


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_tells_what_is_unrelated(dtype: str) -> None:
    unit, rng = unit_of(dtype), np.random.default_rng(5)
    noise = rng.integers(0, 256, 6000 * unit.width, np.uint8).view(unit.dtype)
    few = rng.integers(0, 7, 6000).astype(unit.dtype)
    assert chunks.is_unrelated(few, noise, unit)
    with np.errstate(over="ignore"):
        assert not chunks.is_unrelated(noise + few, noise, unit)


@pytest.mark.parametrize("zeros", [0.0, 0.0001, 1.0])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_weights_of_a_large_chunk_come_back_through_the_sorted_planes(name: str, dtype: str, zeros: float) -> None:
    """Exponents of weights lie near each other, but those of zeros do not; large chunks are joined in segments."""
    unit, rng = unit_of(dtype), np.random.default_rng(7)
    count = (2 << 16) + 3001
    wide = rng.standard_normal(count) * np.where(np.arange(count) < 70000, 0.02, 1e-7)
    wide[rng.random(count) < zeros] = 0
    whole = wide if dtype == "F64" else wide.astype(np.float32).view(np.uint32) >> (16 if dtype == "BF16" else 0)
    prediction = whole.view(np.uint64) if dtype == "F64" else whole.astype(unit.dtype)
    values = prediction + rng.integers(0, 9, count).astype(unit.dtype)
    planes, _ = sorted_planes.reference(values, prediction, unit, unit)
    with running(name):
        assert np.array_equal(joined(planes, prediction, unit, unit), values)


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ranks_say_where_units_stand_when_all_are_sorted(name: str, data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(DTYPES)))
    values, prediction = drawn_units(data, unit, 5000)
    places = np.flatnonzero(values != prediction)
    planes, counts = sorted_planes.reference(values, prediction, unit, unit)
    with running(name):
        ranks, found = ranks_of(places, prediction, unit)
    assert np.array_equal(found, counts)
    assert np.array_equal(np.sort(ranks), np.flatnonzero(planes.any(axis=0)))
    assert np.array_equal(np.argsort(exponents(prediction, unit), kind="stable")[ranks], places)


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_few_units_that_differ_are_found_before_and_after_sorting(name: str, data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(DTYPES)))
    values, prediction = drawn_units(data, unit, 5000)
    marks = drawn_marks(data, values.size)
    planes, _ = sorted_planes.reference(values, prediction, unit, unit, marks)
    places = np.flatnonzero(values != prediction)
    few = places.size <= values.size // 8
    ranks = np.flatnonzero(planes.any(axis=0))
    with running(name):
        given_places, given_ranks = differing(values, prediction), filled(planes)
        found = places_of(ranks, prediction, unit, marks)
    assert (given_places is None, given_ranks is None) == (not few, not few)
    assert given_places is None or np.array_equal(given_places, places)
    assert given_ranks is None or np.array_equal(given_ranks, ranks)
    assert np.array_equal(found, places_of.reference(ranks, prediction, unit, marks))
    assert np.array_equal(np.sort(found), places)


@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_units_of_common_and_rare_exponents_are_found_alike(name: str, data: st.DataObject) -> None:
    """Chunks that are large enough for keys to be counted by vector instructions, whatever share of them is rare."""
    unit = unit_of(data.draw(st.sampled_from(FLOATS)))
    count = data.draw(st.integers(16384, 20000))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top = 1 << unit.bits
    common = rng.integers(0, top, data.draw(st.integers(1, 12)))
    keys = common[rng.integers(0, common.size, count)]
    rare = rng.random(count) < data.draw(st.sampled_from((0.0, 0.001, 0.05, 0.2)))
    rare &= np.arange(count) >= data.draw(st.sampled_from((0, 4096)))
    keys[rare] = rng.integers(0, top, count)[rare]
    noise = rng.integers(0, 256, count * unit.width, np.uint8).view(unit.dtype)
    field = unit.dtype.type(top - 1 << unit.shift & (1 << 8 * unit.width) - 1)
    prediction = noise & ~field | (keys.astype(unit.dtype) << unit.dtype.type(unit.shift))
    share = data.draw(st.sampled_from((0.0, 0.0002, 0.01, 0.3, 1.0)))
    places = np.flatnonzero(rng.random(count) < share)
    expected, numbers = ranks_of.reference(places, prediction, unit)
    with running(name):
        ranks, found = ranks_of(places, prediction, unit)
        back = places_of(np.sort(ranks), prediction, unit)
    assert np.array_equal(ranks, expected)
    assert np.array_equal(found, numbers)
    assert np.array_equal(back, places_of.reference(np.sort(expected), prediction, unit))


@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_units_are_moved_and_gaps_counted_as_numpy_does(name: str, data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(DTYPES)))
    values, prediction = drawn_units(data, unit, 2000)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    places = rng.permutation(values.size)[: data.draw(st.integers(0, values.size))]
    numbers = np.flatnonzero(rng.random(20000) < data.draw(st.sampled_from((0.0, 0.002, 0.5))))
    moved, expected = prediction.copy(), prediction.copy()
    put.reference(expected, places, values[places])
    with running(name):
        assert np.array_equal(taken(values, places), values[places])
        put(moved, places, values[places])
        assert np.array_equal(gap_counts(numbers), gap_counts.reference(numbers))
    assert np.array_equal(moved, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_is_moved_beyond_the_units(name: str) -> None:
    units, outside = np.zeros(4, np.uint16), np.array([0, 4])
    with running(name):
        with pytest.raises((ValueError, IndexError)):
            taken(units, outside)
        with pytest.raises((ValueError, IndexError)):
            put(units, outside, np.ones(2, np.uint16))
    assert not units.any()


def test_few_differences_are_coded_as_all_are() -> None:
    rng, unit, count = np.random.default_rng(2), unit_of("BF16"), 1 << 16
    prediction = (rng.normal(0, 0.02, count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    values = prediction + (prediction >> 7 & 255 < 114)  # elements near zero have moved
    made = chunks.encode(values, prediction, unit)
    planes, counts = sorted_planes(values, prediction, unit, unit)
    assert 0 < np.count_nonzero(values != prediction) < count // 8
    assert made == chunks.Chunk(chunks.SORTED, chunks._write_planes(planes, chunks._ends(counts)))
    assert len(made.data) < len(chunks._sparse(values, prediction, np.flatnonzero(values != prediction), unit).data)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ordered_integers_ascend_as_floats_do(dtype: str) -> None:
    unit = unit_of(dtype)
    top = (1 << unit.bits) - 1 << unit.shift  # infinity, or the largest exponent
    sign = 1 << 8 * unit.width - 1
    ascending = np.array([sign | top, sign | 1, sign, 0, 1, 1 << unit.shift, top], unit.dtype)
    integers = ordered(ascending, unit)
    assert (integers[1:] > integers[:-1]).all()
    assert int(integers[3]) - int(integers[2]) == 1  # the zeros are neighbours
    assert np.array_equal(unordered(integers, unit), ascending)


def test_zigzag_is_small_for_small_differences_of_either_sign() -> None:
    unit = unit_of("U8")
    differences = np.array([0, 255, 1, 254, 2, 127, 128], np.uint8)
    assert zigzag(differences, unit).tolist() == [0, 1, 2, 3, 4, 254, 255]
    assert np.array_equal(unzigzag(zigzag(differences, unit), unit), differences)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_tensor_comes_back_whatever_its_dtype_and_chunks(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    unit = unit_of(dtype)
    values, prediction = drawn_units(data, unit)
    size = data.draw(st.sampled_from((256, 512, 4096)))
    level = data.draw(st.sampled_from(chunks.LEVELS))
    elements = values.nbytes * 8 // DTYPE_BITS[dtype]
    shape = (elements,)
    if unit_count(dtype, shape) != values.size:
        return  # the last bytes hold no whole element
    spans = range(0, values.size, size)
    made = [encode_chunk(values[at : at + size], prediction[at : at + size], unit, level) for at in spans]
    decoder = ExactDecoder(memoryview(b"".join(assemble(made))), dtype, shape, size)
    restored = []
    for number in range(len(decoder)):
        first, end = decoder.span(number)
        decoder.check(number)
        restored.append(decoder.decode(number, prediction[first:end]))
    assert np.array_equal(np.concatenate(restored), values)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_form_decodes_to_the_same_units(data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(DTYPES)))
    values, prediction = drawn_units(data, unit, 2000)
    plain, sorts = Unit(unit.width), unit
    forms = {
        chunks.STORED: values.tobytes(),
        chunks.VALUES: chunks._write_planes(chunks.planes_of(values, unit)),
        chunks.DIFFERENCES: chunks._write_planes(sorted_planes(values, prediction, unit, plain)[0]),
        chunks.SORTED: chunks._write_planes(sorted_planes(values, prediction, unit, sorts)[0]),
    }
    if (values != prediction).any():
        forms[chunks.SPARSE] = chunks._sparse(values, prediction, np.flatnonzero(values != prediction), unit).data
    for form, stored in forms.items():
        chunks.check(form, stored, values.size, unit)
        assert np.array_equal(chunks.decode(form, stored, prediction, unit), values), form


def test_each_form_is_chosen_where_it_is_smallest() -> None:
    rng = np.random.default_rng(1)
    unit, count = unit_of("BF16"), 1 << 16
    weights = rng.normal(0, 0.02, count).astype(np.float32).view(np.uint32)
    prediction = (weights >> 16).astype(np.uint16)
    step = np.where(prediction >> 7 & 255 < 118, rng.integers(-40, 41, count), rng.integers(-2, 3, count))
    near = (prediction + step).astype(np.uint16)
    few = prediction.copy()
    few[::1000] += 1
    noise = rng.integers(0, 2**16, count).astype(np.uint16)
    other = (rng.normal(0, 0.02, count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert chunks.encode(prediction.copy(), prediction, unit).form == chunks.SAME
    assert chunks.encode(near, prediction, unit).form == chunks.SORTED
    assert chunks.encode(near, prediction, unit, "fast").form == chunks.DIFFERENCES
    assert chunks.encode(few, prediction, unit).form == chunks.SPARSE
    assert chunks.encode(noise, prediction, unit).form == chunks.STORED
    assert chunks.encode(other, noise, unit).form == chunks.VALUES
    sorted_bytes = len(chunks.encode(near, prediction, unit).data)
    assert sorted_bytes < 0.95 * len(chunks.encode(near, prediction, unit, "fast").data)


def test_a_sparse_chunk_reaches_over_long_gaps() -> None:
    unit, count = unit_of("F32"), 70000
    prediction = np.zeros(count, np.uint32)
    for places in ([0], [count - 1], [254, 255 + 255, 1020], [255], [0, 256], list(range(300))):
        values = prediction.copy()
        values[places] = 7
        chunk = chunks._sparse(values, prediction, np.flatnonzero(values != prediction), unit)
        assert len(chunk.data) < 1000
        assert np.array_equal(chunks.decode(chunk.form, chunk.data, prediction, unit), values)


def head(*lengths: int) -> bytes:
    return struct.pack(f"<{len(lengths)}I", *lengths)


FRAME = bytes(plane_frame(np.frombuffer(bytes(99) + b"x", np.uint8)))
BAD_CHUNKS = {
    "bytes where": [
        (chunks.SAME, b"x", 100),
        (chunks.STORED, bytes(99), 100),
        (chunks.VALUES, head(len(FRAME) - 1) + FRAME, 100),
        (chunks.SORTED, head(len(FRAME)) + FRAME + b"x", 100),
    ],
    "cannot hold the lengths": [(chunks.DIFFERENCES, b"xyz", 100)],
    "takes 101": [(chunks.VALUES, head(101) + bytes(101), 100)],
    "a plane of zeros": [(chunks.VALUES, head(100) + bytes(100), 100)],
    "declares 100 bytes": [(chunks.SORTED, head(len(FRAME)) + FRAME, 101)],
    "not a zstd frame": [(chunks.SORTED, head(20) + bytes(20), 100)],
    "does not end where": [(chunks.SORTED, head(len(FRAME) + 1) + FRAME + b"x", 100)],
    "cannot hold the numbers": [(chunks.SPARSE, head(1, 1), 100)],
    "places in": [
        (chunks.SPARSE, head(0, 0, 0) + head(0), 100),
        (chunks.SPARSE, head(101, 101, 0) + head(1) + b"x", 100),
        (chunks.SPARSE, head(2, 1, 0) + head(1) + b"x", 100),
        (chunks.SPARSE, head(1, 2, 2) + b"\x01\x01" + head(1) + b"x", 100),
    ],
    "the gaps do not give": [
        (chunks.SPARSE, head(1, 2, 2) + b"\x01\x01" + head(1) + b"x", 300),
        (chunks.SPARSE, head(1, 2, 2) + b"\x01\xff" + head(1) + b"x", 300),
        (chunks.SPARSE, head(1, 1, 1) + b"\x64" + head(1) + b"x", 100),
    ],
    "has no difference": [(chunks.SPARSE, head(1, 1, 1) + b"\x01" + head(0), 100)],
}


@pytest.mark.parametrize(
    ("words", "form", "data", "count"), [(words, *case) for words, cases in BAD_CHUNKS.items() for case in cases]
)
def test_a_bad_chunk_is_refused(words: str, form: int, data: bytes, count: int) -> None:
    unit = unit_of("U8")
    with pytest.raises(InvalidFileError, match=words):
        chunks.check(form, data, count, unit)
    with pytest.raises(InvalidFileError, match=words):
        chunks.decode(form, data, np.zeros(count, np.uint8), unit)


def test_a_frame_must_be_as_the_specification_says() -> None:
    import zstandard

    data = b"abc" * 100
    for frame, words in (
        (zstandard.ZstdCompressor(write_checksum=True).compress(data), "checksum"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(data), "declares"),
        (2 * zstandard.ZstdCompressor().compress(data), "does not end where"),
        (zstandard.ZstdCompressor().compress(data)[:-1], "does not end where"),
    ):
        with pytest.raises(InvalidFileError, match=words):
            decompress_into(frame, memoryview(bytearray(len(data))))
    found = bytearray(300)
    decompress_into(zstandard.ZstdCompressor().compress(data), memoryview(found))
    assert found == data


def test_a_wrong_prediction_is_found() -> None:
    unit = unit_of("BF16")
    prediction = np.arange(1000, dtype=np.uint16)
    made = encode_chunk(prediction + np.uint16(1), prediction, unit)
    decoder = ExactDecoder(memoryview(b"".join(assemble([made]))), "BF16", (1000,), 1024)
    with pytest.raises(InvalidFileError, match="chunk 0: what it restores is not what was packed"):
        decoder.decode(0, prediction + np.uint16(1))


def test_a_table_that_does_not_cover_the_buffer_is_refused() -> None:
    row = struct.pack("<QII", 0, 4, chunks.STORED)
    for buffer, words in (
        (bytes(15), "cannot hold a table of 1 chunks"),
        (bytes(3) + row, "take 4 bytes, not 3"),
        (bytes(4) + struct.pack("<QII", 0, 4, 6), "unknown form 6"),
    ):
        with pytest.raises(InvalidFileError, match=words):
            ExactDecoder(memoryview(buffer), "U8", (4,), 256)
