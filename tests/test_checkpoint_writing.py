"""Checkpoint folders that are written: they load elsewhere, their shards have their size, awkward names are refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors

import deltafmt
from conftest import (
    SMALL_FILES,
    Pair,
    Raw,
    normal,
    nudge,
    plain,
    read_file,
    read_folder,
    write_folder,
)
from deltafmt.checkpoint.folder_writer import CheckpointWriter
from deltafmt.errors import UsageError


def _aligned(path: Path) -> None:
    """Assert that every tensor of a file starts on a multiple of its element, and that they cover the file."""
    tensors, header = read_file(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    position = 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        elements = max(int(np.prod(info["shape"], dtype=np.int64)), 1)
        assert begin == position
        assert begin % max(len(tensors[name].data) // elements, 1) == 0
        position = end
    assert 8 + length + position == os.path.getsize(path)


def test_a_written_folder_loads_with_the_safetensors_library(tmp_path: Path, small: Pair) -> None:
    mixed = {**small.b, "odd": Raw("U8", (3,), b"abc"), "wide": plain(np.arange(3.0)), "scalar": normal(1, (), "F32")}
    finetuned = write_folder(tmp_path / "ft", mixed, files=SMALL_FILES)
    deltafmt.pack(small.base, finetuned, tmp_path / "d.deltafmt")
    result = deltafmt.unpack(small.base, tmp_path / "d.deltafmt", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    _aligned(path)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(mixed)
        assert np.array_equal(file.get_tensor("position_ids"), np.arange(48))
        assert file.get_tensor("wide").tolist() == [0.0, 1.0, 2.0]
        assert file.get_slice("model.embed.weight").get_shape() == [70, 48]
    assert sorted(result.files) == sorted(SMALL_FILES)
    assert (result.tensors, result.nbytes) == (len(mixed), sum(len(t.data) for t in mixed.values()))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in SMALL_FILES} == SMALL_FILES
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", *SMALL_FILES}


@pytest.mark.parametrize("limit", [1, 7000, 20_000, 10**9])
def test_shards_of_the_output(tmp_path: Path, small: Pair, limit: int) -> None:
    deltafmt.pack(small.base, small.finetuned, tmp_path / "d.deltafmt")
    deltafmt.unpack(small.base, tmp_path / "d.deltafmt", tmp_path / "whole")
    whole = read_folder(tmp_path / "whole")
    deltafmt.unpack(small.base, tmp_path / "d.deltafmt", tmp_path / "out", max_shard_bytes=limit)
    assert read_folder(tmp_path / "out") == whole
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index_path = tmp_path / "out" / "model.safetensors.index.json"
    for shard in shards:
        _aligned(shard)
        held = read_file(shard)[0]
        assert len(held) == 1 or sum(len(tensor.data) for tensor in held.values()) <= limit
    if limit == 10**9:
        assert [shard.name for shard in shards] == ["model.safetensors"]
        assert not index_path.exists()
        return
    index = json.loads(index_path.read_text())
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in whole.values())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in read_file(shard)[0]}
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) == (len(whole) if limit == 1 else len(shards)) > 1
    # What was written in shards is a checkpoint again, and the delta against it is no change at all.
    assert deltafmt.pack(tmp_path / "whole", tmp_path / "out", tmp_path / "again.deltafmt").actions == {
        "same": len(whole)
    }


@pytest.mark.parametrize("name", ["n" * 1025, "", "\ud800"], ids=["too long", "empty", "lone surrogate"])
def test_a_name_that_no_delta_file_may_hold_is_refused_when_packing(tmp_path: Path, name: str) -> None:
    """Whatever pack writes, inspect must be able to open."""
    anchor = normal(1, (64, 64))
    base = write_folder(tmp_path / "a", {"anchor": anchor, name: normal(2, (4, 4))})
    finetuned = write_folder(tmp_path / "b", {"anchor": nudge(anchor, 3), name: normal(4, (4, 4))})
    with pytest.raises(deltafmt.errors.DeltafmtError):
        deltafmt.pack(base, finetuned, tmp_path / "out.deltafmt")
    assert not (tmp_path / "out.deltafmt").exists()


@pytest.mark.parametrize("name", ["notes: draft.md", "why?.md", "trailing.", "tab\there.txt"])
def test_a_small_file_with_an_awkward_name_gives_no_unreadable_delta(tmp_path: Path, small: Pair, name: str) -> None:
    """It may travel, be left out and named, or be refused; a file that cannot be opened again helps nobody."""
    finetuned = write_folder(tmp_path / "ft", small.b, files={name: b"text"})
    out = tmp_path / "d.deltafmt"
    try:
        result = deltafmt.pack(small.base, finetuned, out)
    except deltafmt.errors.DeltafmtError:
        assert not out.exists()
        return
    with deltafmt.open(out) as delta:
        assert (name in delta.container.attachments) != (name in result.left_out)


@pytest.mark.parametrize("name", ["restored.safetensors", "math.deltafmt", "pytorch_model.bin"])
def test_a_folder_that_is_named_like_a_file_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=f"its name is that of a file; name a folder such as .*/{name.split('.')[0]}$"):
        CheckpointWriter(tmp_path / name, [])
    assert not list(tmp_path.iterdir())
