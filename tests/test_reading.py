"""A delta file that is read: attachments, views that copy nothing, and the same arrays however it is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import SMALL_FILES, Pair, write_folder
from deltafmt.methods import DeltaDQ
from pairs import pack_pair


def test_attachments_travel(tmp_path: Path, small: Pair) -> None:
    large = bytes(range(256)) * 3000  # three chunks of a zstd section
    finetuned = write_folder(tmp_path / "ft", small.b, files={**SMALL_FILES, "vocab.bin2": large, ".hidden": b"x"})
    (finetuned / "optimizer.pt").write_bytes(b"weights of another kind")
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(small.base, finetuned, delta)
    wanted = {**SMALL_FILES, "vocab.bin2": large}
    with deltafmt.open(delta) as opened:
        assert {name: opened.attachment(name) for name in opened.container.attachments} == wanted
        with pytest.raises(KeyError):
            opened.attachment(".hidden")
    result = deltafmt.unpack(small.base, delta, tmp_path / "out")
    assert sorted(result.files) == sorted(wanted)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in wanted} == wanted


def test_views_are_the_files_own_bytes(tmp_path: Path, small: Pair) -> None:
    delta = pack_pair(small, tmp_path / "d.deltafmt", method=DeltaDQ(4, 16, 4, "fixed"))
    content = delta.read_bytes()
    with deltafmt.open(delta) as opened:
        for name in opened:
            first, again = opened.buffers(name), opened.buffers(name)
            refs = dict(opened[name].refs())
            assert set(first) == set(refs)
            for key, array in first.items():
                assert array.size
                assert np.shares_memory(array, again[key])
                assert not array.flags.writeable
                assert not array.flags.owndata
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0
                section = opened.container.sections[refs[key].section]
                start = section.offset + refs[key].offset
                assert start % 256 == 0
                assert array.tobytes() == content[start : start + refs[key].length]


@pytest.mark.parametrize("use_map", [True, False])
def test_views_outlive_their_file(tmp_path: Path, small: Pair, use_map: bool) -> None:
    delta = pack_pair(small, tmp_path / "d.deltafmt")
    opened = deltafmt.open(delta, mmap=use_map)
    codes = opened.buffers("model.embed.weight")["codes"]
    before = codes.copy()
    opened.close()
    opened.close()
    delta.unlink()
    assert np.array_equal(codes, before)
    assert not codes.flags.writeable


def test_reads_and_maps_agree_and_cold_files_are_read_too(tmp_path: Path, small: Pair) -> None:
    delta = pack_pair(small, tmp_path / "d.deltafmt")
    deltafmt.repack(delta, tmp_path / "cold.deltafmt", profile="cold")
    with (
        deltafmt.open(delta) as mapped,
        deltafmt.open(delta, mmap=False) as read,
        deltafmt.open(tmp_path / "cold.deltafmt") as cold,
    ):
        assert len(mapped) == len(list(mapped)) == len(small.b)
        for name in mapped:
            arrays = [opened.buffers(name) for opened in (mapped, read, cold)]
            for key, array in arrays[0].items():
                assert all(np.array_equal(array, other[key]) for other in arrays[1:])
                assert not any(other[key].flags.writeable for other in arrays)
