"""Launches that are recorded once and then repeated.

A launch by Triton takes some 60 us of the host: the arguments are built, bound and looked up anew. A decoding step has
hundreds of products whose launches differ in a few addresses only. The first launch of its kind is therefore recorded,
as the parameters that the driver gets; the next ones put their addresses into these and go to the driver, for 3 us.

A recording holds for calls of equal shapes, strides, dtypes and alignments, on which Triton's choice of the compiled
kernel depends. Where anything about a launch is not understood, it is left to Triton.
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
        source: ``x``, ``y``, ``order``, ``tiles`` or ``scratch``.
        key: which output, which tiles or which scratch tensor.
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
        scratch: the tensors that only these launches use, which every call makes anew.
        launches: what has been recorded; None once something could not be.
    """

    known: set[int]
    places: dict[int, tuple[str, Any]]
    segments: Segments
    scratch: list[torch.Tensor] = field(default_factory=list)
    launches: list[Launch] | None = field(default_factory=list)

    def note(self, compiled: Any, grid: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """Record a launch that Triton has just made."""
        if self.launches is None:
            return
        for key, tiles in self.segments.known_tiles():
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
                params.append(int(value) & _WORD)
            else:
                raise NotRepeatable
        params += [0] * (
            _parameter_count(compiled) - len(params)
        )  # Triton's own scratch memory, of which there is none
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


class Repeated:
    """The launches of one product, repeated on other tensors."""

    def __init__(self, launches: Sequence[Launch], scratch: Sequence[torch.Tensor]) -> None:
        self._launches = launches
        self._scratch = [(tensor.shape, tensor.dtype, tensor.device) for tensor in scratch]
        self._lock = threading.Lock()

    def run(self, outputs: Sequence[torch.Tensor], x: torch.Tensor, segments: Segments) -> None:
        """Launch everything on the current stream."""
        native = core.native
        assert native is not None
        scratch = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._scratch]
        # As Triton does: the stream's handle alone takes a tenth of the time of the stream as an object.
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)  # noqa: SLF001
        cut: dict[Any, TokenTiles] = {}  # alive until everything is launched
        with self._lock:  # the parameters are filled in and handed over by one thread at a time
            for launch in self._launches:
                params = launch.params
                for place in launch.places:
                    params[place.index] = _address(place, outputs, x, segments, scratch, cut)
                error = native.launch(
                    *(_launcher(), launch.function, *launch.grid, launch.threads, launch.shared, stream, params)
                )
                if error:
                    raise RuntimeError(f"the CUDA driver reports error {error} for a launch")


def _address(
    place: Place,
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    segments: Segments,
    scratch: list[torch.Tensor],
    cut: dict[Any, TokenTiles],
) -> int:
    source = place.source
    if source == "y":
        tensor = outputs[place.key]
    elif source == "x":
        tensor = x
    elif source == "scratch":
        tensor = scratch[place.key]
    else:
        tiles = cut[place.key] = cut.get(place.key) or segments.tiles(*place.key)
        tensor = tiles.order if source == "order" else tiles.table
    address: int = tensor.data_ptr()
    return address


_state = threading.local()


@contextlib.contextmanager
def recording(
    outputs: Sequence[torch.Tensor], x: torch.Tensor, records: Sequence[torch.Tensor], segments: Segments
) -> Iterator[Recorder]:
    """Record the launches that this thread makes through :func:`run` within the block."""
    places: dict[int, tuple[str, Any]] = {id(output): ("y", number) for number, output in enumerate(outputs)}
    places[id(x)] = ("x", None)
    recorder = _state.recorder = Recorder({id(tensor) for tensor in records}, places, segments)
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


def form(outputs: Sequence[torch.Tensor], x: torch.Tensor, segments: Segments) -> tuple[Any, ...] | None:
    """Return everything about a product's tensors that its compiled kernels and their grids depend on.

    The outputs' shapes are the parts' of the operand table, of which a form is the key. Tensors that are not aligned as
    torch aligns its own have no form: their launches are left to Triton.
    """
    unaligned = x.data_ptr() % ALIGNMENT
    strides = [x.stride(-2)]
    for output in outputs:
        unaligned |= output.data_ptr() % ALIGNMENT
        strides.append(output.stride(-2))
    return None if unaligned else (x.dtype, outputs[0].dtype, segments.form, *strides)
