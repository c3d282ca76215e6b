"""Where Triton's kernels can run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch

from deltafmt.kernels.variants import is_collecting


@functools.cache
def has_triton() -> bool:
    """Return True if Triton is installed; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


def usable(tensor: torch.Tensor) -> bool:
    """Return True if kernels can run where a tensor lies; while variants are collected, nothing runs, and they can."""
    return usable_on(tensor.device)


def usable_on(device: torch.device) -> bool:
    """Return True if kernels can run on a device."""
    return (device.type == "cuda" or is_collecting()) and has_triton()


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of a tensor the current one, on which Triton launches."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
