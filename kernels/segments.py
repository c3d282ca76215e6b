"""Which token belongs to which delta: tokens sorted by slot and cut into token tiles, without a host synchronization.

A *segment* is all tokens of one slot; a *token tile* is up to T tokens of one segment, the tokens of one program. (The
tiles of rows in packed buffers are another thing.) An example, with T = 2::

    slots  [1, -1, 0, 1, 1]            of tokens 0 to 4; -1: the base alone
    order  [2, 0, 3, 4, 1]             tokens sorted by slot, the base's last
    table  [[0, 0, 1],                 slot 0: one token from place 0 of the order on
            [1, 1, 2], [1, 3, 1],      slot 1: two token tiles
            [-1, 5, 0]]                not needed: 0 tokens, its programs exit at once

The grid must be known on the host, which knows how many token tiles could be needed. How many are needed, only the
device knows; the rest are such empty ones. So nothing waits, and a CUDA graph can be captured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError

# The fields of a token tile in TokenTiles.table: its slot, its first place in the order, its number of tokens.
TILE_FIELDS = 3


@dataclass(frozen=True, slots=True, eq=False)
class TokenTiles:
    """Token tiles of at most ``size`` tokens.

    Attributes:
        size: T, tokens of a tile.
        order: int32, shape (tokens,): token numbers sorted by slot, those without a slot last.
        table: int32, shape (tiles, 3): slot, first place in ``order`` and number of tokens; 0 tokens where a tile
            is not needed.
    """

    size: int
    order: torch.Tensor
    table: torch.Tensor


# Up to this many tokens in all, fixed segments are cut for slots of few tokens each, as in a decoding step.
_FEW_TOKENS, _USUAL = 32, 8


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
        usual: the tokens of a slot that tiles are made for; it decides about speed alone.
        fixed: True if captured graphs read the segments, and so follow their changes.
    """

    fixed = False

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
        self.usual = self.longest
        self._present = count if known is None else len(known)
        self._sorted: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tiles: dict[tuple[int, int, int], TokenTiles] = {}

    @classmethod
    def of(cls, slots: list[int], count: int, device: torch.device | str) -> Segments:
        """Build from slots that the host knows."""
        lengths = Counter(slot for slot in slots if 0 <= slot < count)
        return cls(torch.tensor(slots, dtype=torch.int32, device="cpu").to(device, non_blocking=True), count, lengths)

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
        if self._sorted is not None:
            return self._sorted
        slots = torch.where((self.slots >= 0) & (self.slots < self.count), self.slots, self.count)
        ordered, order = torch.sort(slots, stable=True)
        numbers = torch.arange(self.count + 1, device=slots.device, dtype=torch.int32)
        found = order.int(), torch.searchsorted(ordered, numbers, out_int32=True)
        if not is_captured(slots):
            self._sorted = found
        return found

    @property
    def form(self) -> tuple[int, ...]:
        """Everything that the grids of launches depend on."""
        return self.tokens, self._present, self.shortest, self.longest, self.usual

    def known_tiles(self) -> list[tuple[tuple[int, int, int], TokenTiles]]:
        """Return the tiles that were cut so far, with the arguments that :meth:`tiles` gives them for."""
        return list(self._tiles.items())

    def tiles(self, size: int, shortest: int = 1, longest: int | None = None) -> TokenTiles:
        """Cut the segments of ``shortest`` to ``longest`` tokens into tiles of ``size`` tokens; kept for reuse.

        While a CUDA graph is captured, new tiles are not kept, because they hold nothing before the graph is replayed.
        """
        longest = self.longest if longest is None else min(longest, self.longest)
        key = (size, shortest, longest)
        if key in self._tiles:
            return self._tiles[key]
        order, places = self._sort()
        starts, lengths = places[:-1], places[1:] - places[:-1]
        taken = torch.where((lengths >= shortest) & (lengths <= longest), lengths, 0)
        ends = torch.cumsum((taken + size - 1) // size, 0, dtype=torch.int32)
        # A segment of length l has at most ceil(l / T) tiles; the sum over segments is bounded by both terms.
        bound = min(self.tokens, self.tokens // size + self._present)
        number = torch.arange(bound, device=order.device, dtype=torch.int32)
        slot = torch.searchsorted(ends, number, right=True, out_int32=True)
        used = slot < self.count
        slot = slot.clamp(max=max(self.count - 1, 0))
        first = (number - torch.where(slot > 0, ends[slot - 1], 0)) * size
        left = torch.where(used, taken[slot] - first, 0).clamp(0, size)
        table = torch.stack([torch.where(used, slot, -1), starts[slot] + first, left], 1).int().contiguous()
        found = TokenTiles(size, order, table)
        if not is_captured(order):
            self._tiles[key] = found
        return found


def is_captured(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor that is made now belongs to a CUDA graph, which fills it when it is replayed."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class FixedSegments(Segments):
    """Segments whose tensors stay where they are while the slots of the tokens change.

    A captured graph reads them, so its launches must not depend on the slots: any slot may have any number of tokens.
    The tiles that launches ask for are kept from the next :meth:`prepare` on. Until then, every launch cuts its own,
    because memory that is taken while a graph is captured belongs to the graph.

    Args:
        tokens: the number of tokens.
        count: the number of slots.
        device: where the tensors lie.
        wanted: the arguments of tiles that launches have asked for, shared with others of as many tokens.
    """

    fixed = True

    def __init__(
        self, tokens: int, count: int, device: torch.device, wanted: set[tuple[int, int, int]] | None = None
    ) -> None:
        super().__init__(torch.full((tokens,), -1, dtype=torch.int32, device=device), count)
        self._lengths = {}
        self.usual = min(tokens, _USUAL) if tokens <= _FEW_TOKENS else tokens
        self._wanted: set[tuple[int, int, int]] = set() if wanted is None else wanted

    def fill(self, slots: list[int], source: torch.Tensor | None = None) -> None:
        """Give each token its slot, in the same memory.

        Args:
            slots: the tokens' slots.
            source: the same on the device, for a graph that follows this tensor from then on.
        """
        self.slots.copy_(torch.tensor(slots, dtype=torch.int32, device="cpu") if source is None else source)
        self._lengths = Counter(slot for slot in slots if 0 <= slot < self.count)
        fresh = Segments(self.slots, self.count)
        if self._sorted is not None:
            for mine, new in zip(self._sorted, fresh._sort(), strict=True):  # noqa: SLF001 - of this class
                mine.copy_(new)
        for key, tiles in self._tiles.items():
            tiles.table.copy_(fresh.tiles(*key).table)

    @property
    def form(self) -> tuple[int, ...]:
        """Everything that the grids of launches depend on, and which tiles are kept."""
        return (*super().form, *(number for key in sorted(self._tiles) for number in key))

    @property
    def lacks_tiles(self) -> bool:
        """True if launches have asked for tiles that are not kept."""
        return len(self._tiles) < len(self._wanted)

    def prepare(self) -> None:
        """Cut and keep the tiles that launches have asked for, outside of every graph."""
        for key in sorted(self._wanted - self._tiles.keys()):
            super().tiles(*key)

    def tiles(self, size: int, shortest: int = 1, longest: int | None = None) -> TokenTiles:
        """Cut the segments as :meth:`Segments.tiles` does; what is not kept yet is cut from the slots on the device."""
        key = (size, shortest, self.longest if longest is None else min(longest, self.longest))
        if key in self._tiles:
            return self._tiles[key]
        self._wanted.add(key)
        return Segments(self.slots, self.count).tiles(*key)
