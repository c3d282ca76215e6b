"""Launches that are recorded and repeated: what is recorded of them, and what the driver gets; the driver is played."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from deltafmt import core
from deltafmt.kernels import recorded_launches
from deltafmt.kernels.recorded_launches import BoundLaunches, NotRepeatable, RecordedLaunches, Recorder, recording
from deltafmt.kernels.segments import Segments
from implementations import needs_core

PTX = ".visible .entry kernel(\n" + ",\n".join(f"\t.param .u64 p{i}" for i in range(9)) + "\n)\n{ .param }"
SIGNATURE = {
    "x_ptr": "*bf16",
    "y0_ptr": "*bf16",
    "order_ptr": "*i32",
    "tiles_ptr": "*i32",
    "records_ptr": "*i64",
    "columns": "i32",
    "N": "constexpr",
    "z_ptr": "*fp32",
}


def compiled_kernel(**changed: Any) -> Any:
    """Return what Triton gives for a launch, as far as a recorder looks at it."""
    known = {"num_warps": 4, "shared": 1024, "num_ctas": 1, "launch_pdl": False, "global_scratch_size": 0} | changed
    return SimpleNamespace(
        function=0x1234,
        metadata=SimpleNamespace(**known),
        src=SimpleNamespace(signature=dict(SIGNATURE)),
        asm={"ptx": PTX},
    )


class Product:
    """The tensors of one product."""

    def __init__(self, tokens: int = 6) -> None:
        self.x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
        self.outputs = [torch.zeros(tokens, 32, dtype=torch.bfloat16)]
        self.records = torch.zeros(4, 1, 4, dtype=torch.int64)
        self.segments = Segments.of([0, 1, 0, 2, 1, 3][:tokens], 4, "cpu")

    def arguments(self, z: Any) -> dict[str, Any]:
        """Return the arguments of a launch by name."""
        tiles = self.segments.tiles(2)
        tensors = {"x_ptr": self.x, "y0_ptr": self.outputs[0], "order_ptr": tiles.order, "tiles_ptr": tiles.table}
        return {**tensors, "records_ptr": self.records, "columns": 64, "N": 1, "z_ptr": z}


def recorded(product: Product, kernel: Any, **changed: Any) -> Recorder:
    """Record one launch of a kernel that allocates scratch memory."""
    with recording(product.outputs, product.x, [product.records], product.segments) as recorder:
        z = recorded_launches.scratch(3, 5, device=torch.device("cpu"))
        recorded_launches.run({(7, 2): lambda **_: kernel}, (7, 2), **(product.arguments(z) | changed))
    return recorder


def test_what_is_recorded() -> None:
    product = Product()
    recorder = recorded(product, compiled_kernel())
    assert recorder.launches is not None
    (launch,) = recorder.launches
    assert (launch.function, launch.grid, launch.threads, launch.shared) == (0x1234, (7, 2, 1), 128, 1024)
    assert [(place.index, place.source) for place in launch.places] == [
        (0, "x"), (1, "y"), (2, "order"), (3, "tiles"), (6, "scratch")
    ]  # fmt: skip
    # Seven parameters of the kernel, and two of Triton's own.
    assert launch.params.tolist()[4:6] == [product.records.data_ptr(), 64]
    assert launch.params.tolist()[7:] == [0, 0]


@pytest.mark.parametrize(
    "changed",
    [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 64}, {"cluster_dims": (2, 1, 1)}],
    ids=lambda changed: next(iter(changed)),
)
def test_launches_of_another_kind_are_left_to_triton(changed: dict[str, Any]) -> None:
    assert recorded(Product(), compiled_kernel(**changed)).launches is None


@pytest.mark.parametrize("changed", [{"columns": 2.0}, {"records_ptr": torch.zeros(3)}, {"z_ptr": torch.zeros(3)}])
def test_arguments_that_are_not_known_are_left_to_triton(changed: dict[str, Any]) -> None:
    assert recorded(Product(), compiled_kernel(), **changed).launches is None


def test_more_parameters_than_are_known_are_left_to_triton() -> None:
    kernel = compiled_kernel()
    kernel.asm["ptx"] = PTX.replace("p8", "p8,\n\t.param .u64 p9")
    with pytest.raises(NotRepeatable):
        recorded_launches._signature(kernel)


class Driver:
    """Plays the driver's function that launches: it notes what it gets.

    Attributes:
        seen: the kernel, the sizes and the stream, and the parameters of each launch.
        error: what it gives back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
        self.seen: list[tuple[int, tuple[int, ...], list[int]]] = []
        self.error = 0
        self._function = kind(self._launch)
        monkeypatch.setattr(recorded_launches, "_launcher", lambda: ctypes.cast(self._function, ctypes.c_void_p).value)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0x77, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)  # the index of the CPU

    def _launch(self, function: int, *rest: Any) -> int:
        pointers = ctypes.cast(rest[8], ctypes.POINTER(ctypes.c_void_p))
        values = [ctypes.cast(pointers[i], ctypes.POINTER(ctypes.c_uint64))[0] for i in range(9)]
        self.seen.append((function, rest[:8], values))
        return self.error


def addresses(product: Product) -> list[int]:
    """Return what the first four parameters of a launch are."""
    tiles = product.segments.tiles(2)
    return [tensor.data_ptr() for tensor in (product.x, product.outputs[0], tiles.order, tiles.table)]


