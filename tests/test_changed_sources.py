"""A weight file that changes while it is read spoils nothing: the command fails and leaves no output."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Raw, write_folder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.checkpoint.resemblance import distance
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import StorageError
from deltafmt.methods import Exact, Method


def write(path: Path, seed: int) -> Path:
    writer = CheckpointWriter(path, [TensorSpec("w", "F32", (64, 64))])
    values = np.random.default_rng(seed).standard_normal((64, 64), np.float32)
    writer.write("w", 0, memoryview(values).cast("B"))
    writer.commit()
    return path


def touch(path: Path) -> None:
    file = path / "model.safetensors" if path.is_dir() else path
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


@pytest.mark.parametrize("command", ["unpack", "apply", "convert", "squash", "repack"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_delta_file_that_changes(
    command: str, replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is written to is refused. One that is replaced as a whole is read to its end as it was."""
    base, finetuned, third = (write(tmp_path / name, seed) for seed, name in enumerate(("base", "finetuned", "third")))
    delta, last, out = tmp_path / "d.deltafmt", tmp_path / "e.deltafmt", tmp_path / "out"
    deltafmt.pack(base, finetuned, delta, method=Exact())
    deltafmt.pack(finetuned, third, last, method=Exact(), parent=delta)

    def change(*_: object) -> None:
        if replaced:
            (tmp_path / "new").write_bytes(b"another")
            (tmp_path / "new").replace(delta)
        else:
            touch(delta)

    def run() -> None:
        if command == "convert":
            deltafmt.convert(delta, out, base, "version-folder", version="1", base_version="0", progress=change)
        elif command == "squash":
            deltafmt.squash([delta, last], out, base=base, progress=change)
        elif command == "repack":
            finish = ContainerWriter.finish
            monkeypatch.setattr(ContainerWriter, "finish", lambda *args, **kw: (change(), finish(*args, **kw))[1])
            deltafmt.repack(delta, out, profile="cold")
        elif command == "apply":
            deltafmt.apply(base, [delta, last], out, progress=change)
        else:
            deltafmt.unpack(base, delta, out, progress=change)

    if replaced:
        run()
    else:
        with pytest.raises(StorageError, match=r"d\.deltafmt changed while it was being read"):
            run()
        assert not out.exists()


def test_an_open_file_and_a_file_object_that_change(tmp_path: Path) -> None:
    base, finetuned = write(tmp_path / "base", 1), write(tmp_path / "finetuned", 2)
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")
    with deltafmt.open(tmp_path / "d.deltafmt", mmap=False) as opened, open(tmp_path / "d.deltafmt", "rb") as file:
        opened.container.check_unchanged()
        touch(tmp_path / "d.deltafmt")
        with pytest.raises(StorageError, match="changed while it was being read"):
            opened.container.check_unchanged()
        with deltafmt.open(file) as streamed:
            streamed.container.check_unchanged()  # which nobody can tell


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_signalling_nans_are_compared_in_silence(dtype: str, tmp_path: Path) -> None:
    nans = {"F16": "<u2", "BF16": "<u2", "F32": "<u4"}[dtype], {"F16": 0x7C01, "BF16": 0x7F81, "F32": 0x7F800001}[dtype]
    tensor = Raw(dtype, (4, 4), np.full(16, nans[1], nans[0]).tobytes())
    folder = write_folder(tmp_path / "a", {"w": tensor})
    with Checkpoint(folder) as one, Checkpoint(folder) as other:
        assert distance(one.tensors["w"], other.tensors["w"]) is None
