"""The selection of a packed batch: one row that holds the tokens of several requests, one request after another.

Continuous batching packs the tokens of all requests that it runs into a row of the shape (1, tokens). A request has
many tokens while its prompt is read, and one token in every later step. So the tokens of a request, and not an equal
share of the batch, use the request's delta.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.segments import Segments
from deltafmt.runtime.selection import BASE, Selection, mixed_error


class PackedSelection(Selection):
    """The slots of the requests of a packed batch.

    Args:
        slots: each request's slot; see :class:`Selection`. At least two differ.
        lengths: each request's number of tokens.
        count: the number of slots of the operand tables.
        device: the model's device.
        mixes: the slots and weights of each sum, by its number.
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
        self.rows, self.tokens = 1, sum(lengths)
        self._host_lengths = torch.tensor(lengths, dtype=torch.long)
        self._lengths = self._host_lengths.to(device)
        self._by_slot: Counter[int] = Counter()
        for slot, length in zip(slots, lengths, strict=True):
            self._by_slot[slot] += length

    def enter(self, rows: int, tokens: int, where: str, *, root: bool = False) -> None:  # noqa: ARG002 - as its base
        """Refuse a batch that does not have the requests' tokens.

        Raises:
            UsageError: the batch has another number of tokens.
        """
        if tokens != self.tokens:
            raise UsageError(f"{where} is given {tokens} tokens where the requests have {self.tokens}")

    def check(self, shape: Sequence[int], where: str) -> None:
        """Refuse a module's input whose first dimensions are not (tokens,) or (1, tokens).

        Raises:
            UsageError: the tokens of the input cannot be told apart.
        """
        if shape[0] != self.tokens and tuple(shape[:2]) != (1, self.tokens):
            raise mixed_error(where, shape)

    def share(self, size: int, where: str) -> int:
        """Return how many of ``size`` rows belong to each token.

        Raises:
            UsageError: ``size`` is not a multiple of the number of tokens.
        """
        if size % self.tokens:
            raise mixed_error(where, [size])
        return size // self.tokens

    def segments(self, tokens: int, where: str) -> Segments:
        """Return the segments of the batch's tokens, or of several rows for each token; they are kept."""

        def build() -> Segments:
            lengths = {slot: each * self._by_slot[slot] for slot in self.used}
            return Segments(self.spread(self._row_slots, tokens, where), self.count, lengths)

        each = self.share(tokens, where)
        return self.memo(("segments", tokens), build)

    def members(self, slot: int, size: int, where: str) -> torch.Tensor | slice:
        """Return the numbers of those tokens, or of the rows of those tokens, that use a slot."""

        def build() -> torch.Tensor:
            repeats = self._host_lengths * self.share(size, where)
            found = torch.repeat_interleave(torch.tensor(self.slots), repeats) == slot
            return found.nonzero()[:, 0].to(self.device)

        return self.memo(("members", slot, size), build)

    def slots_of(self, size: int, where: str) -> list[int]:
        """Return the slot of each of ``size`` tokens, or of the rows of each token."""
        each = self.share(size, where)
        pairs = zip(self.slots, self._host_lengths.tolist(), strict=True)
        return [slot for slot, length in pairs for _ in range(length * each)]

    def spread(self, values: torch.Tensor, size: int, where: str) -> torch.Tensor:
        """Return, for each of ``size`` tokens, the value of its request; ``values`` has one for each request."""
        return torch.repeat_interleave(values, self._lengths * self.share(size, where), dim=0, output_size=size)

    def add_(self, y: torch.Tensor, values: torch.Tensor, where: str) -> None:
        """Add to the tokens of each request the request's values, to the first columns of ``y``."""
        y[:, : values.shape[-1]] += self.spread(values, len(y), where)


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
