"""The digest of a file that is taken while several threads write it (deltafmt/checkpoint/restored.py)."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deltafmt
from conftest import small_tensors, write_pair
from deltafmt.checkpoint import restored
from deltafmt.checkpoint.restored import WrittenDigest
from deltafmt.errors import InvalidFileError
from deltafmt.methods import Exact


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@given(
    cuts=st.lists(st.integers(0, 5000), max_size=12),
    head=st.integers(0, 40),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 4),
    step=st.sampled_from([7, 1024]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_writes_does_not_matter(
    file: int, cuts: list[int], head: int, seed: int, threads: int, step: int
) -> None:
    rng = random.Random(seed)
    whole = rng.randbytes(head + 5000)
    os.ftruncate(file, 0)
    os.pwrite(file, whole[:head], 0)
    digest = WrittenDigest(file, whole[:head], step)
    spans = list(itertools.pairwise([head, *sorted(head + cut for cut in cuts), len(whole)]))
    rng.shuffle(spans)

    def write(span: tuple[int, int]) -> None:
        os.pwrite(file, whole[slice(*span)], span[0])
        digest.written(span[0], whole[slice(*span)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, spans))
    assert digest.digest(len(whole)) == blake3(whole).digest()


def test_what_was_not_said_to_be_written_is_read(file: int) -> None:
    os.pwrite(file, b"headfirstsecond", 0)
    digest = WrittenDigest(file, b"head")
    assert not digest.has_begun
    digest.written(9, b"second")
    assert not digest.has_begun
    digest.written(4, b"first")
    assert digest.has_begun
    os.pwrite(file, b"third", 15)
    assert digest.digest(20) == blake3(b"headfirstsecondthird").digest()
    with pytest.raises(OSError, match="fewer than 21 bytes"):
        digest.digest(21)


def test_bytes_that_are_written_wrong_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that comes back wrong in a way that its own checksum does not see."""
    pair = write_pair(tmp_path, *small_tensors())
    deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d", method=Exact())
    write = restored.FolderRestorer.write

    def flipped(self: restored.FolderRestorer, name: str, offset: int, data: bytes | memoryview) -> None:
        wrong = bytearray(data)
        wrong[-1:] = bytes(value ^ 1 for value in wrong[-1:])
        write(self, name, offset, bytes(wrong))

    monkeypatch.setattr(restored.FolderRestorer, "write", flipped)
    with pytest.raises(InvalidFileError, match="what is restored is not what was packed"):
        deltafmt.unpack(pair.base, tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()
