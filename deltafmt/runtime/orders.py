"""The order of the deltas in one tensor: which part of it uses which slot.

An example: x of shape (3, 5, 4096), whose dimension 0 is the rows of the batch, with the slots 0, -1 and 1. Its leading
dimensions are 15 tokens: tokens 0 to 4 use slot 0, tokens 5 to 9 the base, tokens 10 to 14 slot 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

import torch

from deltafmt.kernels.segments import Segments

T = TypeVar("T")


class Order:
    """The slots of the tokens of one tensor, whose leading dimensions are taken as one.

    Args:
        shape: the leading dimensions: all but the last of a linear module's input, all of an embedding's ids.
        dim: the dimension along which the slots differ.
        line: the slots along it, int64, on the host; or a single slot for all tokens.
        count: the number of slots of the operand tables.
        device: the device of the results.

    Attributes:
        dim: the dimension.
        line: the slots along it.
        tokens: the product of the leading dimensions.
        uniform: True if all tokens use the same slot.
    """

    def __init__(
        self, shape: Sequence[int], dim: int, line: torch.Tensor, count: int, device: torch.device, *, uniform: bool
    ) -> None:
        self.dim = dim
        self.line = line
        self.tokens = math.prod(shape)
        self.uniform = uniform
        self._before, self._after = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        self._count = count
        self._device = device
        self._memo: dict[Hashable, object] = {}

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the object that was built for a key before, or build it."""
        if key not in self._memo:
            self._memo[key] = build()
        return cast("T", self._memo[key])

    def _flat(self) -> torch.Tensor:
        if self.uniform:
            return self.line.expand(self.tokens)
        return self.memo("flat", lambda: self.line[None, :, None].expand(self._before, -1, self._after).reshape(-1))

    def host_slots(self) -> list[int]:
        """Return each token's slot."""
        found: list[int] = self._flat().tolist()
        return found

    def slots(self) -> torch.Tensor:
        """Return each token's slot, int64; sums keep their numbers."""
        return self.memo("slots", lambda: self._flat().to(self._device))

    def members(self, slot: int) -> torch.Tensor | slice:
        """Return the numbers of the tokens that use a slot."""
        if self.uniform:
            return slice(None)
        return self.memo(("members", slot), lambda: (self._flat() == slot).nonzero().view(-1).to(self._device))

    def along(self, slot: int) -> torch.Tensor:
        """Return the places along the dimension that use a slot."""
        return self.memo(("along", slot), lambda: (self.line == slot).nonzero().view(-1).to(self._device))

    def segments(self) -> Segments:
        """Return the segments of the tokens."""

        def build() -> Segments:
            slots, lengths = self.line.unique(return_counts=True)  # type: ignore[no-untyped-call]
            each = self.tokens // len(self.line)
            known = {
                slot: length * each for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True) if slot >= 0
            }
            flat = self._flat().clamp(min=-1).to(torch.int32).to(self._device)
            return Segments(flat, self._count, known)

        return self.memo("segments", build)

    def numbers(self, slots: Sequence[int]) -> torch.Tensor:
        """Return each token's place in a list of slots."""

        def build() -> torch.Tensor:
            places = (self._flat() == torch.tensor(slots, device="cpu")[:, None]).to(torch.uint8).argmax(0)
            return places.to(self._device)

        return self.memo(("numbers", tuple(slots)), build)
