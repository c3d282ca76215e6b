"""The extension of compiled loops refuses what does not fit, and the choice between it and numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from core_cases import CASES, Case
from deltafmt import core
from deltafmt.terms.nm import hashing
from implementations import COMPILED, needs_core, running

pytestmark = needs_core

REFUSALS = (TypeError, ValueError, BufferError)
EVERY = pytest.mark.parametrize("case", CASES, ids=[f"{case.name}{number}" for number, case in enumerate(CASES)])


def call(case: Case, arguments: list[Any]) -> Any:
    return getattr(core.native, case.name)(*arguments)


def refuse(case: Case, arguments: list[Any], *, by_others: bool = False) -> None:
    """Check that every level refuses a call, writes nothing and holds nothing; the function says so by its name."""
    arrays = [value for value in arguments if isinstance(value, np.ndarray)]
    before = [array.tobytes() for array in arrays]
    held = [sys.getrefcount(array) for array in arrays]
    for level in COMPILED:
        with running(level), pytest.raises(REFUSALS) as caught:
            call(case, arguments)
        # Python and numpy refuse some arguments themselves: what is no array, no number, not contiguous, read-only.
        assert by_others or str(caught.value).startswith(f"{case.name}: ")
        del caught
    assert [sys.getrefcount(array) for array in arrays] == held
    if case.name not in ("sparse_needed", "sparse_place"):  # which find what is wrong as they go
        assert [array.tobytes() for array in arrays] == before


def places(case: Case, kind: type | tuple[type, ...]) -> list[int]:
    return [place for place, value in enumerate(case.arguments) if isinstance(value, kind)]


def test_every_function_has_a_case() -> None:
    others = {"launch", "launcher", "driver", "context", "level", "use", "keep_memory"}  # which are no loops
    names = {name for name in dir(core.native) if not name.startswith("_")}
    assert {case.name for case in CASES} == names - others


@EVERY
def test_what_fits_is_taken(case: Case) -> None:
    for level in COMPILED:
        arguments = case.copies()
        arrays = [arguments[place] for place in places(case, np.ndarray)]
        held = [sys.getrefcount(array) for array in arrays]
        with running(level):
            call(case, arguments)
        assert [sys.getrefcount(array) for array in arrays] == held
        for place in places(case, np.ndarray):
            if place not in case.outputs:
                arguments[place].flags.writeable = False
        with running(level):
            call(case, arguments)


@EVERY
def test_another_number_of_arguments_is_refused(case: Case) -> None:
    arguments = case.copies()
    for count in range(len(arguments)):
        refuse(case, arguments[:count])
    refuse(case, [*arguments, 0])
    refuse(case, [*arguments, np.zeros(3)])


@EVERY
def test_arrays_of_another_dtype_are_refused(case: Case) -> None:
    for place in places(case, np.ndarray):
        for dtype in (np.float64, np.complex64, np.int8, np.dtype("V4"), np.dtype(">u4"), np.dtype([("a", "u1")])):
            arguments = case.copies()
            arguments[place] = np.zeros(arguments[place].shape, dtype)
            refuse(case, arguments, by_others=True)


@EVERY
def test_what_is_no_array_is_refused(case: Case) -> None:
    for place in places(case, np.ndarray):
        for value in (None, 3, "text", [0, 1], object()):
            arguments = case.copies()
            arguments[place] = value
            refuse(case, arguments, by_others=True)


@EVERY
def test_arrays_of_another_shape_are_refused(case: Case) -> None:
    for place in places(case, np.ndarray):
        array = case.arguments[place]
        others = [array[None], array.reshape(-1) if array.ndim > 1 else array.reshape(1, -1)]
        others.append(np.zeros((), array.dtype))
        for axis in range(array.ndim):
            if (place, axis) not in case.free:
                others.append(np.concatenate([array, np.take(array, [-1], axis=axis)], axis=axis))
                if (place, axis) not in case.fewer:
                    others.append(np.take(array, range(array.shape[axis] - 1), axis=axis))
        for other in others:
            arguments = case.copies()
            arguments[place] = np.array(other)
            refuse(case, arguments)


@EVERY
def test_arrays_that_lie_otherwise_are_refused(case: Case) -> None:
    for place in places(case, np.ndarray):
        array = case.arguments[place]
        others = [np.repeat(array, 2, axis=-1)[..., ::2]]
        if array.shape[-1] > 1:
            others.append(array[..., ::-1])
        if array.ndim > 1 and min(array.shape[:2]) > 1:
            others.append(np.asfortranarray(array))
        if array.itemsize > 1:
            memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
            others.append(memory.view(array.dtype).reshape(array.shape))
            assert not others[-1].flags.aligned
        for other in others:
            if array.size > 1 or not other.flags.aligned:
                arguments = case.copies()
                arguments[place] = other
                refuse(case, arguments, by_others=True)


@EVERY
def test_an_output_that_is_read_only_is_refused(case: Case) -> None:
    for place in case.outputs:
        arguments = case.copies()
        arguments[place].flags.writeable = False
        refuse(case, arguments, by_others=True)


@EVERY
def test_what_is_no_number_and_no_dtype_is_refused(case: Case) -> None:
    for place in places(case, (int, float)):
        values: list[Any] = [None, "3", object()]
        if isinstance(case.arguments[place], int):
            values += [1.5, -1, 2**64, -(2**70)]
        for value in values:
            arguments = case.copies()
            arguments[place] = value
            refuse(case, arguments, by_others=True)
    for place in places(case, str):
        for value in (None, 16, "", "F64", "bf16", "BF16\0", b"BF16"):
            arguments = case.copies()
            arguments[place] = value
            refuse(case, arguments, by_others=True)


@EVERY
def test_what_is_out_of_range_is_refused(case: Case) -> None:
    for place, value in case.wrong:
        arguments = case.copies()
        arguments[place] = value
        refuse(case, arguments)


# Calls every function in a thread with as much stack as musl gives.
SMALL_STACK = """
import threading
from core_cases import CASES
from deltafmt import core
from implementations import COMPILED, running
def run():
    for level in COMPILED:
        with running(level):
            for case in CASES:
                getattr(core.native, case.name)(*case.copies())
