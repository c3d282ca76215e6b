"""Live tensors of a model by name: which share memory, what their bytes are, and how their elements are changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.exact.units import Unit, unit_of
from deltafmt.format.checks import check_shape, is_name
from deltafmt.format.constants import DTYPE_BITS
from deltafmt.runtime.dtypes import TORCH_DTYPES

# Integers of each width, as which torch copies elements whatever they mean.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor of a state dict, without its gradient.

    Attributes:
        name: its name.
        dtype: its dtype, by the name that safetensors has for it.
        shape: its sizes.
        tensor: the tensor itself.
        given: what the state holds under all these names: parameters, which may come to stand for other memory, or
            tensors.
        tied: the names that stand for the same memory, and come behind this one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    given: list[torch.Tensor]
    tied: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def unit(self) -> Unit:
        """What the tensor is cut into (spec section 17.2)."""
        return unit_of(self.dtype)

    @property
    def is_direct(self) -> bool:
        """True if the tensor's bytes lie in C order in host memory, and its units at multiples of their width."""
        tensor = self.tensor
        return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.data_ptr() % self.unit.width == 0

    def flat(self) -> torch.Tensor:
        """Return the tensor's bytes, uint8, 1-d, on its device: a view if they lie in C order, otherwise a copy."""
        whole = self.tensor.contiguous().reshape(-1)
        return whole.view(torch.uint8) if whole.numel() else torch.empty(0, dtype=torch.uint8, device=whole.device)

    def units(self) -> NDArray[np.unsignedinteger]:
        """Return the tensor's units in host memory: a view if the tensor is direct, otherwise a copy."""
        data: NDArray[np.uint8] = self.flat().cpu().numpy()
        units = data.view(self.unit.dtype)
        return units if units.flags.aligned else units.copy()


def live_tensors(state: Mapping[str, torch.Tensor], what: str = "the state") -> dict[str, LiveTensor]:
    """Return the tensors of a state dict by name, in the order of their names, each memory once.

    Args:
        state: tensors by name: a state dict, or named parameters.
        what: the name of the state in messages.

    Raises:
        UsageError: a value is no plain tensor, or two tensors share a part of their memory only.
    """
    found: dict[str, LiveTensor] = {}
    places: dict[tuple[object, ...], LiveTensor] = {}
    if not isinstance(state, Mapping):
        raise UsageError(f"{what} is a {type(state).__name__}; give tensors by name, such as those of state_dict()")
    for name in sorted(state, key=str):
        live = _checked(name, state[name], what)
        first = places.setdefault(_place(live.tensor), live) if live.nbytes else live
        if first is live:
            found[name] = live
        else:
            first.tied.append(name)
            first.given.extend(live.given)
    if not found:
        raise UsageError(f"{what} has no tensors")
    _refuse_overlaps(found.values(), what)
    return found


def _checked(name: object, value: object, what: str) -> LiveTensor:
    where = f"{what}: tensor {name!r}"
    if not isinstance(name, str) or not _can_be_written(name):
        raise UsageError(f"{where} has a name that no file can hold")
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{where} is no tensor but {type(value).__name__}; leave it out of the state")
    tensor = value.detach()
    if tensor.is_nested:
        raise UsageError(f"{where} is nested; give its parts")
    if type(tensor) is not torch.Tensor:
        raise UsageError(f"{where} is a {type(tensor).__name__}; give plain tensors, such as those of full_tensor()")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        raise UsageError(f"{where} has no bytes of its own: it is sparse, on no device, or a view of other values")
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None or DTYPE_BITS[dtype] % 8:
        raise UsageError(f"{where} has the dtype {tensor.dtype}, which no file can hold")
    try:
        shape = check_shape(list(tensor.shape), where)
    except InvalidFileError as error:
        raise UsageError(str(error)) from error
    return LiveTensor(name, dtype, shape, tensor, [value])


def _can_be_written(name: str) -> bool:
    """Tell whether a file can hold a tensor of a name."""
    try:
        name.encode()
    except UnicodeEncodeError:  # half a pair of surrogates
        return False
    return is_name(name) and name.rpartition("/")[2] != "__metadata__"


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def check_in_place(tensors: Iterable[LiveTensor]) -> None:
    """Refuse tensors that stand for other memory than when they were given, as after ``module.to(...)``.

    A parameter shows that. A tensor of ``state_dict()`` does not: it keeps the memory that the parameter has left.

    Raises:
        UsageError: names the first one.
    """
    for live in tensors:
        if live.nbytes and any(_place(given) != _place(live.tensor) for given in live.given):
            raise UsageError(
                f'tensor "{live.name}" of the model has other memory than when the subscriber was made, as after '
                "a move or a cast of the model; make a new subscriber"
            )


def _refuse_overlaps(tensors: Iterable[LiveTensor], what: str) -> None:
    """Refuse tensors whose memory is not apart and not the same: writing one could change the other."""
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for live in tensors:
        if not live.nbytes:
            continue
        tensor, strides = live.tensor, live.tensor.stride()
        elements = 1 + sum((size - 1) * stride for size, stride in zip(live.shape, strides, strict=True))
        if elements < tensor.numel():
            raise UsageError(f'{what}: elements of tensor "{live.name}" share memory; give a copy of it')
        start = tensor.data_ptr()
        spans.setdefault(tensor.device, []).append((start, start + elements * tensor.element_size(), live.name))
    for device in spans.values():
        end, before = 0, ""
        for start, stop, name in sorted(device):
            if start < end:
                raise UsageError(f'{what}: tensors "{before}" and "{name}" share a part of their memory; give copies')
            end, before = stop, name
