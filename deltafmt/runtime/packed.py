"""The selection of a packed batch: one row that holds the tokens of several requests, one request after another.

Continuous batching packs the tokens of all requests that it runs into a row of the shape (1, tokens). A request has
many tokens while its prompt is read, and one token in every later step. So the tokens of a request, and not an equal
share of the batch, use the request's delta.

Nothing is followed here: attention reads keys and values of earlier steps, which belong to no input of this one. The
order is known from the requests' lengths wherever a tensor has the shape (1, tokens, ...), or is a view of one that
has. Every other tensor is refused by its module's name.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.batch_inputs import rows_of
from deltafmt.runtime.call_rows import Walk, mixed_error
from deltafmt.runtime.orders import Order
from deltafmt.runtime.row_places import Forms
from deltafmt.runtime.selection import BASE, Selection


class PackedSelection(Selection):
    """The slots of the requests of a packed batch.

    Args:
        slots: each request's slot; see :class:`Selection`. At least two differ.
        lengths: each request's number of tokens.
        count: the number of slots of the operand tables.
        device: the model's device.
        mixes: the slots and weights of each sum, by its number.

    Attributes:
        tokens: the number of tokens of all requests.
    """

    packed = True

    def __init__(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        count: int,
        device: torch.device,
        mixes: Mapping[int, tuple[tuple[int, float], ...]] | None = None,
    ) -> None:
        super().__init__(slots, count, device, mixes=mixes)
        self.tokens = sum(lengths)
        self._line = torch.tensor(slots, device="cpu").repeat_interleave(torch.tensor(lengths, device="cpu"))

    def begin(self, forms: Forms, entry: Hashable, given: Mapping[str, Any], config: Any, where: str) -> Walk | None:  # noqa: ARG002 - as its base
        """Refuse a batch that does not have the requests' tokens.

        Raises:
            UsageError: the batch is not one row of these tokens.
        """
        found = rows_of(given)
        shape = [] if found is None else list(getattr(given[found[0]], "shape", ()))
        if shape[:2] != [1, self.tokens]:
            raise UsageError(
                f"{where} is given a batch of the shape {shape[:2]} where the requests have {self.tokens} tokens"
            )
        return None

    def order(self, site: object, number: int, tensor: torch.Tensor, shape: Sequence[int], where: str) -> Order:  # noqa: ARG002 - as its base
        """Return the order of the deltas in a tensor that a module is given; see :meth:`Selection.order`.

        Raises:
            UsageError: the tokens of the tensor cannot be told apart.
        """
        dim = self._dim(tensor)
        if dim is None or dim >= len(shape):
            raise mixed_error(where, tensor.shape)
        leading = tuple(shape)
        return self.memo(
            ("order", dim, leading),
            lambda: Order(leading, dim, self._line, self.count, self.device, uniform=False),
        )

    def steady(self, tensor: torch.Tensor) -> bool:
        """Tell whether the order of every tensor of this shape is the same: strides may tell apart others."""
        return tensor.dim() == 3 and tensor.shape[:2] == (1, self.tokens)

    def _dim(self, tensor: torch.Tensor) -> int | None:
        """Return the dimension of the tokens; None if it cannot be told."""
        shape = tensor.shape
        if tensor.dim() == 4 and shape[0] == 1 and self.tokens in shape[1:3]:
            # (1, heads, tokens, size) is a view of (1, tokens, heads, size), which tells them apart where there are
            # as many heads as tokens.
            turned = shape[1] != self.tokens or (shape[2] == self.tokens and tensor.stride(1) < tensor.stride(2))
            return 2 if turned else 1
        if shape[:2] == (1, self.tokens):
            return 1
        # As many rows as tokens could be some of the tokens, in another order, as experts are given them.
        base = tensor._base  # noqa: SLF001 - torch has no public name for it
        if base is None or shape[:1] != (self.tokens,) or base.shape[:2] != (1, self.tokens):
            return None
        return 0 if math.prod(base.shape) == math.prod(shape) and tensor.is_contiguous() else None


def select(
    requests: Sequence[tuple[tuple[int, float], ...]], lengths: Sequence[int], count: int, device: torch.device
) -> Selection:
    """Return the selection of a packed batch.

    Args:
        requests: the slots and weights that each request uses; none for the base.
        lengths: each request's number of tokens.
        count: the number of slots of the operand tables.
        device: the model's device.
    """
    numbers: dict[tuple[tuple[int, float], ...], int] = {(): BASE}
    sums = 0
    for terms in requests:
        if terms not in numbers:
            alone = len(terms) == 1 and terms[0][1] == 1
            sums += not alone
            numbers[terms] = terms[0][0] if alone else BASE - sums
    mixes = {number: terms for terms, number in numbers.items() if number < BASE}
    slots = [numbers[terms] for terms in requests]
    if len(set(slots)) == 1:
        return Selection(slots[:1], count, device, mixes=mixes)
    return PackedSelection(slots, lengths, count, device, mixes)
