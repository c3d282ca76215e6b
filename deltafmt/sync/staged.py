"""Changes that are known before anything is touched, and are then made to all live tensors, or to none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from deltafmt.exact.few import FEW, Places, put, taken
from deltafmt.exact.units import Units
from deltafmt.sync.live import INTEGERS, LiveTensor


class Change(Protocol):
    """A change of some units of a live tensor."""

    def make(self) -> None:
        """Write the new units. What was there before can be written back from then on."""

    def undo(self) -> None:
        """Write back what was there before, whether or not all of the new units were written."""


class HostChange:
    """A change of a run of units in host memory.

    Args:
        target: the run, a view of the live tensor.
        places: the places that change, each once; None for all of the run.
        new: the new unit of each place.
    """

    def __init__(self, target: Units, places: Places | None, new: Units) -> None:
        self._target, self._places, self._new = target, places, new
        self._old: Units | None = None

    def make(self) -> None:
        """Write the new units."""
        if self._places is None:
            self._old = self._target.copy()
            self._target[:] = self._new
        else:
            self._old = taken(self._target, self._places)
            put(self._target, self._places, self._new)

    def undo(self) -> None:
        """Write the old units back."""
        if self._old is None:
            return
        if self._places is None:
            self._target[:] = self._old
        else:
            put(self._target, self._places, self._old)


class PlacesChange:
    """A change of some units of a tensor whose bytes lie in C order on a device.

    Args:
        target: all units of the live tensor, as integers.
        places: those that change.
        new: their new values.
    """

    MOST = FEW

    def __init__(self, target: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> None:
        self._target, self._places, self._new = target, places, new
        self._old: torch.Tensor | None = None

    def make(self) -> None:
        """Write the new units."""
        self._old = self._target[self._places]
        self._target[self._places] = self._new

    def undo(self) -> None:
        """Write the old units back."""
        if self._old is not None:
            self._target[self._places] = self._old


class WholeChange:
    """A change of all elements of a tensor whose bytes do not lie in C order, or of which many change.

    Args:
        live: the tensor.
        new: all of its units.
    """

    def __init__(self, live: LiveTensor, new: Units | torch.Tensor) -> None:
        integers = INTEGERS[live.tensor.element_size()]
        whole = new if isinstance(new, torch.Tensor) else torch.from_numpy(new.view(np.uint8))
        self._target = live.tensor.view(integers)
        self._new = whole.view(integers).reshape(live.shape).to(self._target.device)
        self._old: torch.Tensor | None = None

    def make(self) -> None:
        """Write the new elements."""
        self._old = self._target.clone()
        self._target.copy_(self._new)

    def undo(self) -> None:
        """Write the old elements back."""
        if self._old is not None:
            self._target.copy_(self._old)


def make_all(changes: Sequence[Change]) -> None:
    """Make all changes; if one fails, or the call is interrupted, undo them and raise what happened."""
    with torch.inference_mode():
        done = 0
        try:
            for change in changes:
                done += 1
                change.make()
        except BaseException:
            for change in changes[:done]:
                change.undo()
            raise
