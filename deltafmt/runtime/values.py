"""The fine-tuned values of a whole tensor, computed on the device: the base's values plus a decoded delta.

They have the bits that ``deltafmt unpack`` would write. Sites use them where a model reads a parameter whole.
"""

from __future__ import annotations

import torch

from deltafmt.kernels.products import operand_delta
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.dtypes import TORCH_DTYPES


def dense_delta(tensor: DeviceTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of the sum of a tensor's terms, in float32."""
    total: torch.Tensor | None = None
    for operand in tensor.terms:
        term = operand_delta(operand, start, stop)
        total = term if total is None else total + term
    assert total is not None
    return total


def added(base: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``base + delta``, summed in float32 and rounded to a dtype; the base's own values where delta is zero.

    Args:
        base: the base's values, in any floating dtype.
        delta: the delta in float32, with the base's shape.
        dtype: the dtype of the fine-tuned tensor.
    """
    return torch.where(delta == 0, base.to(dtype), (base.float() + delta).to(dtype))


def new_values(tensor: DeviceTensor, base: torch.Tensor) -> torch.Tensor:
    """Return a tensor's fine-tuned values, rounded to the fine-tune's dtype and converted to the base's.

    Args:
        tensor: a tensor with the base's shape.
        base: the base's values, on the delta's device.
    """
    if tensor.terms:
        delta = dense_delta(tensor).view(base.shape)
        return added(base, delta, TORCH_DTYPES[tensor.entry.dtype]).to(base.dtype)
    assert tensor.data is not None
    return tensor.data.view(base.shape).to(base.dtype)


def version_of(tensor: torch.Tensor) -> int:
    """Return the number of times that a tensor was written to in place; -1 where torch doesn't count."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other name for it
