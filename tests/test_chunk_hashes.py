"""Fingerprints that are taken of chunks which several threads read."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import normal, write_folder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import StorageError
from deltafmt.pipeline.chunk_hashes import ChunkHashes

STEP = 1000


def tensor_of(folder: Path) -> Tensor:
    return Checkpoint(write_folder(folder, {"x": normal(1, (70, 100))})).tensors["x"]


@pytest.mark.parametrize("behind", [0, 1, 3 * STEP])
def test_the_fingerprint_is_that_of_the_tensor(tmp_path: Path, behind: int) -> None:
    tensor = tensor_of(tmp_path / "a")
    hashes, end = ChunkHashes(tensor), tensor.nbytes - behind
    spans = [(first, min(first + STEP, end)) for first in range(0, end, STEP)]
    rng = random.Random(3)

    def read(number: int) -> None:
        first, last = spans[number]
        time.sleep(rng.random() / 200)  # chunks are ready in any order
        with tensor.pages(first, last - first) as view:
            hashes.take(number, view)
        hashes.fail(number)  # what fails behind the hashing does not matter

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(len(spans))))
    assert not hashes.failed
    assert hashes.digest() == tensor.fingerprint()


def test_a_chunk_that_is_not_read_holds_up_nobody(tmp_path: Path) -> None:
    hashes = ChunkHashes(tensor_of(tmp_path / "a"))
    hashes.take(0, b"x")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(hashes.take, number, b"y") for number in (2, 3)]
        hashes.fail(1)
        for one in waiting:
            with pytest.raises(StorageError, match='tensor "x": an earlier part of it could not be read'):
                one.result()
    assert hashes.failed


@pytest.mark.parametrize("failed", [(2,), (2, 3), (3, 2)])
def test_what_fails_stops_no_chunk_before_it(tmp_path: Path, failed: tuple[int, ...]) -> None:
    # Each chunk before the first that failed is hashed, or says what its own fault is.
    hashes = ChunkHashes(tensor_of(tmp_path / "a"))
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(hashes.take, 1, b"y")
        for number in failed:
            hashes.fail(number)
        hashes.take(0, b"x")
        waiting.result(timeout=60)
        with pytest.raises(StorageError, match="an earlier part of it could not be read"):
            hashes.take(3, b"z")
    assert hashes.failed


def test_a_chunk_that_fails_in_its_turn_is_the_first(tmp_path: Path) -> None:
    hashes = ChunkHashes(tensor_of(tmp_path / "a"))
    hashes.fail(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(hashes.take, 1, b"y")
        hashes.fail(0)
        with pytest.raises(StorageError, match="an earlier part of it could not be read"):
            waiting.result(timeout=60)
