"""Threads of numpy's linear algebra beside a pool of workers."""

from __future__ import annotations

import threading

import pytest

from deltafmt import linear_algebra
from deltafmt.linear_algebra import one_thread
from deltafmt.pipeline.workers import worker_pool


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the numbers that a library was set to, which has four threads at first."""
    found = [4]
    monkeypatch.setattr(linear_algebra, "_library", lambda: (lambda: found[-1], found.append))
    return found


def test_the_last_of_several_puts_back_what_the_first_found(put: list[int]) -> None:
    first, second = one_thread(), one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert put == [4, 1]
    second.__exit__(None, None, None)
    assert put == [4, 1, 4]


def _fail() -> None:
    assert linear_algebra.threads() == 1
    raise ZeroDivisionError


def test_an_error_puts_it_back_too(put: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), worker_pool(2, "test") as pool:
        pool.submit(_fail).result()
    assert put == [4, 1, 4]


def test_overlapping_threads_leave_what_was_there(put: list[int]) -> None:
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with one_thread():
                assert linear_algebra.threads() == 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert put[-1] == 4


def test_the_library_of_numpy_itself() -> None:
    before = linear_algebra.threads()
    if before is None:
        pytest.skip("numpy brings no OpenBLAS")
    with one_thread():
        assert linear_algebra.threads() == 1
    assert linear_algebra.threads() == before


def test_a_numpy_without_the_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_algebra, "_library", lambda: None)
    with one_thread():
        assert linear_algebra.threads() is None
