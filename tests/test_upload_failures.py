"""Uploads that fail, are stopped, or run side by side: what is reported, and the memory and threads that are left."""

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
from delta_files import DeltaWriter
from deltafmt.container.reader import Container
from deltafmt.errors import CancelledError, InvalidFileError, StorageError, UsageError
from deltafmt.terms.nm.layout import NMLayout
from strategies import examples

torch = pytest.importorskip("torch")

import deltafmt.torch as dt
from deltafmt.runtime import placement, reading, upload
from uploads import MIB, SlowFile, big_file, check_equal, upload_threads


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
    original = placement.cut

    def cut_and_shrink(*arguments: object) -> object:
        os.truncate(path, 8 * MIB + 100)
        file.armed = True
        return original(*arguments)

    monkeypatch.setattr(placement, "cut", cut_and_shrink)
    with pytest.raises(InvalidFileError, match=r"the file ends \d+ bytes early, at \d+"):
        dt.load(path if is_path else file, "cpu", pinned_bytes=MIB, threads=threads)


def test_missing_files_and_odd_arguments(tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    with pytest.raises(StorageError, match=r"d\.deltafmt: no such file"):
        dt.load(path, "cpu")
    with pytest.raises(InvalidFileError, match="it is a folder, not a delta file"):
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
    assert 1 <= len(upload_threads()) < 4 * 3  # kept; one that ends just now may not be taken for idle
    assert 0 < dt.free_buffers() <= upload.PINNED_BYTES
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
