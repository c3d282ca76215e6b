"""Which token belongs to which delta: tokens sorted by slot and cut into tiles, without a host synchronization.

A *segment* is all tokens of one slot; a *tile* is up to T tokens of one segment, the share of one program. The number
of tiles that could be needed is known on the host; how many are, only on the device, where the rest exits at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError

# The fields of a tile in TokenTiles.table: its slot, its first place in the order, its number of tokens.
TILE_FIELDS = 3


@dataclass(frozen=True, slots=True, eq=False)
class TokenTiles:
    """Tiles of at most ``size`` tokens.

    Attributes:
        size: T, tokens of a tile.
        order: int32, shape (tokens,): token numbers sorted by slot, those without a slot last.
        table: int32, shape (tiles, 3): slot, first place in ``order`` and number of tokens; 0 tokens where a tile
            is not needed.
    """

    size: int
    order: torch.Tensor
    table: torch.Tensor


class Segments:
    """The tokens of a batch by slot.

    Args:
        slots: int32, shape (tokens,): each token's slot, -1 for the base alone. A number outside 0 to ``count`` - 1
            counts as -1.
        count: the number of slots.
        lengths: how many tokens each slot has, if the host knows; slots without tokens may be missing. If a number is
            wrong, tokens are lost from the product.

    Attributes:
        longest: no slot has more tokens than this.
        shortest: no slot that has tokens has fewer.
    """

    def __init__(self, slots: torch.Tensor, count: int, lengths: Mapping[int, int] | None = None) -> None:
        if slots.dim() != 1 or slots.dtype != torch.int32:
            raise UsageError(f"slots are a 1-d int32 tensor, not {slots.dtype} {tuple(slots.shape)}")
        self.slots = slots.contiguous()  # a slot repeated by ``expand`` has no memory of its own for each token
        self.count = count
        self.tokens = slots.shape[0]
        # Slots without tokens must not count for ``shortest``: 0 tokens would seem few enough for every kernel.
        known = None if lengths is None else {slot: length for slot, length in lengths.items() if length}
        self._lengths: Mapping[int, int] | None = known
        self.longest = self.tokens if known is None else max(known.values(), default=0)
        self.shortest = 1 if known is None else min(known.values(), default=0)
        self._sorted: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tiles: dict[tuple[int, int, int], TokenTiles] = {}

    @classmethod
    def of(cls, slots: list[int], count: int, device: torch.device | str) -> Segments:
        """Build from slots that the host knows."""
        lengths = Counter(slot for slot in slots if 0 <= slot < count)
        return cls(torch.tensor(slots, dtype=torch.int32).to(device, non_blocking=True), count, lengths)

    def members(self, slot: int) -> torch.Tensor:
        """Return the numbers of a slot's tokens, int64, ascending; waits for the device if the host has no lengths."""
        lengths = self.lengths()
        start = sum(length for other, length in lengths.items() if other < slot)
        return self._sort()[0][start : start + lengths.get(slot, 0)].long()

    def lengths(self) -> Mapping[int, int]:
        """Return how many tokens each slot has; waits for the device if the host does not know."""
        if self._lengths is None:
            places = self._sort()[1].tolist()
            self._lengths = {slot: places[slot + 1] - places[slot] for slot in range(self.count)}
        return self._lengths

    def _sort(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token order, and the places where each slot's tokens start and end (shape (count + 1,))."""
        if self._sorted is None:
            slots = torch.where((self.slots >= 0) & (self.slots < self.count), self.slots, self.count)
            ordered, order = torch.sort(slots, stable=True)
            numbers = torch.arange(self.count + 1, device=slots.device, dtype=torch.int32)
            self._sorted = order.int(), torch.searchsorted(ordered, numbers, out_int32=True)
        return self._sorted

    @property
    def form(self) -> tuple[int, ...]:
        """Everything that the grids of launches depend on."""
        return self.tokens, self.count, self.shortest, self.longest

    def known_tiles(self) -> list[tuple[tuple[int, int, int], TokenTiles]]:
        """Return the tiles that were cut so far, with the arguments that :meth:`tiles` gives them for."""
        return list(self._tiles.items())

    def tiles(self, size: int, shortest: int = 1, longest: int | None = None) -> TokenTiles:
        """Cut the segments of ``shortest`` to ``longest`` tokens into tiles of ``size`` tokens; kept for reuse."""
        longest = self.longest if longest is None else min(longest, self.longest)
        key = (size, shortest, longest)
        if key not in self._tiles:
            order, places = self._sort()
            starts, lengths = places[:-1], places[1:] - places[:-1]
            taken = torch.where((lengths >= shortest) & (lengths <= longest), lengths, 0)
            ends = torch.cumsum((taken + size - 1) // size, 0, dtype=torch.int32)
            # A segment of length l has at most ceil(l / T) tiles; the sum over segments is bounded by both terms.
            bound = min(self.tokens, self.tokens // size + self.count)
            number = torch.arange(bound, device=order.device, dtype=torch.int32)
            slot = torch.searchsorted(ends, number, right=True, out_int32=True)
            used = slot < self.count
            slot = slot.clamp(max=max(self.count - 1, 0))
            first = (number - torch.where(slot > 0, ends[slot - 1], 0)) * size
            left = torch.where(used, taken[slot] - first, 0).clamp(0, size)
            table = torch.stack([torch.where(used, slot, -1), starts[slot] + first, left], 1).int().contiguous()
            self._tiles[key] = TokenTiles(size, order, table)
        return self._tiles[key]
