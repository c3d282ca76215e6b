"""Planes that repeat: a look finds them, and zstd's own compressor makes their frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.exact import chunk as chunks
from deltafmt.exact.plane_frames import Plane, plane_frame
from deltafmt.exact.repeats import may_repeat, searched_frame
from deltafmt.exact.units import Units, unit_of
from implementations import IMPLEMENTATIONS, running

# What planes were compressed with before they were counted (docs/decisions.md, 73).
FORMER = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=17,
    write_content_size=True,
    write_checksum=False,
)


def former(data: Plane) -> bytes:
    return zstandard.ZstdCompressor(compression_params=FORMER).compress(data.data)


def looked_at(data: Plane) -> bool:
    """Return what the look says, the same with and without compiled loops."""
    said = set()
    for name in IMPLEMENTATIONS:
        with running(name):
            said.add(may_repeat(data))
    (one,) = said
    return one


def stored(data: Plane) -> bytes:
    """Return the bytes of a plane as a chunk holds them, which zstd reads."""
    made = chunks._write_planes([data])
    found = np.empty_like(data)
    chunks._read_plane(memoryview(made)[4:], found)
    assert np.array_equal(found, data)
    return made[4:]


def noise(size: int, kinds: int, seed: int) -> Plane:
    return np.random.default_rng(seed).integers(0, kinds, size).astype(np.uint8)


def mask(value: float, dtype: str, bits: str) -> Units:
    return np.triu(np.full((1024, 1024), value, dtype), 1).view(bits).ravel()


def constant_with_others() -> Units:
    made, rng = np.full(1 << 20, 0x3F, np.uint8), np.random.default_rng(1)
    made[rng.choice(made.size, 300, replace=False)] = noise(300, 256, 2)
    return made


def rows(width: int) -> Units:
    normal = np.random.default_rng(3).normal(0, 0.02, width).astype(np.float32)
    return np.tile((normal.view(np.uint32) >> 16).astype(np.uint16), 256)


CASES: dict[str, tuple[str, Callable[[], Units], int]] = {
    "equal rows": ("BF16", lambda: rows(1024), 3_000),
    "equal longer rows": ("BF16", lambda: rows(4096), 8_000),
    "causal mask F32": ("F32", lambda: mask(np.finfo(np.float32).min, "<f4", "<u4"), 6_500),
    "causal mask F16": ("F16", lambda: mask(np.finfo(np.float16).min, "<f2", "<u2"), 3_200),
    "tril": ("U8", lambda: np.tril(np.ones((1024, 1024), np.uint8)).ravel(), 1_600),
    "positions": ("I64", lambda: np.arange(65_536, dtype=np.uint64), 1_100),
    "more positions": ("I64", lambda: np.arange(100_000, dtype=np.uint64), 1_700),
    "one byte and others": ("U8", constant_with_others, 1_400),
}


@pytest.mark.parametrize("level", chunks.LEVELS)
@pytest.mark.parametrize("case", CASES)
def test_tensors_that_repeat(case: str, level: str) -> None:
    dtype, make, most = CASES[case]
    values, unit = make(), unit_of(dtype)
    zeros = np.zeros_like(values)
    made = chunks.encode(values, zeros, unit, level)
    assert len(made.data) < most
    assert np.array_equal(chunks.decode(made.form, made.data, zeros, unit), values)


@pytest.mark.parametrize("period", [3, 100, 127, 128, 129, 1000, 4096, 12_288, 16_384])
@pytest.mark.parametrize("kinds", [4, 256])
@pytest.mark.parametrize("where", ["all", "first half", "last half"])
def test_periods(period: int, kinds: int, where: str) -> None:
    piece = noise(period, kinds, period)
    piece[0] = 1
    data = noise(1 << 18, kinds, 9)
    part = {"all": slice(None), "first half": slice(1 << 17), "last half": slice(1 << 17, None)}[where]
    data[part] = np.resize(piece, data[part].size)
    assert looked_at(data)
    assert len(stored(data)) < 0.9 * min(data.size, len(plane_frame(data)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 255, 256, 264, 5000, 32_768, 300_000])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 1])
def test_planes_of_deltas_are_not_searched(share: float, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = np.minimum(rng.geometric(0.04, size), 255).astype(np.uint8) * (rng.random(size) < share)
    assert not looked_at(data)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_smallest_frame_is_kept(data: st.DataObject) -> None:
    pieces = [
        noise(data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 256)), data.draw(st.integers(0, 99)))
        + np.uint8(data.draw(st.integers(0, 1)))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    order = data.draw(st.lists(st.tuples(st.sampled_from(pieces), st.integers(1, 9)), min_size=1, max_size=8))
    plane = np.concatenate([np.tile(piece, number) for piece, number in order])
    if not plane.any():
        return
    made = stored(plane)
    assert len(made) <= plane.size
    if looked_at(plane):
        assert len(made) <= min(len(plane_frame(plane)), len(former(plane)))
        assert zstandard.ZstdDecompressor().decompress(searched_frame(plane)) == plane.tobytes()
    for name in IMPLEMENTATIONS:
        with running(name):
            assert stored(plane) == made


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(0, 70_000),
    kinds=st.integers(1, 4),
    seed=st.integers(0, 99),
    share=st.sampled_from((0.001, 0.01, 0.1, 1)),
    copies=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(8, 600)), max_size=3),
)
def test_the_look_is_that_of_the_reference(
    size: int, kinds: int, seed: int, share: float, copies: list[tuple[float, float, int]]
) -> None:
    plane = noise(size, kinds, seed) * (np.random.default_rng(seed).random(size) < share)
    for a, b, length in copies:
        old, new = int(a * min(size, 128)), int(b * size)
        piece = plane[old : old + length][: size - new].copy()
        plane[new : new + piece.size] = piece
    looked_at(plane)