@needs_core
def test_what_the_driver_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    first = recorded(Product(), compiled_kernel())
    assert first.launches is not None
    again = RecordedLaunches(first.launches, first.scratch, 1)
    for _ in range(2):
        product = Product()
        again.run(product.outputs, product.x, product.segments)
        function, sizes, values = driver.seen[-1]
        assert function == 0x1234
        assert sizes == (7, 2, 1, 128, 1, 1, 1024, 0x77)
        assert values[:4] == addresses(product)
        assert values[4:6] == [first.launches[0].params[4], 64]
        assert values[6] not in (0, first.scratch[0].data_ptr())
    driver.error = 719
    with pytest.raises(RuntimeError, match="the CUDA driver reports error 719 for a launch"):
        again.run(product.outputs, product.x, product.segments)


@needs_core
def test_bound_launches_take_tensors_of_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    product, other = Product(), Product()
    first = recorded(product, compiled_kernel())
    assert first.launches is not None
    made = RecordedLaunches(first.launches, first.scratch, 1)
    bound = BoundLaunches(made, product.outputs, product.x, product.segments, product.records)
    for x in (product.x, other.x):
        for outputs in (product.outputs, other.outputs):
            assert bound.takes(x)
            assert bound.run(outputs, x)
            wanted = [x.data_ptr(), outputs[0].data_ptr(), *addresses(product)[2:]]  # the first tokens
            assert driver.seen[-1][2][:4] == wanted
    count = len(driver.seen)
    for x in (other.x.half(), other.x[:5], torch.zeros(6, 128, dtype=torch.bfloat16)[:, :64], other.x[None]):
        assert not bound.takes(x)
    wide = torch.zeros(6, 64, dtype=torch.bfloat16)
    unaligned = torch.zeros(6 * 32 + 1, dtype=torch.bfloat16)[1:].view(6, 32)
    for output in (other.outputs[0].float(), other.outputs[0][:5], wide, wide[:, :32], unaligned):
        assert not bound.run([output], other.x)
    both = BoundLaunches(
        RecordedLaunches(first.launches, first.scratch, 2),
        [product.outputs[0], wide],
        product.x,
        product.segments,
        None,
    )
    assert both.run([other.outputs[0], wide], other.x)  # of two outputs, the launches take the first
    assert driver.seen.pop()[2][:4] == [other.x.data_ptr(), other.outputs[0].data_ptr(), *addresses(product)[2:]]
    with pytest.raises(ValueError, match="zip"):
        bound.run([*other.outputs, *other.outputs], other.x)
    assert len(driver.seen) == count
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    assert not bound.run(other.outputs, other.x)


@needs_core
def test_numbers_that_differ_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    product = Product()
    with recording(product.outputs, product.x, [product.records], product.segments, ["columns"]) as recorder:
        z = recorded_launches.scratch(3, 5, device=torch.device("cpu"))
        recorded_launches.run({(7, 2): lambda **_: compiled_kernel()}, (7, 2), **product.arguments(z))
    assert recorder.launches is not None
    again = RecordedLaunches(recorder.launches, recorder.scratch, 1, 1)
    for number in (3, 0, 1 << 20):
        again.run(product.outputs, product.x, product.segments, [number])
        made = BoundLaunches(again, product.outputs, product.x, product.segments, None, [number + 1])
        assert made.run(product.outputs, product.x)
        for wanted, (_, _, values) in zip((number, number + 1), driver.seen[-2:], strict=True):
            assert values[:4] == addresses(product)
            assert values[4:6] == [product.records.data_ptr(), wanted]
            assert values[6] != 0


@needs_core
def test_a_job_is_checked_before_it_is_launched() -> None:
    assert core.native is not None
    fields = [1, 1, 1, 1, 1, 32, 0, 1]
    good = np.array([*fields, 0, 0, 5], np.uint64)  # its one parameter gets the first address
    wrong: list[tuple[Any, ...]] = [
        (good[:8], 0, 7),
        (good[:10], 0, 7),
        (good, 0),
        (good, 0, *[7] * 65),
        (good.astype(np.int64), 0, 7),
        (good[:, None], 0, 7),
        (good, -1, 7),
    ]
    for place, value in ((0, 0), (1, 0), (2, 0), (5, 0), (6, 1 << 40), (7, 2), (7, 1 << 63), (8, 1), (9, 1)):
        bad = good.copy()
        bad[place] = value
        wrong.append((bad, 0, 7))
    wrong.append((np.array([*fields[:7], 0, *[1] * 129], np.uint64), 0))
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError), match=r"^launch: "):
            core.native.launch(*arguments)


@needs_core
def test_a_form_is_all_that_a_kernel_depends_on() -> None:
    product = Product()
    form = recorded_launches.form(product.outputs, product.x, product.segments)
    assert form is not None
    assert form == recorded_launches.form(Product().outputs, Product().x, Product().segments)
    others = [
        (product.outputs, product.x.half(), product.segments),
        ([product.outputs[0].half()], product.x, product.segments),
        ([torch.zeros(6, 64, dtype=torch.bfloat16)[:, :32]], product.x, product.segments),
        (product.outputs, product.x, Segments.of([0, 0, 0, 0, 0, 1], 4, "cpu")),
    ]
    assert all(recorded_launches.form(*other) != form for other in others)
    unaligned = torch.zeros(6 * 64 + 1, dtype=torch.bfloat16)[1:].view(6, 64)
    assert recorded_launches.form(product.outputs, unaligned, product.segments) is None


@needs_core
def test_without_a_driver_nothing_is_repeated() -> None:
    assert core.native is not None
    assert not recorded_launches.can_repeat(torch.device("cpu"))
