"""Hidden states of all sequences between two blocks: in host memory, or in a memory-mapped file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from deltafmt.output import storage_error


class HiddenStates:
    """Hidden states, a batch at a time.

    Args:
        shapes: the shape (rows, tokens) of every batch.
        width: the number of elements of a hidden state.
        dtype: the dtype of the elements.
        path: the file that holds the hidden states, which is made if it is missing; None for host memory.

    Raises:
        StorageError: the file cannot be made.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype, path: Path | None) -> None:
        self.shapes, self.width = shapes, width
        ends = torch.tensor([rows * tokens for rows, tokens in shapes]).cumsum(0).tolist()
        self._starts = [0, *ends]
        size = self._starts[-1] * width
        if path is None:
            flat = torch.empty(size, dtype=dtype)
        else:
            _reserve(path, size * dtype.itemsize)
            flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        self._states = flat.view(self._starts[-1], width)

    def read(self, batch: int, device: torch.device) -> torch.Tensor:
        """Return a batch on a device, shape (rows, tokens, width)."""
        part = self._states[self._starts[batch] : self._starts[batch + 1]]
        # Also on the host a block gets a copy, because it may work in place.
        return part.to(device, copy=True).view(*self.shapes[batch], self.width)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self._states.dtype

    def finite(self) -> bool:
        """Tell whether all hidden states are finite."""
        return all(bool(part.isfinite().all()) for part in torch.split(self._states, 65536))

    def write(self, batch: int, states: torch.Tensor) -> None:
        """Store the hidden states of a batch."""
        self._states[self._starts[batch] : self._starts[batch + 1]] = states.reshape(-1, self.width).cpu()


def _reserve(path: Path, size: int) -> None:
    """Give a file its whole size on disk: if a mapped file runs out of room later, the process dies of a bus error."""
    try:
        with open(path, "a+b") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
            os.ftruncate(file.fileno(), size)
    except OSError as error:
        raise storage_error("cannot write", path, error) from error
