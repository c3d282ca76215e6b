"""The device of a model, the models inside it, and the size of the batch that it is called with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltafmt.errors import UsageError
from deltafmt.runtime.cuts import WAY_OUT

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


def is_distributed(tensor: object) -> bool:
    """Tell whether a tensor is a DTensor; the package that defines them is slow to import, so it is only looked up."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def refuse_parallel(model: nn.Module) -> None:
    """Refuse a model that is cut over several processes by an older transformers, whose parameters are plain tensors.

    Raises:
        UsageError: it is.
    """
    size = getattr(model, "_tp_size", None)
    if isinstance(size, int) and size > 1 and not any(map(is_distributed, model.parameters())):
        raise UsageError(
            f"the model is cut over {size} processes, and its parameters do not say how; take transformers 5.17 or "
            f"later, or {WAY_OUT}"
        )


def refuse_elsewhere(name: str, module: nn.Module, device: torch.device) -> None:
    """Refuse a module whose parameters lie on another device than the deltas.

    Args:
        name: the module's name, for the message.
        module: the module.
        device: of the deltas.

    Raises:
        UsageError: names the module and both devices.
    """
    wanted = torch.empty(0, device=device).device if device == torch.device("cuda") else device
    for parameter in module.parameters(recurse=False):
        if parameter.device != wanted:
            raise UsageError(
                f'module "{name}" lies on {parameter.device}, and the deltas on {device}; load the model on one '
                "device, for example with device_map={'': 0}"
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


def embedding_of(model: nn.Module) -> nn.Embedding | None:
    """Return the embedding that gives a model its ``inputs_embeds``; None if it has none."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) and found is not model else None


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the numbers of rows and tokens in the batch that a model is called with; None if it has no batch."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    for value in (ids, embeddings, *args[:1], *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value.shape[0], value.shape[0] * value.shape[1]
    return None
