"""Checksums taken on a device are those of the hash library, whatever the sections' lengths and places."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from strategies import examples, generators

torch = pytest.importorskip("torch")

from deltafmt.kernels.xxh3 import algorithm, naive
from deltafmt.kernels.xxh3 import digests as device_digests

Sections = list[tuple[int, int]]
Digests = Callable[[torch.Tensor, Sections], list[bytes]]


def by_kernel(memory: torch.Tensor, sections: Sections) -> list[bytes]:
    from deltafmt.kernels.xxh3 import kernel as triton

    starts, lengths = np.array(sections, np.int64).T
    found = triton.accumulators(memory.view(torch.int64), starts // 8, lengths)
    return algorithm.merged(found.cpu().numpy().view(np.uint64), lengths.astype(np.uint64))


def by_reference(memory: torch.Tensor, sections: Sections) -> list[bytes]:
    return [naive.digest(memory.numpy().data[at : at + length]) for at, length in sections]


def implementations() -> list[object]:
    """Return what can run here, and where: the reference; the kernels on a GPU, or interpreted."""
    found: list[object] = [pytest.param(by_reference, "cpu", id="naive")]
    if torch.cuda.is_available():
        found.append(pytest.param(device_digests.digests, "cuda", id="triton"))
    elif os.environ.get("TRITON_INTERPRET") == "1":
        pytest.importorskip("triton")
        found.append(pytest.param(by_kernel, "cpu", id="triton"))
    return found


IMPLEMENTATIONS = pytest.mark.parametrize(("digests", "device"), implementations())
LENGTHS = st.one_of(
    st.integers(241, 5000),
    st.integers(1, 20).flatmap(lambda blocks: st.integers(1024 * blocks - 65, 1024 * blocks + 65)),
    st.integers(65_000, 70_000),
).filter(lambda length: length > algorithm.SHORT_BYTES)


def laid_out(rng: np.random.Generator, lengths: list[int], gaps: list[int]) -> tuple[np.ndarray, Sections]:
    """Return random bytes, and where the sections lie in them, in another order than that of their places."""
    sections, end = [], 0
    for length, gap in zip(lengths, gaps, strict=True):
        sections.append((end + 8 * gap, length))
        end = -(-(end + 8 * gap + length) // 8) * 8
    rng.shuffle(sections)
    return rng.integers(0, 256, end + 16, np.uint8), [(int(offset), int(length)) for offset, length in sections]


@IMPLEMENTATIONS
@examples(40)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    gaps=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    fill=st.sampled_from((None, 0, 255)),
    rng=generators(),
)
@example(lengths=[241, 1024, 1025], gaps=[0, 0, 0, 0], fill=255, rng=np.random.default_rng(0))
def test_agrees_with_the_library(digests: Digests, device: str, lengths, gaps, fill, rng) -> None:
    data, sections = laid_out(rng, lengths, gaps[: len(lengths)])
    if fill is not None:
        data[:] = fill
    found = digests(torch.from_numpy(data).to(device), sections)
    assert found == [xxhash.xxh3_128_digest(data[at : at + length].tobytes()) for at, length in sections]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@examples(20)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6), rng=generators())
def test_short_sections_too(device: str, lengths, rng) -> None:
    data, sections = laid_out(rng, lengths, [1] * len(lengths))
    found = device_digests.digests(torch.from_numpy(data).to(device), sections)
    assert found == [xxhash.xxh3_128_digest(data[at : at + length].tobytes()) for at, length in sections]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_and_large_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_digests, "BATCH_BYTES", 9_000_000)
    lengths = [30_000_001, 241, 4_000_000, 5_000_000, 999_999]
    data, sections = laid_out(np.random.default_rng(0), lengths, [0, 1, 2, 3, 4])
    found = device_digests.digests(torch.from_numpy(data).cuda(), sections)
    assert found == [xxhash.xxh3_128_digest(data[at : at + length].tobytes()) for at, length in sections]


@examples(100)
@given(lengths=st.lists(st.integers(241, 1200), max_size=12))
def test_batches_hold_every_section_once(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_digests, "BATCH_BYTES", 1000)
        patch.setattr(device_digests, "MAX_BATCH", 3)
        sections = [(8 * i, length) for i, length in enumerate(lengths)]
        batches = list(device_digests.batches(sections))
    assert [section for batch in batches for section in batch] == sections
    assert all(len(batch) == 1 or sum(length for _, length in batch) <= 1000 for batch in batches)
    assert all(1 <= len(batch) <= 3 for batch in batches)


def test_what_is_no_section_is_refused() -> None:
    memory = torch.zeros(1024, dtype=torch.uint8)
    for section in ((4, 300), (8, 1024), (-8, 300), (1024, 1), (8, -8)):
        with pytest.raises(UsageError, match="are not a section"):
            device_digests.digests(memory, [section])
    for wrong in (memory.int(), memory.view(2, 512), memory[:1001], memory[::2]):
        with pytest.raises(UsageError, match="expected uint8"):
            device_digests.digests(wrong, [])
    assert device_digests.digests(memory, []) == []


def test_the_first_load_does_not_wait_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = device_digests
    started, go_on, device = threading.Event(), threading.Event(), torch.device("cpu")

    def load(found: torch.device) -> None:
        assert found == device
        started.set()
        assert go_on.wait(10)
        module._loaded[found].set()

    monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(module, "_loaded", {})
    assert not module.are_loaded(device)
    module.load_soon(device)
    module.load_soon(device)
    assert started.wait(10)
    assert not module.are_loaded(device)
    go_on.set()
    assert module._loaded[device].wait(10)
    assert module.are_loaded(device)
