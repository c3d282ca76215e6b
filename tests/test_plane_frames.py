"""Frames of planes: the loop writes what the reference writes, and zstd reads it."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.exact.frames import decompress_into
from deltafmt.exact.plane_frames import Plane, code_lengths, plane_frame
from implementations import COMPILED, running

BLOCK = 1 << 17


def plane(kind: str, size: int, strength: float, seed: int) -> Plane:
    """Return bytes of one kind."""
    rng = np.random.default_rng(seed)
    if kind == "few":
        made = np.minimum(rng.geometric(0.02 + 0.9 * strength, size) - 1, 255)
    elif kind == "random":
        made = rng.integers(0, 1 + int(255 * strength), size)
    elif kind == "steep":
        # Frequencies so far apart that codes would be longer than 11 bits.
        made = 255 - np.minimum(rng.zipf(1.1 + strength, size), 255)
    elif kind == "zeros":
        made = (rng.random(size) < 0.2 * strength) * rng.integers(0, 256, size)
    elif kind == "stretches":
        lengths = rng.integers(1, 2 + int(3000 * strength), size // 2 + 1)
        made = np.repeat(rng.integers(0, 2, lengths.size) * rng.integers(0, 256, lengths.size), lengths)[:size]
    elif kind == "fibonacci":
        # Huffman's codes of these counts are as long as they can be.
        counts = [1, 1]
        while sum(counts) < size:
            counts.append(counts[-1] + counts[-2])
        made = int(230 * strength) + rng.permutation(np.repeat(np.arange(len(counts)), counts))[:size]
    elif kind == "flat":
        # Weights that are all equal have no description if there are more than 128.
        made = rng.permutation(np.resize(np.arange(1 + rng.choice([1, 63, 126, 127, 128, 129, 254, 255])), size))
    elif kind == "runs":
        lengths = rng.choice([1, 7, 8, 11, 12, 13, 14, 34, 35, 36, 130, 131, 132], size // 4 + 2)
        lengths[1::2] = rng.choice([1, 1, 2, 15, 16, 17, 63, 64, 65, 130], lengths[1::2].size)
        made = np.repeat(np.arange(lengths.size) % 2, lengths)[:size] * rng.integers(1, 2 + int(254 * strength), size)
    else:
        made = np.full(size, int(255 * strength))
    return made.astype(np.uint8)


KINDS = ("few", "random", "steep", "zeros", "stretches", "fibonacci", "flat", "runs", "one")


def check(data: Plane, ends: list[int]) -> bytes:
    """Check a frame against the reference and zstd; return it."""
    frame = bytes(plane_frame.reference(data, ends))
    for name in COMPILED:
        with running(name):
            assert bytes(plane_frame(data, ends)) == frame
    assert zstandard.ZstdDecompressor().decompress(frame) == data.tobytes()
    found = np.empty_like(data)
    decompress_into(frame, found.data)
    assert np.array_equal(found, data)
    return frame


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    size=st.one_of(st.integers(1, 300), st.integers(1, 10_000)),
    strength=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    ends=st.lists(st.integers(0, 20_000), max_size=4),
)
def test_frames_are_those_of_the_reference(kind: str, size: int, strength: float, seed: int, ends: list[int]) -> None:
    check(plane(kind, size, strength, seed), sorted(set(ends)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [BLOCK, BLOCK + 5])
def test_frames_of_several_blocks(kind: str, size: int) -> None:
    data = plane(kind, size, 0.3, size)
    frame = check(data, [])
    # A block without any gain is stored, so a frame is hardly longer than its content.
    assert len(frame) <= size + 9 + 3 * 3


def test_blocks_that_differ_in_kind_follow_each_other() -> None:
    parts = [plane(kind, size, 0.4, 7) for size in (3, 70, 4096, BLOCK) for kind in KINDS]
    ends = np.cumsum([part.size for part in parts]).tolist()
    check(np.concatenate(parts), ends)
    check(np.concatenate(parts[::-1]), [])


@pytest.mark.parametrize("ends", [[1000, 1000], [4000, 1000], [0, 1000, 5000, 5000, 9000]])
def test_ends_in_any_order(ends: list[int]) -> None:
    data = plane("few", 5000, 0.3, 1)
    assert check(data, ends) == check(data, sorted({end for end in ends if 0 < end < data.size}))


@pytest.mark.parametrize("number", [1, 126, 127, 128, 129, 254, 255, 256, 257])
@pytest.mark.parametrize("length", [12, 65_541])
def test_numbers_of_runs(number: int, length: int) -> None:
    # One code alone for all lengths of literals, and the number of sequences in one byte or two.
    run = np.append(np.uint8(9), np.zeros(length, np.uint8))
    check(np.tile(run, number if length < 100 else 1), [])


def test_a_tree_is_used_again_behind_blocks_without_one() -> None:
    rng = np.random.default_rng(1)
    data = plane("few", 2000, 0.3, 1)
    noise = rng.integers(0, 256, 300).astype(np.uint8)
    runs = np.zeros(300, np.uint8)
    runs[::50] = 1  # its literals are stored
    parts = [
        data,
        noise,
        rng.permutation(data),
        np.full(90, 3, np.uint8),
        rng.permutation(data),
        runs,
        rng.permutation(data),
    ]
    frame = check(np.concatenate(parts), np.cumsum([part.size for part in parts]).tolist())
    kinds, place = [], 9
    for _ in parts:
        head = int.from_bytes(frame[place : place + 3], "little")
        kinds.append((head >> 1 & 3, frame[place + 3] & 3 if head >> 1 & 3 == 2 else None))
        place += 3 + (1 if head >> 1 & 3 == 1 else head >> 3)
    # A new tree; stored; the last tree; one byte repeated; the last tree; stored literals; the last tree.
    assert kinds == [(2, 2), (0, None), (2, 3), (1, None), (2, 3), (2, 0), (2, 3)]


def test_a_frame_is_about_as_long_as_the_entropy_of_its_bytes() -> None:
    data = plane("few", 1 << 18, 0.05, 3)
    share = np.bincount(data) / data.size
    share = share[share > 0]
    entropy = -(share * np.log2(share)).sum() / 8
    assert entropy < len(plane_frame(data)) / data.size < 1.02 * entropy


def test_runs_of_zeros_take_less_than_a_bit_each() -> None:
    data = plane("zeros", 1 << 18, 0.1, 5)
    assert len(plane_frame(data)) < data.size / 8 / 2


@given(st.lists(st.integers(0, 2**20), min_size=2, max_size=256))
def test_codes_are_complete_and_no_longer_than_eleven_bits(numbers: list[int]) -> None:
    counts = np.zeros(256, np.int64)
    counts[: len(numbers)] = numbers
    counts[:2] += 1
    lengths = code_lengths(counts)
    assert np.array_equal(lengths > 0, counts > 0)
    assert lengths.max() <= 11
    assert sum(2.0**-length for length in lengths[lengths > 0]) == 1
