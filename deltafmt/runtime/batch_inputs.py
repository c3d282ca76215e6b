"""The inputs of a call whose leading dimension is known: rows of the batch, or images that belong to rows.

Which inputs these are follows from their names, as transformers uses them; never from their sizes. An input that is not
named here counts as the same for all rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from deltafmt.errors import UsageError

# The first of these that a call is given says how many rows the batch has.
_MAIN: Final = (
    *("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "input_features", "input_values"),
    *("pixel_values", "encoder_outputs", "hidden_states"),
)
# Others with a row for each row of the batch, or one for all.
_BESIDE: Final = (
    *("encoder_hidden_states", "attention_mask", "decoder_attention_mask", "encoder_attention_mask", "position_ids"),
    *("token_type_ids", "decoder_position_ids", "pixel_mask", "labels", "bbox"),
)
# Inputs with rows in the models of one kind only. RWKV's is a list of what each row has come to; in the states of other
# models, layers may come first.
_STATE: Final = {"rwkv": ("state",)}
_LEADING: Final = (*_MAIN, *_BESIDE)
_GRIDS: Final = {"pixel_values": ("image_grid_thw", "image"), "pixel_values_videos": ("video_grid_thw", "video")}


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """An input whose first dimension is known.

    Attributes:
        name: the name of the argument.
        tensor: the input.
        rows: the row of the batch of each item of the first dimension; None if the items are the rows.
        packed: True if several items make up an image, so that the model does not keep them apart.
    """

    name: str
    tensor: torch.Tensor
    rows: tuple[int, ...] | None = None
    packed: bool = False


def named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def rows_of(given: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the input that says how many rows a batch has, and their number; None if there is none."""
    for name in _MAIN:
        for tensor in _tensors(given.get(name)):
            return name, tensor.shape[0]
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return name, value.shape[0]
    return None


def shapes_of(given: Mapping[str, Any]) -> tuple[Hashable, ...] | None:
    """Return what :func:`rows_of` and :func:`inputs_of` follow from; None if it is more than shapes."""
    names = itertools.chain(_LEADING, *_STATE.values())
    if any(isinstance(given.get(name), list | tuple | Mapping) for name in names):
        return None
    if not _GRIDS.keys().isdisjoint(name for name, value in given.items() if value is not None):
        return None
    return tuple([(name, value.shape) for name, value in given.items() if isinstance(value, torch.Tensor)])


def inputs_of(given: Mapping[str, Any], rows: int, main: str, config: Any, where: str) -> Iterator[Input]:
    """Yield the inputs whose first dimension is known.

    Args:
        given: the arguments by name.
        rows: the rows of the batch.
        main: the input that said so.
        config: the model's configuration, if it has one; it tells the tokens that stand for images.
        where: the model's class, for messages.

    Raises:
        UsageError: two inputs have different numbers of rows, or the images cannot be told apart.
    """
    for name, (grid, kind) in _GRIDS.items():
        token = _token(config, kind)
        if token is not None and isinstance(given.get(name), torch.Tensor) and name != main:
            owned = _images(given, name, given.get(grid), token, config, where)
            if owned is not None:
                yield Input(name, given[name], owned, packed=isinstance(given.get(grid), torch.Tensor))
    own = _STATE.get(getattr(config, "model_type", None) or "", ())
    for name in dict.fromkeys((main, *_LEADING, *own)):
        if name in _GRIDS and name != main and _token(config, _GRIDS[name][1]) is not None:
            continue
        for tensor in _tensors(given.get(name)):
            if tensor.shape[0] == rows and not (name == "position_ids" and tensor.dim() != 2):
                yield Input(name, tensor)
            elif name in _MAIN:
                raise UsageError(
                    f"{where} is given {rows} rows of {main} and {tensor.shape[0]} of {name}; such a call serves one "
                    "delta at a time"
                )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an argument, which may be an output of another model."""
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _token(config: Any, kind: str) -> int | None:
    """Return the token that stands for an image in a text."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def _images(
    given: Mapping[str, Any], name: str, grid: Any, token: int, config: Any, where: str
) -> tuple[int, ...] | None:
    """Return the row of each image, or of each patch where images are packed; None if it cannot be told.

    Images stand in the order of their places in the texts. Each takes as many tokens as its grid says, or, without a
    grid, as many as every other image.
    """
    pixels, ids = given[name], given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    counts = (ids == token).sum(1).tolist()
    if isinstance(grid, torch.Tensor):
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        if not isinstance(merge, int):
            return None
        patches = [math.prod(one) for one in grid.tolist()]
        tokens = [count // merge**2 for count in patches]
    elif pixels.dim() == 4 and given.get("image_sizes") is None:
        patches = [1] * pixels.shape[0]
        tokens = [sum(counts) // max(len(patches), 1)] * len(patches)
    else:
        return None
    owned: list[int] = []
    row = 0
    for size, taken in zip(patches, tokens, strict=True):
        while row < len(counts) and not counts[row]:
            row += 1
        if row == len(counts) or not 0 < taken <= counts[row]:
            break
        counts[row] -= taken
        owned += [row] * size
    if any(counts) or len(owned) != pixels.shape[0]:
        raise UsageError(
            f"{where} is given {name} that do not fill the images' places in input_ids row by row; such a call serves "
            "one delta at a time"
        )
    return tuple(owned)
