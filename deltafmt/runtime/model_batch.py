"""The device of a model, the models inside it, and the size of the batch that it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltafmt.errors import UsageError

_RECEIVES = frozenset(("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters and buffers.

    Raises:
        UsageError: the model lies on several devices, or on none.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        found = " and ".join(sorted(map(str, devices))) or "no device"
        raise UsageError(f"the model lies on {found}; choose one device for the deltas with device=")
    return devices.pop()


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model with parameters that are not in memory: they come and go while it runs.

    Raises:
        UsageError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f'parameter "{name}" is not in memory (device "meta"): the model is offloaded, or was never loaded; '
                "load it whole, for example with device_map={'': 0}, and attach the deltas to that"
            )


def models_in(model: nn.Module) -> list[nn.Module]:
    """Return the model and the models inside it that receive the batch, such as a decoder or an encoder."""
    found = [model]
    for module in model.modules():
        if module is not model and next(module.children(), None) is not None:
            parameters = inspect.signature(type(module).forward).parameters
            if not _RECEIVES.isdisjoint(parameters):
                found.append(module)
    return found


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the numbers of rows and tokens in the batch that a model is called with; None if it has no batch."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    for value in (ids, embeddings, *args[:1], *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value.shape[0], value.shape[0] * value.shape[1]
    return None
