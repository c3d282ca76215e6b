"""What is uploaded is what the file holds, whatever its sections; ``test_upload_failures.py`` has what goes wrong."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import delta_files
import deltafmt
from containers import edited
from delta_files import DeltaWriter
from deltafmt.container.reader import Container
from deltafmt.container.source import FileSource
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.terms.nm.layout import NMLayout
from strategies import examples

torch = pytest.importorskip("torch")

import deltafmt.torch as dt
from deltafmt.runtime import upload, upload_pieces
from uploads import MIB, big_file, check_equal, raw

SEEDED = NMLayout(1, 32, 4)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tensors_of(delta: dt.DeviceDelta) -> list[torch.Tensor]:
    held = [part for tensor in delta.values() for term in tensor.terms for part in term.buffers.values()]
    return held + [tensor.data for tensor in delta.values() if tensor.data is not None]


@pytest.mark.parametrize("device", DEVICES)
@examples(60)
@given(
    data=delta_files.delta_files(),
    pinned_mib=st.sampled_from((1, 3, 64)),
    threads=st.integers(1, 5),
    verify=st.booleans(),
)
def test_device_holds_what_the_file_holds(device, data, pinned_mib, threads, verify, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / f"any-{device}.deltafmt"
    path.write_bytes(data)
    loaded = dt.load(path, device, threads=threads, pinned_bytes=pinned_mib * MIB, verify=verify)
    with deltafmt.open(path) as file:
        assert list(loaded) == file.keys()
        assert (loaded.content_id, loaded.metadata) == (file.content_id, file.metadata)
        for name in file:
            check_equal(file, name, loaded[name])
            if file[name].action == "same":
                assert (loaded[name].terms, loaded[name].data) == ((), None)
    parts = tensors_of(loaded)
    assert len({part.untyped_storage().data_ptr() for part in parts if part.numel()}) <= 1
    for part in parts:
        assert part.storage_offset() * part.element_size() % 256 == 0
        assert part.device.type == device
        assert part.is_contiguous()


@examples(60)
@given(data=delta_files.delta_files(), drawn=st.data())
def test_selection(data, drawn, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "selected.deltafmt"
    path.write_bytes(data)
    with deltafmt.open(path) as file:
        names = drawn.draw(st.lists(st.sampled_from(file.keys()), unique=True)) if len(file) else []
        loaded = dt.load(path, "cpu", tensors=names, pinned_bytes=MIB)
        assert list(loaded) == sorted(names)
        for name in names:
            check_equal(file, name, loaded[name])
        targets = {file.resolve(name).name: file.resolve(name) for name in names}.values()
        wanted = 0
        for entry in targets:
            for term in entry.terms:
                lengths = term.layout.plain().buffer_lengths(entry.delta_rows, entry.columns, term.slots).values()
                wanted += sum(-(-length // 256) * 256 for length in lengths)
            wanted += -(-entry.data.length // 256) * 256 if entry.data else 0
        # No byte of another tensor takes memory.
        assert loaded.nbytes == wanted


def test_names_and_patterns(tmp_path: Path) -> None:
    made = DeltaWriter(np.random.default_rng(0))
    for name in ("a.0", "a.1", "a.[0]", "b.0"):
        made.replace(name, "F32", (3,))
    path = tmp_path / "d.deltafmt"
    path.write_bytes(made.finish())

    def names(tensors: object) -> list[str]:
        return list(dt.load(path, "cpu", tensors=tensors))

    assert names(None) == ["a.0", "a.1", "a.[0]", "b.0"]
    assert names("a.1") == ["a.1"]
    assert names("a.*") == ["a.0", "a.1", "a.[0]"]
    # A name is a name before it is a pattern.
    assert names("a.[0]") == ["a.[0]"]
    assert names(["b.*", "a.0"]) == ["a.0", "b.0"]
    assert names(()) == []
    for wrong in ("c.*", ["a.0", "x"]):
        with pytest.raises(UsageError, match="no tensor matches"):
            names(wrong)


def test_only_needed_sections_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(big_file())
    read: list[tuple[int, int]] = []
    original = FileSource.read_into

    def spy(self: FileSource, offset: int, target: memoryview) -> None:
        read.append((offset, len(target)))
        original(self, offset, target)

    with Container(path) as container:
        section = container.sections[container.entry("t.2").data.section]
        index_offset = container.index_offset
    monkeypatch.setattr(FileSource, "read_into", spy)
    loaded = dt.load(path, "cpu", tensors="t.2", pinned_bytes=MIB)
    body = sorted((at, at + size) for at, size in read if 4096 <= at < index_offset)
    # Once, without gaps, with the padding behind.
    assert body[0][0] == section.offset
    assert all(left[1] == right[0] for left, right in itertools.pairwise(body))
    assert body[-1][1] == -(-(section.offset + section.length) // 4096) * 4096
    assert loaded.nbytes == -(-section.length // 256) * 256


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_are_reused_only_when_they_are_free(device: str, tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    for number in range(5):
        # Four buffers, fifteen times each; every load has other bytes.
        path.write_bytes(big_file(number))
        loaded = dt.load(path, device, threads=4, pinned_bytes=MIB)
        # Used on the current stream before anything waits for the device.
        sums = [tensor.data.long().sum() for tensor in loaded.values()]
        with deltafmt.open(path) as file:
            assert [int(total) for total in sums] == [
                int(file.buffers(name)["data"].sum(dtype=np.int64)) for name in file
            ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streams_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(big_file())
    stream = torch.cuda.Stream()
    with deltafmt.open(path) as file:
        for given, current in ((stream, torch.cuda.default_stream()), (None, stream), (stream, stream)):
            with torch.cuda.stream(current):
                torch.cuda._sleep(20_000_000)
                loaded = dt.load(path, stream=given, pinned_bytes=MIB)
                # Neither the order of the work on the current stream nor that of the threads' is left to chance.
                copies = {name: tensor.data.clone() for name, tensor in loaded.items()}
                del loaded
                again = dt.load(path, stream=given, pinned_bytes=MIB)
                for name in file:
                    assert raw(copies[name]) == file.buffers(name)["data"].tobytes()
                    check_equal(file, name, again[name])


def test_file_objects(tmp_path: Path) -> None:
    data = big_file()
    path = tmp_path / "d.deltafmt"
    path.write_bytes(data)
    with deltafmt.open(path) as file:
        for source in (io.BytesIO(data), str(path), path):
            loaded = dt.load(source, "cpu", threads=3, pinned_bytes=MIB)
            for name in file:
                check_equal(file, name, loaded[name])


def test_inference_mode_and_default_devices() -> None:
    data = big_file(sections=1)
    with torch.inference_mode(), torch.device("meta"):
        loaded = dt.load(io.BytesIO(data), "cpu")
        assert loaded["t.0"].data.device.type == "cpu"
    assert not loaded["t.0"].data.is_inference()


def test_known_entries_are_used_only_for_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.deltafmt"
    made = DeltaWriter(np.random.default_rng(0))
    made.add("a", (40, 60), [SEEDED])
    path.write_bytes(made.finish())
    with deltafmt.open(path) as known:
        entry = known["a"]
    loaded = dt.load(path, "cpu", known=known)
    assert loaded["a"].entry is entry
    other = DeltaWriter(np.random.default_rng(1))
    other.add("a", (70, 60), [SEEDED])
    path.write_bytes(other.finish())
    loaded = dt.load(path, "cpu", known=known)
    assert loaded["a"].entry.shape == (70, 60)
    with deltafmt.open(path) as file:
        check_equal(file, "a", loaded["a"])


def test_entries_are_checked_when_asked_for() -> None:
    made = DeltaWriter(np.random.default_rng(0))
    made.add("a", (40, 60), [SEEDED])
    made.add("b", (40, 60), [SEEDED])
    data = edited(made.finish(), lambda index: index["tensors"]["b"]["terms"][0].update(layout=7))
    loaded = dt.load(io.BytesIO(data), "cpu")
    assert loaded["a"].terms
    assert "b" in loaded
    with pytest.raises(InvalidFileError, match=r'tensors\["b"\]'):
        loaded["b"]
    with pytest.raises(KeyError):
        loaded["c"]


@examples(200)
@given(data=delta_files.delta_files(), size_chunks=st.integers(1, 3), drawn=st.data())
def test_pieces_cover_the_sections_once(data, size_chunks, drawn) -> None:
    size = size_chunks * 256 * 1024
    with Container(io.BytesIO(data)) as container:
        names = (
            drawn.draw(st.none() | st.lists(st.sampled_from(container.keys()), unique=True))
            if len(container.keys())
            else None
        )
        placement = upload._place(container, names).layout.upload
        pieces = upload_pieces.cut(container.sections, placement, size)
        read: dict[int, int] = {}
        written = np.zeros(placement.nbytes, np.uint8)
        for piece in pieces:
            assert piece.length <= size
            for share in piece.shares:
                read[share.section] = read.get(share.section, 0) + share.length
            for copy in piece.copies:
                assert 0 <= copy.source <= copy.source + copy.length <= piece.length
                if not copy.scratch:
                    written[copy.target : copy.target + copy.length] += 1
        assert read == {number: container.sections[number].raw_length for number in placement.sections}
        assert written.max(initial=0) <= 1


def test_small_sections_share_a_copy() -> None:
    made = DeltaWriter(np.random.default_rng(0), section_bytes=1)
    for number in range(40):
        made.replace(f"t.{number:02}", "U8", (9000 + 100 * number,))
    with Container(io.BytesIO(made.finish())) as container:
        assert len(container.sections) == 40
        pieces = upload_pieces.cut(container.sections, upload._place(container, None).layout.upload, 2 * MIB)
    assert [len(piece.copies) for piece in pieces] == [1]
