"""The names that transformers gives to a checkpoint's tensors in memory, by its own conversion mappings.

Files of one architecture may say ``vit.encoder.layer.0.attention.attention.query.weight`` and, saved by another
version, ``vit.layers.0.attention.q_proj.weight``. transformers loads both, so it knows that they are one.
Without transformers, or for a model that it does not know, no name is given.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from deltafmt.checkpoint.layouts import FUSED

# A fused module's usual name, by the names of its parts.
_WHOLES: Final = {parts: name for name, sequences in reversed(FUSED.items()) for parts in sequences}


class Configured(Protocol):
    """A checkpoint with a configuration."""

    def config(self) -> dict[str, Any]:
        """Return the configuration."""


def library_names(checkpoints: Sequence[Configured], names: Iterable[str]) -> Mapping[str, str]:
    """Return the names in memory of those tensors for which transformers has another name.

    Args:
        checkpoints: those that the names come from; the last one whose model transformers can make decides.
        names: names as they stand in files.
    """
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        return {}
    for config in [checkpoint.config() for checkpoint in reversed(checkpoints)]:
        if not config.get("architectures"):
            continue
        # What transformers calls so is no public interface. A version that lacks it is as good as no transformers.
        with contextlib.suppress(Exception):
            return names_in_model(_model(config), names)
    return {}


def _model(config: Mapping[str, Any]) -> Any:
    """Return the model of a configuration, without memory for its parameters. Only transformers' own code runs."""
    import torch  # noqa: PLC0415 - slow to import, and few pairs need it
    import transformers  # noqa: PLC0415

    parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])(parsed)


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names in a model of transformers of those tensors of a file for which it has another name.

    A tensor that the model keeps cut into equal parts, such as ``attn.qkv``, gets the name of the fused module beside
    its parts: ``attention.qkv_proj``.

    Raises:
        Exception: this version of transformers has no such mapping.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    cuts = [(step, fused) for step in steps if isinstance(step, WeightConverter) and (fused := _fused(step))]
    held = model.state_dict()
    found = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, held)
        for step, (part, whole) in cuts:
            target, source = step.rename_source_key(renamed)
            if source is not None and part in target:
                renamed = target.replace(part, whole, 1)
                break
        if renamed != name:
            found[name] = renamed
    return found


def _fused(converter: Any) -> tuple[str, str] | None:
    """Return the name of the first part that a conversion cuts a tensor into, and that of the fused module; or None."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    parts = [target.removesuffix(".weight").removesuffix(".bias") for target in converter.target_patterns]
    fused = _WHOLES.get(tuple(part.rpartition(".")[2] for part in parts))
    if len(converter.source_patterns) != 1 or kinds not in (["Chunk"], ["Split"]) or fused is None:
        return None
    path, dot, _ = parts[0].rpartition(".")
    return parts[0], f"{path}{dot}{fused}"
