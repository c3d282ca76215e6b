"""Keys of parts: what a tensor of a file is in a parameter that holds several of them, such as a stack of experts.

An example: ``experts.3.up_proj.weight`` of a file is one half of matrix 3 in the model's ``gate_up_proj``.
"""

from __future__ import annotations

import re

import torch

_KEY = re.compile(r"(.+)\[(\d+):(\d+)\]")


def part_key(key: str, start: int, count: int) -> str:
    """Return the key of ``count`` elements of a parameter, in C order: ``gate_up_proj[512:1024]``."""
    return f"{key}[{start}:{start + count}]"


def split_key(key: str) -> tuple[str, slice | None]:
    """Return the parameter's own key, and the elements; None for the whole parameter."""
    match = _KEY.fullmatch(key)
    return (key, None) if match is None else (match[1], slice(int(match[2]), int(match[3])))


def part_of(parameter: torch.Tensor, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the elements of a contiguous parameter that a key names, as a view of the file's shape."""
    elements = split_key(key)[1]
    return parameter if elements is None else parameter.detach().view(-1)[elements].view(shape)
