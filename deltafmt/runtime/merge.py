"""A delta that is added to the base's weights in place, and taken out again without a bit of difference.

Floating-point sums cannot be undone, so the original values of the changed elements are kept in host memory. For packed
terms these are only the elements that the delta keeps. The delta itself tells which elements those are, so no index is
stored with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deltafmt.delta import row_ranges
from deltafmt.errors import UsageError
from deltafmt.runtime.binding import Binding
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.float8 import is_float8
from deltafmt.runtime.leases import Lease
from deltafmt.runtime.values import added, dense_delta, new_values, version_of

_CHUNK_ELEMENTS = 1 << 26  # elements of the delta that are decoded at a time, in float32
_STEP_ROWS = 256  # chunks start at multiples of this: at whole tiles, whatever the layout
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Merge:
    """One delta in the weights of a model.

    Args:
        name: the delta's name.
        lease: the lease that keeps the delta on the device; :meth:`undo` releases it.
        binding: the parameters that the delta's tensors change.

    Raises:
        UsageError: a tensor cannot be merged.
    """

    def __init__(self, name: str, lease: Lease[DeviceDelta], binding: Binding) -> None:
        self.name = name
        self._lease = lease
        self._changes: list[_Change] = []
        self._versions: list[int] = []
        if any(bound.local is not None for bound in binding.modules):
            raise UsageError(
                f'delta "{name}" cannot be merged into a model that is cut over processes; serve it, or unpack it'
            )
        owners: dict[int, tuple[str, bytes | str | None]] = {}
        (delta,) = lease.values.values()
        for tensor_name, tensor in delta.items():
            if tensor.entry.action == "same":
                continue
            parameter = binding.parameters.get(tensor_name)
            check_mergeable(tensor_name, tensor, parameter)
            assert parameter is not None
            # Copies of a vector are stored whole, each for itself; copies of a matrix are aliases of one entry.
            entry = tensor.entry
            mine = entry.digest if entry.action == "replace" else entry.name
            owner, payload = owners.setdefault(id(parameter), (tensor_name, mine))
            if payload != mine:
                raise UsageError(
                    f'tensors "{owner}" and "{tensor_name}" differ, but the model has one parameter for both'
                )
            if owner == tensor_name:
                self._changes.append(_Change(tensor_name, tensor, parameter))

    @property
    def saved_bytes(self) -> int:
        """Bytes of original values in host memory."""
        return sum(change.original.nbytes for change in self._changes if change.original is not None)

    @torch.no_grad()
    def apply(self) -> None:
        """Change the weights; on an error they are restored."""
        try:
            for change in self._changes:
                change.save()
                change.write()
        except BaseException:
            self._restore()
            raise
        self._versions = [version_of(change.parameter) for change in self._changes]

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights.

        Raises:
            UsageError: a parameter was changed since the merge; nothing is restored.
        """
        for change, version in zip(self._changes, self._versions, strict=True):
            if version_of(change.parameter) != version or not change.is_written():
                raise UsageError(
                    f'cannot unmerge "{self.name}": the parameter of tensor "{change.name}" was changed since the merge'
                )
        self._restore()
        self._lease.release()

    @torch.no_grad()
    def _restore(self) -> None:
        for change in self._changes:
            change.restore()


def check_mergeable(name: str, tensor: DeviceTensor, parameter: torch.Tensor | None) -> None:
    """Refuse a tensor whose parameter is missing, has another shape, or is not floating point.

    Raises:
        UsageError: the tensor cannot be merged; the message names it and says why.
    """
    if parameter is None:
        raise UsageError(f'tensor "{name}" cannot be merged: its module holds the weight in another form')
    if tuple(parameter.shape) != tensor.entry.shape:
        shapes = f"{list(tensor.entry.shape)}, but the model's parameter has {list(parameter.shape)}"
        raise UsageError(f'tensor "{name}" cannot be merged: its shape is {shapes}')
    held_alike = not tensor.terms and TORCH_DTYPES.get(tensor.entry.dtype) == parameter.dtype  # a buffer that counts
    if not held_alike and (not parameter.is_floating_point() or is_float8(parameter)):
        raise UsageError(f'tensor "{name}" cannot be merged: the model holds it as {parameter.dtype}')


@dataclass(slots=True, eq=False)
class _Change:
    """One changed parameter.

    Attributes:
        name: the tensor's name.
        tensor: the delta's tensor.
        parameter: the model's parameter.
        original: the original values: of all elements if ``whole``, otherwise of the elements that change.
        whole: True if all elements are kept.
    """

    name: str
    tensor: DeviceTensor
    parameter: torch.Tensor
    original: torch.Tensor | None = None
    whole: bool = True

    def save(self) -> None:
        """Copy the values that will change to host memory."""
        held = self.parameter.detach()
        wanted = TORCH_DTYPES[self.tensor.entry.dtype]
        # Rounding to a narrower dtype may change elements whose delta is zero.
        self.whole = not self.tensor.terms or not (
            torch.promote_types(held.dtype, wanted) == wanted or torch.equal(held.to(wanted).to(held.dtype), held)
        )
        if self.whole:
            self.original = held.cpu().clone()
        else:
            self.original = torch.cat([rows[delta != 0].cpu() for rows, delta in self._chunks()])

    def write(self) -> None:
        """Change the parameter."""
        for rows, values in self._fine_tuned(None):
            rows.copy_(values)

    def is_written(self) -> bool:
        """Tell whether the parameter still has the values that were written."""
        return all(torch.equal(_bits(rows), _bits(values)) for rows, values in self._fine_tuned(self.original))

    def restore(self) -> None:
        """Write the original values back, if any were kept."""
        if self.original is None:
            return
        if self.whole:
            self.parameter.detach().copy_(self.original)
        else:
            for rows, _, mask, part in self._originals(self.original):
                rows[mask] = part
        self.original = None

    def _fine_tuned(self, original: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield chunks of the parameter with their fine-tuned values, computed from the original values if given."""
        held = self.parameter.detach()
        if self.whole:
            base = held if original is None else original.to(held.device)
            yield held, new_values(self.tensor, base.to(self._device())).to(held.device)
            return
        dtype = TORCH_DTYPES[self.tensor.entry.dtype]
        if original is None:
            for rows, delta in self._chunks():
                yield rows, added(rows, delta, dtype).to(rows.dtype)
        else:
            for rows, delta, mask, part in self._originals(original):
                base = rows.clone()
                base[mask] = part
                yield rows, added(base, delta, dtype).to(rows.dtype)

    def _originals(
        self, original: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield chunks of the parameter with their delta, the mask of changed elements and their original values."""
        start = 0
        for rows, delta in self._chunks():
            mask = delta != 0
            stop = start + int(mask.sum())
            yield rows, delta, mask, original[start:stop].to(rows.device)
            start = stop

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows of the parameter, as a matrix, with their delta."""
        entry = self.tensor.entry
        held = self.parameter.detach().view(entry.rows, entry.columns)
        for start, stop in row_ranges(0, entry.rows, entry.columns, _STEP_ROWS, _CHUNK_ELEMENTS):
            yield held[start:stop], dense_delta(self.tensor, start, stop).to(held.device)

    def _device(self) -> torch.device:
        return self.tensor.terms[0].device if self.tensor.data is None else self.tensor.data.device


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(_BITS[values.element_size()])
