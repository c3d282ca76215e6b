"""Launches that are recorded once and then repeated.

A launch by Triton takes some 60 us of the host: the arguments are built, bound and looked up anew. A decoding step has
hundreds of products whose launches differ in a few addresses only. The first launch of its kind is therefore recorded,
as the parameters that the driver gets. The next ones put their addresses into these and go to the driver
(``deltafmt._core``), which takes 3 us.

A recording holds for calls of equal shapes, strides, dtypes and alignments, on which Triton's choice of the compiled
kernel depends (:func:`form`). If anything about a launch is not understood, it is left to Triton. If the tokens stay
the same, too, the launches are bound (:class:`BoundLaunches`): nothing is looked up any more.

All launches of the package go through :func:`run`. It launches by Triton, tells the recorder of the thread, and only
notes the variant while :mod:`.variants` collects.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt import core
from deltafmt.kernels.segments import Segments, TokenTiles
from deltafmt.kernels.variants import is_collecting, note_variant

WARP = 32
ALIGNMENT = 16  # bytes: Triton compiles other code for pointers and numbers that are multiples of it

# A launch that takes longer than this has compiled its kernel.
COMPILING_SECONDS = 0.5

_INTEGERS = {"i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64"}
_WORD = (1 << 64) - 1


class NotRepeatable(Exception):  # noqa: N818 - no error: the launch is made by Triton every time
    """A launch that cannot be repeated."""


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter that differs from call to call.

    Attributes:
        index: the parameter's place.
        source: ``x``, ``y``, ``number``, ``order``, ``tiles`` or ``scratch``.
        key: which output, which number, which tiles or which scratch tensor.
    """

    index: int
    source: str
    key: Any = None


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, ready to be repeated.

    Attributes:
        function: the driver's handle of the compiled kernel.
        grid: programs in three dimensions.
        threads, shared: threads of a program, and bytes of its shared memory.
        params: uint64, the parameters; those of ``places`` are filled in for each call.
        places: the parameters that differ.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    params: NDArray[np.uint64]
    places: tuple[Place, ...]


