"""Modules that keep their weight as 8-bit floats with scales, and the check that they are the base's.

A delta adds to a module's output, whatever its weight is kept as. So such a module is served like any other, and its
codes and scales are compared with those that the delta file describes (spec/deltafmt-v1.md, section 7.8).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from deltafmt.runtime.binding import BoundModule

# Where modules keep the scales of their weight: FP8Linear and FbgemmFp8Linear of transformers, compressed-tensors.
_SCALES = ("weight_scale_inv", "weight_scale")


def is_float8(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds 8-bit floats."""
    return tensor.is_floating_point() and tensor.element_size() == 1


def find_scales(modules: Iterable[BoundModule]) -> dict[str, torch.Tensor]:
    """Return the scales of weights that modules keep as 8-bit floats, by the weight's name in the delta."""
    found = {}
    for bound in modules:
        name, weight = bound.tensors.get("weight"), getattr(bound.module, "weight", None)
        if name is not None and isinstance(weight, torch.Tensor) and is_float8(weight):
            scales = _scales_of(bound.module)
            if scales is not None:
                found[name] = scales
    return found


def _scales_of(module: nn.Module) -> torch.Tensor | None:
    held = (getattr(module, name, None) for name in _SCALES)
    return next((tensor for tensor in held if isinstance(tensor, torch.Tensor)), None)
