"""Bound launches, on the CPU: they are played by the product that decodes.

Launches are repeated on a GPU alone. Whose rows they are for, and when they hold, is decided before, and the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deltafmt.runtime import product_group


class Played:
    """What stands for the bound launches of a product, for inputs and outputs of one form.

    Attributes:
        made: how many products they made, of all groups.
    """

    made = 0

    def __init__(self, outputs: Sequence[torch.Tensor], x: torch.Tensor, table: Any, segments: Any) -> None:
        self._x = _form(x)
        self._outputs = [_form(output) for output in outputs]
        self._table, self._segments = table, segments

    def takes(self, x: torch.Tensor) -> bool:
        """Tell whether an input has the form."""
        return _form(x) == self._x

    def run(self, outputs: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
        """Add the products, unless an output has another form."""
        if [_form(output) for output in outputs] != self._outputs:
            return False
        flat = [output.view(-1, output.shape[-1]) for output in outputs]
        product_group.matmul_(flat, x.view(-1, x.shape[-1]), self._table, self._segments)
        Played.made += 1
        return True


def play(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    """Let products be bound on the CPU."""

    def bind_product(outputs: Sequence[torch.Tensor], x: torch.Tensor, table: Any, segments: Any) -> Played | None:
        whole = x.is_contiguous() and x.dtype == outputs[0].dtype and all(one.is_contiguous() for one in outputs)
        return Played(outputs, x, table, segments) if whole else None

    monkeypatch.setattr(product_group, "bind_product", bind_product)
    monkeypatch.setattr(Played, "made", 0)
    return Played


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
