"""What is uploaded is what the file holds, whatever its sections, and nothing is left behind when that fails."""

from __future__ import annotations

import gc
import io
import itertools
import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import delta_files
import deltafmt
from containers import edited
from delta_files import DeltaWriter, views_of
from deltafmt.container.reader import Container
from deltafmt.container.source import FileSource
from deltafmt.errors import CancelledError, InvalidFileError, StorageError, UsageError
from deltafmt.terms.nm.layout import NMLayout
from strategies import examples

torch = pytest.importorskip("torch")

import deltafmt.torch as dt
from deltafmt.runtime import reading, upload, upload_pieces

SEEDED = NMLayout(1, 32, 4)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MIB = 1 << 20


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b""


def check_equal(file: deltafmt.DeltaFile, name: str, tensor: dt.DeviceTensor) -> None:
    """Compare one tensor with the views that the reader gives."""
    entry = file.resolve(name)
    assert tensor.entry == entry
    buffers = file.buffers(name)
    assert len(tensor.terms) == len(entry.terms)
    for number, (operand, term) in enumerate(zip(tensor.terms, entry.terms, strict=True)):
        prefix = f"terms[{number}]." if len(entry.terms) > 1 else ""
        assert (operand.rows, operand.columns, operand.seed) == (entry.delta_rows, entry.columns, term.seed)
        for key in term.buffers:
            wanted = buffers.pop(prefix + key)
            if key == "index":
                wanted = views_of(term.layout, wanted, entry.delta_rows, entry.columns)
            found = operand.buffers[key]
            assert tuple(found.shape) == wanted.shape
            assert raw(found) == wanted.tobytes()
    if tensor.data is None:
        assert not buffers
    else:
        assert raw(tensor.data) == buffers.popitem()[1].tobytes()
        assert not buffers


def tensors_of(delta: dt.DeviceDelta) -> list[torch.Tensor]:
    held = [part for tensor in delta.values() for term in tensor.terms for part in term.buffers.values()]
    return held + [tensor.data for tensor in delta.values() if tensor.data is not None]


def big_file(rng: int = 0, sections: int = 5, section_bytes: int = 3 * MIB) -> bytes:
    """Return a hot file whose sections are larger than a buffer of the smallest ring."""
    made = DeltaWriter(np.random.default_rng(rng), section_bytes=section_bytes)
    for number in range(sections):
        made.replace(f"t.{number}", "U8", (section_bytes + 4096 * number + 17,))
    return made.finish()


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


