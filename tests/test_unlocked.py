"""The compiled upload moves what the plan says, and stops at what is wrong; the driver is played by the C library."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import delta_files
from delta_files import DeltaWriter
from deltafmt import core
from deltafmt.container.reader import Container
from deltafmt.errors import CancelledError, InvalidFileError
from deltafmt.format.constants import CODEC_STORED
from strategies import examples

torch = pytest.importorskip("torch")

from deltafmt.runtime import pinned, unlocked, upload
from deltafmt.runtime.upload_pieces import cut

if core.native is None:
    pytest.skip("deltafmt._core is not built, or turned off with DELTAFMT_CORE=0", allow_module_level=True)

MIB = 1 << 20
CONTEXT, STREAM, REFUSED = 77, 88, 0x1_0000_02BC  # the error is 700; what lies above 32 bits is none


def address_of(function: Any) -> int:
    """Return where a function of the C library, or one that ctypes has made, begins."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


class Driver:
    """What the loop calls: copies are made at once, and everything is noted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.recorded: list[int] = []
        self.refuse_after = 10**9
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
        self.functions = [kind(function) for function in (self.bind, self.copy, self.record, self.wait)]

    def calls(self) -> unlocked.Calls:
        """Return the addresses."""
        pread = address_of(ctypes.CDLL(None).pread)
        return unlocked.Calls(pread, *map(address_of, self.functions))

    def bind(self, context: int, *_: int) -> int:
        """Play cuCtxSetCurrent."""
        return 0 if context == CONTEXT else 201

    def copy(self, target: int, source: int, length: int, stream: int) -> int:
        """Play cuMemcpyHtoDAsync."""
        with self.lock:
            self.refuse_after -= 1
        if self.refuse_after < 0 or stream != STREAM:
            return REFUSED
        ctypes.memmove(target, source, length)
        return 1 << 32

    def record(self, event: int, stream: int, *_: int) -> int:
        """Play cuEventRecord."""
        self.recorded.append(event)
        return 0 if stream == STREAM else 400

    def wait(self, *_: int) -> int:
        """Play cuEventSynchronize."""
        return 0


class Stream:
    """A stream that is known by its handle alone."""

    cuda_stream = STREAM

    def query(self) -> bool:
        """Do nothing."""
        return True


@pytest.fixture(autouse=True)
def the_real_driver_is_back() -> Iterator[None]:
    """Check that a test leaves the real functions: with a fake one, an upload to a GPU ends in the driver's error 201.

    This fixture is set up before all that a test asks for, and so ends after them.
    """
    before = (unlocked.driver_calls, unlocked.current_context, pinned.PinnedBuffer.recorded)
    yield
    assert (unlocked.driver_calls, unlocked.current_context, pinned.PinnedBuffer.recorded) == before


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    # The test's own monkeypatch: a second one would be undone before it, and the test would then put back the fake.
    return play(monkeypatch)


def play(patch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    patch.setattr(unlocked, "driver_calls", driver.calls)
    patch.setattr(unlocked, "current_context", lambda: CONTEXT)
    patch.setattr(pinned.PinnedBuffer, "recorded", lambda self, _: self.view.nbytes)
    return driver


def moved(
    path: Path, threads: int, pinned_bytes: int = MIB, *, verify: bool = True, cancel: threading.Event | None = None
) -> tuple[Any, Any, Container]:
    """Upload a whole file; return the memory, where things lie in it, and the file."""
    with Container(path, mmap=False) as container:
        placement = upload._place(container, None).layout.upload
        memory, scratch = (
            torch.full((nbytes,), 99, dtype=torch.uint8) for nbytes in (placement.nbytes, placement.scratch_bytes)
        )
        ring = pinned.Ring(torch.device("cpu"), pinned_bytes, MIB)
        pieces = cut(container.sections, placement, ring.buffer_bytes)
        made = unlocked.UnlockedUpload(container, pieces, ring, memory, scratch, Stream(), verify=verify, cancel=cancel)
        made.run(threads)
    return memory, placement, container


def hot_file(sections: int = 7) -> bytes:
    made = DeltaWriter(np.random.default_rng(0), section_bytes=100_000)
    for number in range(sections):
        made.replace(f"t.{number}", "U8", (100_000 * (number + 1) + 17,))
    return made.finish()


@examples(60)
@given(data=delta_files.delta_files(), threads=st.integers(1, 6), pinned_mib=st.integers(1, 4))
def test_everything_arrives(data, threads, pinned_mib, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "unlocked.deltafmt"
    path.write_bytes(data)
    with Container(path, mmap=False) as container:
        hot = all(section.codec == CODEC_STORED for section in container.sections)
        whole = not any(layout.cold_only for layout in container.layouts)
        later = dict.fromkeys(range(len(container.sections)))
        assert unlocked.takes(container, range(len(container.sections)), {}, verify=False) == hot
        assert unlocked.takes(container, range(len(container.sections)), later, verify=True)
    if not hot or not whole:
        return
    with pytest.MonkeyPatch.context() as patch:
        driver = play(patch)
        memory, placement, container = moved(path, threads, pinned_mib * MIB)
    raw = memory.numpy()
    for number in placement.sections:
        section = container.sections[number]
        start = placement.whole(number, section)
        stored = data[section.offset : section.offset + section.length]
        assert raw[start : start + section.length].tobytes() == stored
    assert bool(driver.recorded) == bool(placement.sections)


def test_the_file_must_be_an_open_one(tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(hot_file())
    for source, mmap, wanted in ((path, False, True), (path, True, False)):
        with Container(source, mmap=mmap) as container:
            assert unlocked.takes(container, [0], [0], verify=True) is wanted
            assert not unlocked.takes(container, [0, 1], [0], verify=True) or not wanted
    with path.open("rb") as file, Container(file) as container:
        assert not unlocked.takes(container, [0], [0], verify=True)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("threads", [1, 3])
def test_padding_that_is_not_zero(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    data = bytearray(hot_file())
    path.write_bytes(data)
    with Container(path, mmap=False) as container:
        last = container.sections[5]
    data[last.offset + last.length + 5] = 1
    path.write_bytes(data)
    with pytest.raises(InvalidFileError, match="the padding after section 5 is not zero"):
        moved(path, threads)
    moved(path, threads, verify=False)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_shrinks(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(hot_file())
    original = unlocked.tables

    def shrink(*arguments: Any, **options: Any) -> Any:
        os.truncate(path, 1_000_000)
        return original(*arguments, **options)

    monkeypatch.setattr(unlocked, "tables", shrink)
    with pytest.raises(InvalidFileError, match=r"the file ends \d+ bytes early, at \d+"):
        moved(path, threads)


def test_a_read_that_fails_once_is_made_good(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(hot_file())
    pread, left = ctypes.CDLL(None).pread, [3]
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)

    def read(file: int, target: int, length: int, offset: int) -> int:
        left[0] -= 1
        if left[0] == 0:
            return -1
        return int(pread(file, ctypes.c_void_p(target), ctypes.c_size_t(length), ctypes.c_int64(offset)))

    flaky = kind(read)
    with pytest.MonkeyPatch.context() as patch:
        calls = driver.calls()._replace(read=address_of(flaky))
        patch.setattr(unlocked, "driver_calls", lambda: calls)
        memory, placement, container = moved(path, 2)
    assert left[0] < 0
    data = path.read_bytes()
    for number in placement.sections:
        section = container.sections[number]
        start = placement.whole(number, section)
        assert memory.numpy()[start : start + section.length].tobytes() == data[section.offset :][: section.length]


def test_an_error_of_the_driver(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(hot_file())
    driver.refuse_after = 4
    with pytest.raises(RuntimeError, match="the CUDA driver reports error 700"):
        moved(path, 2)


def test_cancel(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.deltafmt"
    path.write_bytes(hot_file())
    event, waiting = threading.Event(), threading.Event()

    def record(handle: int, *_: int) -> int:
        # The first piece ends only when the upload has been told to stop.
        event.set()
        waiting.wait(5)
        driver.recorded.append(handle)
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
    slow = kind(record)
    calls = driver.calls()._replace(record=address_of(slow))
    monkeypatch.setattr(unlocked, "driver_calls", lambda: calls)
    original = unlocked.wait

    def wait(futures: Any, timeout: float | None = None) -> Any:
        if timeout is None:
            waiting.set()
        return original(futures, timeout)

    monkeypatch.setattr(unlocked, "wait", wait)
    with pytest.raises(CancelledError, match="cancelled"):
        moved(path, 2, cancel=event)
    # Nobody went on after the pieces that were under way.
    assert 1 <= len(driver.recorded) <= 2