threading.stack_size(128 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
print("done")
"""


def test_a_thread_of_a_small_stack_is_enough() -> None:
    folders = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": folders}
    command = [sys.executable, "-c", SMALL_STACK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_levels() -> None:
    native = core.native
    assert native is not None
    assert native.level() in COMPILED
    before = native.level()
    for level in COMPILED:
        with running(level):
            assert native.level() == level
            assert core.describe() == f"compiled ({level})"
            assert native.use("x86-64-v9") is False
            assert native.use("") is False
            assert native.level() == level
        assert native.level() == before
    for wrong in (None, 3, b"baseline"):
        with pytest.raises(TypeError):
            native.use(wrong)
    with pytest.raises(TypeError):
        native.use()
    # The best that there is was in use from the start.
    command = [sys.executable, "-c", "from deltafmt import core; print(core.native.level())"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == COMPILED[-1]


def test_the_reference_runs_where_it_is_asked_for() -> None:
    ran: list[str] = []

    @core.loop(lambda _, value: ran.append(f"compiled {value}"))
    def double(value: int) -> None:
        """Say which ran."""
        ran.append(f"reference {value}")

    double(1)
    double.reference(2)
    with core.reference_only():
        assert core.describe() == "numpy"
        double(3)
    with pytest.raises(KeyError), core.reference_only():
        raise KeyError
    double(value=4)
    assert ran == ["compiled 1", "reference 2", "reference 3", "compiled 4"]
    assert double.__doc__ == "Say which ran."


def test_the_core_can_be_turned_off() -> None:
    code = (
        "import sys; from deltafmt import core; from deltafmt.terms.nm.hashing import seeded;"
        "print(core.describe(), 'deltafmt._core' in sys.modules, seeded(1, 0, 2, 3, 2, 8).tolist())"
    )
    found = []
    for value in ("0", "1"):
        environment = {**os.environ, "DELTAFMT_CORE": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        found.append(done.stdout.split("[")[0].strip())
        assert done.stdout.endswith(f"{hashing.seeded.reference(1, 0, 2, 3, 2, 8).tolist()}\n")
    assert found == ["numpy False", f"compiled ({COMPILED[-1]}) True"]