@pytest.mark.parametrize("profile", ["hot", "cold"])
@pytest.mark.parametrize("pinned_mib", [1, 64])
@examples(25)
@given(rng=st.integers(0, 99), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_damage_anywhere_is_found(profile, pinned_mib, rng, at, bit) -> None:
    made = DeltaWriter(np.random.default_rng(rng), profile, section_bytes=300_000)
    for number in range(4):
        made.replace(f"t.{number}", "U8", (400_000 * (number + 1),))
    good = made.finish()
    with Container(io.BytesIO(good)) as container:
        sections, end = container.sections, container.index_offset
    bad = bytearray(good)
    place = 4096 + int(at * (end - 4096))
    bad[place] ^= 1 << bit
    number = max(i for i, section in enumerate(sections) if section.offset <= place)
    with pytest.raises(InvalidFileError, match=rf"section {number}( at \d+)? (is damaged|is not zero)"):
        dt.load(io.BytesIO(bad), "cpu", pinned_bytes=pinned_mib * MIB)
    if profile == "hot":
        dt.load(io.BytesIO(bad), "cpu", pinned_bytes=pinned_mib * MIB, verify=False)


def test_a_rank_out_of_range_names_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = NMLayout(2, 6, 4, "rank")  # C(6, 2) = 15, in 4 bits
    made = DeltaWriter(np.random.default_rng(0), "cold")
    made.add("a", (40, 60), [layout])
    monkeypatch.setattr(delta_files, "random_ranks", lambda *_: np.full((2, 2, 32), 2**32 - 1, np.uint32))
    made.add("b", (40, 60), [layout])
    with pytest.raises(InvalidFileError, match=r'tensors\["b"\]: the index has a rank that is not below 15'):
        dt.load(io.BytesIO(made.finish()), "cpu")


class ShrinkingFile(io.BytesIO):
    """A file that ends early once its sections are read."""

    def __init__(self, data: bytes, limit: int) -> None:
        super().__init__(data)
        self.limit = limit
        self.armed = False

    def read(self, size: int | None = -1, /) -> bytes:
        """Read."""
        room = max(self.limit - self.tell(), 0) if self.armed else size
        return super().read(min(size or 0, room or 0))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("is_path", [True, False])
def test_a_file_that_shrinks(is_path, threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = big_file()
    path = tmp_path / "d.deltafmt"
    path.write_bytes(data)
    file = ShrinkingFile(data, 8 * MIB + 100)
    original = upload.cut

    def cut_and_shrink(*arguments: object) -> object:
        os.truncate(path, 8 * MIB + 100)
        file.armed = True
        return original(*arguments)

    monkeypatch.setattr(upload, "cut", cut_and_shrink)
    with pytest.raises(InvalidFileError, match=r"the file ends \d+ bytes early, at \d+"):
        dt.load(path if is_path else file, "cpu", pinned_bytes=MIB, threads=threads)


def test_missing_files_and_odd_arguments(tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    with pytest.raises(StorageError, match=r"d\.deltafmt: no such file"):
        dt.load(path, "cpu")
    with pytest.raises(StorageError, match="folder"):
        dt.load(tmp_path, "cpu")
    path.write_bytes(b"")
    with pytest.raises(InvalidFileError, match="empty"):
        dt.load(path, "cpu")
    path.write_bytes(big_file(sections=1))
    for arguments, message in (
        ({"device": "nonsense"}, "nonsense"),
        ({"device": "meta"}, "'meta' is neither cuda nor cpu"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "cpu", "threads": 0}, "0 threads"),
        ({"device": "cpu", "pinned_bytes": 1000}, "pinned_bytes 1000"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            dt.load(path, **arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_cuda_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(big_file(sections=1))
    with pytest.raises(UsageError, match="'cuda' cannot be used: torch finds no CUDA device"):
        dt.load(path)


class SlowFile(io.BytesIO):
    """A file that calls back at its reads once it is told to."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.on_read = lambda: None

    def read(self, size: int | None = -1, /) -> bytes:
        """Read."""
        self.on_read()
        return super().read(size)


def upload_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("deltafmt-upload")}


@pytest.mark.parametrize("after", [0, 6, 9])
def test_cancel(after: int) -> None:
    dt.free_buffers()
    file, event, reads = SlowFile(big_file()), threading.Event(), itertools.count(1)

    def on_read() -> None:
        if next(reads) >= after:
            event.set()

    file.on_read = on_read
    with pytest.raises(CancelledError, match="cancelled") as caught:
        dt.load(file, "cpu", pinned_bytes=MIB, threads=3, cancel=event)
    assert caught.value.exit_code == 130
    seen = next(reads)
    # Threads stay for the next load, but none reads any more; the next load is not disturbed.
    assert len(upload_threads()) <= 3
    assert len(dt.load(io.BytesIO(file.getvalue()), "cpu", pinned_bytes=MIB, cancel=threading.Event())) == 5
    assert next(reads) == seen + 1
    dt.free_buffers()
    assert not upload_threads()


def test_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    file, moving = SlowFile(big_file()), []
    started = threading.Event()
    original = reading.Upload._move

    def move(self: reading.Upload, *arguments: object) -> None:
        moving.append(1)
        started.set()
        original(self, *arguments)
        moving.pop()

    def wait_for(self: threading.Condition, predicate: object, timeout: object = None) -> None:
        # Waiting gives the lock away, which a thread needs before it can start to move a piece.
        while not started.is_set():
            self.wait(0.01)
        monkeypatch.setattr(threading.Condition, "wait_for", condition_wait)
        raise KeyboardInterrupt

    condition_wait = threading.Condition.wait_for
    monkeypatch.setattr(reading.Upload, "_move", move)
    monkeypatch.setattr(threading.Condition, "wait_for", wait_for)
    with pytest.raises(KeyboardInterrupt):
        dt.load(file, "cpu", pinned_bytes=MIB, threads=3)
    assert not moving


def test_an_error_in_the_last_piece_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reading.Upload._stop

    def stop(self: reading.Upload, error: BaseException) -> None:
        time.sleep(0.05)  # time enough for whoever waits to believe that all is done
        original(self, error)

    monkeypatch.setattr(reading.Upload, "_stop", stop)
    data = bytearray(big_file(sections=1, section_bytes=1000))
    data[4096] ^= 1
    with pytest.raises(InvalidFileError, match="section 0 at 4096 is damaged"):
        dt.load(io.BytesIO(data), "cpu")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_failed_load_keeps_no_memory(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    original = reading.Upload.__init__

    def init(self: reading.Upload, *arguments: object, **options: object) -> None:
        held.append(weakref.ref(arguments[3]))
        original(self, *arguments, **options)
        file.on_read = fail

    def fail() -> None:
        raise error

    monkeypatch.setattr(reading.Upload, "__init__", init)
    file = SlowFile(big_file())
    gc.disable()
    try:
        with pytest.raises((StorageError, MemoryError)) as caught:
            dt.load(file, "cpu", pinned_bytes=MIB, threads=2)
        assert caught.value is not None
        dt.free_buffers()  # the threads are done, and have let go of their work
        assert held[0]() is None
    finally:
        gc.enable()


def test_buffers_and_threads_are_kept_and_freed() -> None:
    dt.free_buffers()
    data = big_file()
    for _ in range(4):
        dt.load(io.BytesIO(data), "cpu", threads=3)
    assert 1 <= len(upload_threads()) <= 3
    assert dt.free_buffers() == upload.PINNED_BYTES
    assert not upload_threads()
    assert dt.free_buffers() == 0


def test_loads_at_the_same_time(tmp_path: Path) -> None:
    paths, errors = [], []
    for number in range(4):
        paths.append(tmp_path / f"{number}.deltafmt")
        paths[-1].write_bytes(big_file(number, sections=3))

    def work(path: Path) -> None:
        try:
            with deltafmt.open(path) as file:
                for pinned_mib in (1, 2, 1):
                    loaded = dt.load(path, "cpu", threads=2, pinned_bytes=pinned_mib * MIB)
                    for name in file:
                        check_equal(file, name, loaded[name])
        except Exception as error:  # noqa: BLE001 - reported by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


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
        placement = upload._place(container, names)
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
        pieces = upload_pieces.cut(container.sections, upload._place(container, None), 2 * MIB)
    assert [len(piece.copies) for piece in pieces] == [1]
