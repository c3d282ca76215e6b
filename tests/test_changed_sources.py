"""A weight file that changes while it is read spoils nothing: the command fails and leaves no output."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.errors import StorageError
from deltafmt.methods import Exact, Method


def write(path: Path, seed: int) -> Path:
    writer = CheckpointWriter(path, [TensorSpec("w", "F32", (64, 64))])
    values = np.random.default_rng(seed).standard_normal((64, 64), np.float32)
    writer.write("w", 0, memoryview(values).cast("B"))
    writer.commit()
    return path


def touch(folder: Path) -> None:
    file = folder / "model.safetensors"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("method", [None, Exact()], ids=str)
def test_pack(method: Method | None, side: str, tmp_path: Path) -> None:
    base, finetuned = write(tmp_path / "base", 1), write(tmp_path / "finetuned", 2)
    out = tmp_path / "d.deltafmt"
    with pytest.raises(StorageError, match="changed while it was being read"):
        deltafmt.pack(base, finetuned, out, method=method, progress=lambda *_: touch(tmp_path / side))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]
    deltafmt.pack(base, finetuned, out, method=method)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_an_archive_of_a_file_that_becomes_shorter_or_is_replaced(side: str, tmp_path: Path) -> None:
    """The archive has digests of the whole file: what changed behind the tensors' reading would be recorded, too."""
    base, finetuned = write(tmp_path / "base", 1), write(tmp_path / "finetuned", 2)
    file = tmp_path / side / "model.safetensors"
    content = file.read_bytes()

    def shorten(*_: object) -> None:
        os.truncate(file, len(content) // 2)

    def replace(*_: object) -> None:
        (tmp_path / side / "new").write_bytes(content[:-1] + b"?")
        (tmp_path / side / "new").replace(file)

    for change in (shorten, replace):
        with pytest.raises(StorageError, match=r"became shorter|changed while it was being read"):
            deltafmt.pack(base, finetuned, tmp_path / "d", method=Exact(), progress=change)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]
        file.write_bytes(content)


def test_unpack(tmp_path: Path) -> None:
    base, finetuned = write(tmp_path / "base", 1), write(tmp_path / "finetuned", 2)
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")
    with pytest.raises(StorageError, match="changed while it was being read"):
        deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out", progress=lambda *_: touch(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "d.deltafmt", "finetuned"]


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    base, finetuned = write(tmp_path / "base", 1), write(tmp_path / "finetuned", 2)
    with pytest.raises(StorageError, match="went away"):
        deltafmt.pack(
            base,
            finetuned,
            tmp_path / "d.deltafmt",
            progress=lambda *_: (finetuned / "model.safetensors").unlink(),
        )
