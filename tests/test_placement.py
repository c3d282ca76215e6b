"""Files whose tensors were placed before they are loaded."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

import deltafmt
from delta_files import DeltaWriter, delta_files
from deltafmt.errors import UsageError
from deltafmt.terms.nm.layout import NMLayout
from strategies import examples

torch = pytest.importorskip("torch")

from deltafmt.runtime import placement
from deltafmt.runtime.delta_store import copy_delta
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.device_views import DeviceTensors
from deltafmt.runtime.placement import Placement
from deltafmt.runtime.upload import load_placed
from uploads import check_equal

CPU = torch.device("cpu")
SEEDED = NMLayout(1, 32, 4)


def write(path: Path, seed: int, rows: int = 40, layout: NMLayout = SEEDED) -> Path:
    made = DeltaWriter(np.random.default_rng(seed))
    made.add("a", (rows, 60), [layout])
    made.add("b", (33, 70), [layout], 3)
    made.replace("c", "BF16", (7, 9))
    made.alias("d", "a")
    made.same("e")
    path.write_bytes(made.finish())
    return path


def placed(path: Path, names: list[str] | None = None) -> Placement:
    with deltafmt.open(path) as file:
        return Placement.ahead(file.container, names or list(file))


def check_file(path: Path, loaded: DeviceDelta) -> None:
    """Compare all tensors, and the addresses that kernels get with those that torch gives."""
    with deltafmt.open(path) as file:
        for name in loaded:
            check_equal(file, name, loaded[name])
    for tensor in loaded.values():
        for operand in tensor.terms:
            held = {name: buffer for name, buffer in operand.buffers.items() if buffer.numel()}
            found = operand.addresses()
            assert {name: found[name] for name in held} == {name: held[name].data_ptr() for name in held}
            assert operand.nbytes == sum(buffer.nbytes for buffer in operand.buffers.values())


def test_files_of_one_layout_share_their_places(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{seed}.deltafmt", seed) for seed in range(2))
    places = [placed(path) for path in (first, second)]
    assert places[0].layout is places[1].layout
    for path, place in zip((first, second), places, strict=True):
        check_file(path, load_placed(str(path), CPU, place))


@pytest.mark.parametrize("other", ["rows", "layout", "names"])
def test_other_layouts_have_places_of_their_own(other: str, tmp_path: Path) -> None:
    first = placed(write(tmp_path / "a.deltafmt", 0))
    path = tmp_path / "b.deltafmt"
    if other == "rows":
        second = placed(write(path, 0, rows=41))
    elif other == "layout":
        # As many bytes, which mean something else.
        second = placed(write(path, 0, layout=NMLayout(1, 32, 4, "seeded", "midrise")))
    else:
        second = placed(write(path, 0), ["a", "c"])
    assert first.layout is not second.layout
    check_file(path, load_placed(str(path), CPU, second))


def test_a_layout_is_forgotten_with_its_last_file(tmp_path: Path) -> None:
    place = placed(write(tmp_path / "a.deltafmt", 0))
    kept = weakref.ref(place.layout)
    assert kept() in list(placement._LAYOUTS.values())
    del place
    gc.collect()
    assert kept() is None


@examples(25)
@given(delta_files())
def test_any_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "d.deltafmt"
    path.write_bytes(data)
    check_file(path, load_placed(str(path), CPU, placed(path)))


def test_a_file_that_was_replaced_is_placed_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.deltafmt", 0)
    place = placed(path)
    write(tmp_path / "new", 1, rows=90)
    os.replace(tmp_path / "new", path)
    check_file(path, load_placed(str(path), CPU, place))
    made = DeltaWriter(np.random.default_rng(2))
    made.add("other", (40, 60), [SEEDED])
    path.write_bytes(made.finish())
    with pytest.raises(UsageError, match="no tensor matches 'a'"):
        load_placed(str(path), CPU, place)


def test_a_copy_has_the_same_tensors_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "a.deltafmt", 0)
    loaded = load_placed(str(path), CPU, placed(path))
    made = loaded["a"].terms[0].buffers["codes"]
    copied = copy_delta(loaded, lambda size: torch.empty(size, dtype=torch.uint8))
    check_file(path, copied)
    assert copied["a"].terms[0].buffers["codes"].data_ptr() != made.data_ptr()
    assert copied.nbytes == loaded.nbytes


def test_tensors_are_made_once_by_many_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.deltafmt", 0)
    loaded = load_placed(str(path), CPU, placed(path))
    assert isinstance(loaded.tensors, DeviceTensors)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(id(loaded["b"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {id(loaded["b"])}
    with pytest.raises(KeyError):
        loaded["x"]


def test_what_is_first_asked_for_in_inference_mode_can_be_used_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "a.deltafmt", 0)
    loaded = load_placed(str(path), CPU, placed(path))
    with torch.inference_mode():
        found = [loaded["c"].data, loaded["a"].terms[0].buffers["codes"]]
    assert not any(tensor is None or tensor.is_inference() for tensor in found)
