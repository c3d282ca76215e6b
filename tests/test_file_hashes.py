"""Digests of weight files that are taken of the chunks which several threads read."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import normal, write_folder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.restored import FileHead, file_digest
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.errors import StorageError
from deltafmt.methods import Exact
from deltafmt.pipeline import file_hashes
from deltafmt.pipeline.file_hashes import FileHash, ascending

STEP = 1000


def tensors_of(folder: Path) -> tuple[SafetensorsFile, list[Tensor]]:
    tensors = {f"{number}": normal(number, (20 + number, 100)) for number in range(5)}
    ((_, file),) = Checkpoint(write_folder(folder, tensors)).weight_files()
    return file, sorted(file.tensors.values(), key=lambda tensor: tensor.offset)


def take_all(hashes: FileHash, tensors: list[Tensor]) -> None:
    """Hash the chunks of tensors from several threads, in any order of being ready."""
    take_all_of(hashes, [tensor for tensor in tensors if hashes.expect(tensor)])


def take_all_of(hashes: FileHash, expected: list[Tensor]) -> None:
    spans = [(tensor, at) for tensor in expected for at in range(0, tensor.nbytes, STEP)]
    rng = random.Random(3)

    def read(span: tuple[Tensor, int]) -> None:
        tensor, at = span
        time.sleep(rng.random() / 200)
        with tensor.pages(at, min(STEP, tensor.nbytes - at)) as view:
            hashes.take(tensor.offset + at, view)
        hashes.fail(tensor.offset + at)  # what fails behind the hashing does not matter

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, spans))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 1, 4), (1, 2, 3), (2, 1, 3, 0, 4), (4, 0, 1)])
def test_the_digest_is_that_of_the_file(tmp_path: Path, order: tuple[int, ...]) -> None:
    file, tensors = tensors_of(tmp_path / "a")
    hashes = FileHash(file)
    take_all(hashes, [tensors[number] for number in order])
    assert hashes.digest() == file_digest(file.path)


def test_a_tensor_without_elements_holds_up_nobody(tmp_path: Path) -> None:
    sizes = {"a": 30, "b": 0, "c": 30}
    names = {name: normal(size, (size, 100)) for name, size in sizes.items()}
    ((_, file),) = Checkpoint(write_folder(tmp_path / "a", names)).weight_files()
    hashes = FileHash(file)
    # It lies behind a gap, and no chunk of it ever says that the gap is read.
    assert [hashes.expect(file.tensors[name]) for name in "bc"] == [False, True]
    take_all_of(hashes, [file.tensors["c"]])
    assert hashes.digest() == file_digest(file.path)


def test_of_a_file_that_is_hardly_read_there_is_no_digest(tmp_path: Path) -> None:
    file, tensors = tensors_of(tmp_path / "a")
    hashes = FileHash(file)
    take_all(hashes, tensors[:2])
    assert hashes.digest() is None


def test_a_chunk_that_is_not_read_holds_up_nobody(tmp_path: Path) -> None:
    file, tensors = tensors_of(tmp_path / "a")
    hashes = FileHash(file)
    assert all(map(hashes.expect, tensors))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(hashes.take, tensor.offset, b"y") for tensor in tensors[1:3]]
        hashes.fail(tensors[0].offset)
        for one in waiting:
            with pytest.raises(StorageError, match=r"model\.safetensors: an earlier part of it could not be read"):
                one.result()
    hashes.take(tensors[0].offset, b"x")  # what fails stops no chunk before it


@pytest.mark.parametrize("shards", [None, [["0", "1", "2", "3"], ["4", "5", "6", "7"]]])
def test_a_pack_reads_its_weight_files_once(
    tmp_path: Path, shards: list[list[str]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tensors lie between those that are hashed chunk by chunk.
    tensors = {f"{number}": normal(number, (600, 200) if number % 3 else (4,)) for number in range(8)}
    base = write_folder(tmp_path / "base", tensors, shards)
    finetuned = write_folder(tmp_path / "ft", {name: normal(9, raw.shape) for name, raw in tensors.items()}, shards)
    digest = FileHead.digest

    def no_weights(head: FileHead) -> bytes:
        assert head.path.name.endswith(".json")
        return digest(head)

    monkeypatch.setattr(file_hashes.FileHead, "digest", no_weights)
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=Exact(), threads=3)
    monkeypatch.undo()
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    for path in finetuned.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("layers", "again"), [(10, 0), (12, 2), (32, 8), (101, 9)])
def test_layers_in_the_order_of_their_letters_are_mostly_read_once(
    tmp_path: Path, layers: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Packed as 0, 1, 2, ..., and written as 0, 1, 10, 11, ..., 2.
    tensors = {f"layers.{number}.w": normal(number, (40, 64)) for number in sorted(range(layers), key=str)}
    base = write_folder(tmp_path / "base", tensors)
    finetuned = write_folder(tmp_path / "ft", {name: normal(9, raw.shape) for name, raw in tensors.items()})
    head = int.from_bytes((finetuned / "model.safetensors").read_bytes()[:8], "little") + 8
    read: list[int] = []
    before = FileHash._read

    def count(hashes: FileHash, first: int, end: int) -> None:
        read.append(max(end - first, 0))
        before(hashes, first, end)

    monkeypatch.setattr(FileHash, "_read", count)
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=Exact(), threads=2)
    assert sum(read) == head + again * 40 * 64 * 2
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    assert file_digest(tmp_path / "out" / "model.safetensors") == file_digest(finetuned / "model.safetensors")


def test_a_file_in_no_order_is_read_behind_the_last_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each lies before the one that is packed before it.
    tensors = {f"{number}": normal(number, (40, 64)) for number in range(9)}
    base = write_folder(tmp_path / "base", tensors)
    finetuned = write_folder(tmp_path / "ft", {name: normal(9, (40, 64)) for name in reversed(tensors)})
    expected: list[Tensor] = []
    monkeypatch.setattr(FileHash, "expect", lambda _, tensor: expected.append(tensor))
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=Exact(), threads=2)
    assert not expected
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    assert file_digest(tmp_path / "out" / "model.safetensors") == file_digest(finetuned / "model.safetensors")


@given(st.lists(st.integers(0, 5), max_size=7), st.randoms())
def test_what_ascends_has_the_most_bytes(sizes: list[int], rng: random.Random) -> None:
    ends = list(itertools.accumulate(sizes, initial=0))
    tensors = [Tensor("", "U8", (size,), cast("Any", None), at, size) for at, size in zip(ends, sizes, strict=False)]
    rng.shuffle(tensors)
    chosen = ascending(tensors)
    places = [tensors.index(tensor) for tensor in chosen]
    assert places == sorted(set(places))

    def holds(some: tuple[Tensor, ...]) -> bool:
        return all(one.offset < other.offset for one, other in itertools.pairwise(some))

    def total(some: Iterable[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in some)

    filled = [tensor for tensor in tensors if tensor.nbytes]
    choices = itertools.chain.from_iterable(itertools.combinations(filled, count) for count in range(len(filled) + 1))
    assert holds(tuple(chosen))
    assert total(chosen) == max(map(total, filter(holds, choices)))