@dataclass(slots=True)
class Recorder:
    """The launches of one product while Triton makes them.

    Attributes:
        known: the tensors that stay, by id.
        places: source and key of the tensors that differ from call to call, by id.
        numbers: the names of the numbers that differ from call to call; Triton compiles no other code for them.
        scratch: the tensors that only these launches use, which every call makes anew.
        launches: what has been recorded; None once something could not be.
    """

    known: set[int]
    places: dict[int, tuple[str, Any]]
    segments: Segments | None
    numbers: Sequence[str] = ()
    scratch: list[torch.Tensor] = field(default_factory=list)
    launches: list[Launch] | None = field(default_factory=list)

    def note(self, compiled: Any, grid: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """Record a launch that Triton has just made."""
        if self.launches is None:
            return
        for key, tiles in [] if self.segments is None else self.segments.known_tiles():
            self.places[id(tiles.order)] = ("order", key)
            self.places[id(tiles.table)] = ("tiles", key)
        try:
            self.launches.append(self._launch(compiled, grid, arguments))
        except NotRepeatable:
            self.launches = None

    def _launch(self, compiled: Any, grid: Sequence[int], arguments: Mapping[str, Any]) -> Launch:
        signature = _signature(compiled)
        params: list[int] = []
        places: list[Place] = []
        for name, kind in signature:
            value = arguments.get(name)
            if kind.startswith("*") and isinstance(value, torch.Tensor):
                place = self.places.get(id(value))
                if place is not None:
                    places.append(Place(len(params), *place))
                elif id(value) not in self.known:
                    raise NotRepeatable
                params.append(value.data_ptr())
            elif kind in _INTEGERS and isinstance(value, int):
                if name in self.numbers:
                    places.append(Place(len(params), "number", self.numbers.index(name)))
                params.append(int(value) & _WORD)
            else:
                raise NotRepeatable
        # Triton adds parameters for its own scratch memory, of which there is none.
        params += [0] * (_parameter_count(compiled) - len(params))
        whole = (*grid, 1, 1)[:3]
        metadata = compiled.metadata
        return Launch(
            compiled.function,
            (whole[0], whole[1], whole[2]),
            metadata.num_warps * WARP,
            metadata.shared,
            np.array(params, np.uint64),
            tuple(places),
        )


def _signature(compiled: Any) -> list[tuple[str, str]]:
    """Return names and types of a compiled kernel's parameters.

    Raises:
        NotRepeatable: the kernel is launched in a way that is not known here.
    """
    metadata = compiled.metadata
    plain = {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    if any(getattr(metadata, name, value) != value for name, value in plain.items()):
        raise NotRepeatable
    if any(size != 1 for size in getattr(metadata, "cluster_dims", ())):
        raise NotRepeatable
    found = [(name, kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    if not all(isinstance(name, str) and isinstance(kind, str) for name, kind in found):
        raise NotRepeatable
    # Triton adds the addresses of its own scratch memory.
    if not 0 <= _parameter_count(compiled) - len(found) <= 2:
        raise NotRepeatable
    return found


def _parameter_count(compiled: Any) -> int:
    """Return the parameters that the kernel's machine code takes."""
    text = compiled.asm["ptx"]
    start = text.index(".entry")
    return int(text[start : text.index(")", start)].count(".param"))


class RecordedLaunches:
    """The launches of one product, repeated on other tensors.

    A launch is an array of numbers, as ``launch`` in ``kernels/cpu/module.c`` takes it. Its parameters get addresses in
    this order: of ``x``, of each output, the numbers, of ``order`` and ``table`` of each cut of the tokens, of each
    scratch tensor.

    Args:
        launches: what was recorded.
        scratch: the tensors that only these launches use.
        outputs: the number of outputs.
        numbers: how many numbers differ from call to call.
    """

    def __init__(
        self, launches: Sequence[Launch], scratch: Sequence[torch.Tensor], outputs: int, numbers: int = 0
    ) -> None:
        places = [place for launch in launches for place in launch.places]
        self.scratch = [(tensor.shape, tensor.dtype, tensor.device) for tensor in scratch]
        self._outputs = outputs
        self._numbers = numbers
        self._cuts = list(dict.fromkeys(place.key for place in places if place.source in ("order", "tiles")))
        self.jobs = [self._job(launch) for launch in launches]

    def _job(self, launch: Launch) -> NDArray[np.uint64]:
        places = [number for place in launch.places for number in (place.index, self._number(place))]
        fields = [_launcher(), launch.function, *launch.grid, launch.threads, launch.shared, len(launch.places)]
        return np.array([*fields, *places, *launch.params.tolist()], np.uint64)

    def _number(self, place: Place) -> int:
        """Return which of the addresses a parameter gets."""
        if place.source == "x":
            return 0
        if place.source == "y":
            return 1 + int(place.key)
        first = 1 + self._outputs
        if place.source == "number":
            return first + int(place.key)
        first += self._numbers
        if place.source == "scratch":
            return first + 2 * len(self._cuts) + int(place.key)
        return first + 2 * self._cuts.index(place.key) + (place.source == "tiles")

    def cut(self, segments: Segments | None) -> tuple[list[TokenTiles], list[int]]:
        """Return the cuts of tokens that the launches read, and their addresses."""
        if segments is None:
            return [], []
        tiles = [segments.tiles(*key) for key in self._cuts]
        return tiles, [tensor.data_ptr() for one in tiles for tensor in (one.order, one.table)]

    def run(
        self, outputs: Sequence[torch.Tensor], x: torch.Tensor, segments: Segments | None, numbers: Sequence[int] = ()
    ) -> None:
        """Launch everything on the current stream."""
        tiles, addresses = self.cut(segments)
        self.launch(x.device.index, [x.data_ptr(), *[output.data_ptr() for output in outputs], *numbers, *addresses])
        del tiles  # alive until everything is launched

    def launch(self, device: int, addresses: list[int]) -> None:
        """Launch everything on the current stream of a device, given the addresses of all but scratch memory."""
        native = core.native
        assert native is not None
        held: tuple[torch.Tensor, ...] = ()
        if self.scratch:
            held = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self.scratch)
            addresses += [tensor.data_ptr() for tensor in held]
        # As Triton does: the stream's handle alone takes a tenth of the time of the stream as an object.
        stream = torch._C._cuda_getCurrentRawStream(device)  # noqa: SLF001
        for job in self.jobs:
            error = native.launch(job, stream, *addresses)
            if error:
                raise RuntimeError(f"the CUDA driver reports error {error} for a launch")
        del held


class BoundLaunches:
    """The launches of one product whose tokens stay the same, for tensors of one form.

    Args:
        launches: the launches.
        outputs: tensors of the outputs' form.
        x: a tensor of the input's form.
        segments: which token uses which delta, if the launches depend on it.
        table: what the launches read, which is kept with them.
        numbers: those that the launches take.
    """

    __slots__ = ("_addresses", "_device", "_form", "_kept", "_launch", "_outputs")

    def __init__(
        self,
        launches: RecordedLaunches,
        outputs: Sequence[torch.Tensor],
        x: torch.Tensor,
        segments: Segments | None,
        table: object,
        numbers: Sequence[int] = (),
    ) -> None:
        tiles, addresses = launches.cut(segments)
        self._addresses = [*numbers, *addresses]
        self._kept = tiles, segments, table
        self._launch = launches.launch
        self._device = x.device.index
        self._form = x.shape, x.dtype, x.stride()
        self._outputs = [(output.shape, output.dtype, output.stride()) for output in outputs]

    def takes(self, x: torch.Tensor) -> bool:
        """Tell whether an input has the form."""
        shape, dtype, stride = self._form
        return x.shape == shape and x.dtype is dtype and x.stride() == stride

    def run(self, outputs: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
        """Add the products, on the current stream; return False if a tensor has another form: nothing is done then.

        Args:
            outputs: of the products.
            x: an input of the form.
        """
        address = unaligned = x.data_ptr()
        addresses = [address]
        for output, (shape, dtype, stride) in zip(outputs, self._outputs, strict=True):
            if output.shape != shape or output.dtype is not dtype or output.stride() != stride:
                return False
            address = output.data_ptr()
            unaligned |= address
            addresses.append(address)
        if unaligned % ALIGNMENT or torch._C._cuda_getDevice() != self._device:  # noqa: SLF001 - as above
            return False
        self._launch(self._device, addresses + self._addresses)
        return True


_state = threading.local()


@contextlib.contextmanager
def recording(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    records: Sequence[torch.Tensor],
    segments: Segments | None,
    numbers: Sequence[str] = (),
) -> Iterator[Recorder]:
    """Record the launches that this thread makes through :func:`run` within the block.

    Args:
        outputs, x, segments: of the product; they differ from call to call.
        records: the tensors that stay.
        numbers: the names of the kernels' numbers that differ from call to call, of which Triton knows nothing.
    """
    places: dict[int, tuple[str, Any]] = {id(output): ("y", number) for number, output in enumerate(outputs)}
    places[id(x)] = ("x", None)
    recorder = _state.recorder = Recorder({id(tensor) for tensor in records}, places, segments, numbers)
    try:
        yield recorder
    finally:
        _state.recorder = None


def run(kernel: Any, grid: Sequence[int], /, **arguments: Any) -> None:
    """Launch a Triton kernel, on a device or in the interpreter; while variants are collected, only note it."""
    if note_variant(kernel, arguments):
        return
    start = time.perf_counter()
    compiled = kernel[tuple(grid)](**arguments)
    if compiled is not None and time.perf_counter() - start > COMPILING_SECONDS:
        _say_compiled(compiled, time.perf_counter() - start)
    recorder: Recorder | None = getattr(_state, "recorder", None)
    if recorder is not None:
        recorder.note(compiled, grid, arguments)


@functools.cache
def _say_once() -> None:
    logging.getLogger("deltafmt").warning(
        "a kernel was compiled at its first launch, which waited for that; attach(..., warmup=True) and the command "
        "deltafmt warmup do it before"
    )


def _say_compiled(compiled: Any, seconds: float) -> None:
    """Log what was compiled, and once what would have spared the wait."""
    _say_once()
    name = getattr(getattr(compiled, "src", None), "name", "a kernel")
    logging.getLogger("deltafmt").info("%s took %.1f s to compile", name, seconds)


def scratch(*shape: int, device: torch.device) -> torch.Tensor:
    """Return float32 memory that only the launches of one product use."""
    made = torch.empty(*shape, dtype=torch.float32, device=device)
    recorder: Recorder | None = getattr(_state, "recorder", None)
    if recorder is not None and not is_collecting():
        recorder.places[id(made)] = ("scratch", len(recorder.scratch))
        recorder.scratch.append(made)
    return made


@functools.cache
def _launcher() -> int:
    """Return the address of the driver's function that launches, 0 where there is none."""
    return 0 if core.native is None else int(core.native.launcher())


def can_repeat(device: torch.device) -> bool:
    """Return True if launches on a device can be repeated."""
    return device.type == "cuda" and torch.version.cuda is not None and _launcher() != 0


def form(outputs: Sequence[torch.Tensor], x: torch.Tensor, segments: Segments | None) -> tuple[Any, ...] | None:
    """Return everything about a product's tensors that its compiled kernels and their grids depend on.

    The outputs' shapes are the parts' of the operand table, of which a form is the key. Tensors that are not aligned as
    torch aligns its own have no form: their launches are left to Triton.
    """
    unaligned = x.data_ptr() % ALIGNMENT
    strides = [x.stride(-2)]
    for output in outputs:
        unaligned |= output.data_ptr() % ALIGNMENT
        strides.append(output.stride(-2))
    tokens = None if segments is None else segments.form
    return None if unaligned else (x.dtype, outputs[0].dtype, tokens, *strides)
