"""Frames of planes: the loop writes what the reference writes, and zstd reads it."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.exact.frames import decompress
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
    else:
        made = np.full(size, int(255 * strength))
    return made.astype(np.uint8)


KINDS = ("few", "random", "steep", "zeros", "stretches", "one")


def check(data: Plane, ends: list[int]) -> bytes:
    """Check a frame against the reference and zstd; return it."""
    frame = plane_frame.reference(data, ends)
    for name in COMPILED:
        with running(name):
            assert plane_frame(data, ends) == frame
    assert zstandard.ZstdDecompressor().decompress(frame) == data.tobytes()
    assert decompress(frame, data.size) == data.tobytes()
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
