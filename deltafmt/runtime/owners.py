"""Owners: which item of the caller's input each part of a tensor was computed from.

An item is a row of the batch, or one of the images or patches that were given beside the text. The owners of a tensor
are an int64 tensor of the same shape on the host that differs along one dimension at most; along the others it is
expanded and needs no memory. Operations that only move values (transpose, slice, index) are run on the owners as well,
so that no rule has to repeat what they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch

ANY: Final = -1  # the owner of a value that nobody has written yet


@dataclass(frozen=True, slots=True, eq=False)
class Owners:
    """The owners of a tensor.

    Attributes:
        items: int64, the tensor's shape; the number of the item, or -1 where it may be any.
        source: the number of the input that the items are counted in; 0 for the rows of the batch.
        routed: True if values decided the order (an index, a mask), so that the next call may have another one.
        rows: the row of the batch that each item of another source belongs to.
    """

    items: torch.Tensor
    source: int = 0
    routed: bool = False
    rows: torch.Tensor | None = None

    def by_row(self) -> Owners:
        """Return the same with rows of the batch as items."""
        if self.rows is None:
            return self
        dim, line = self.line()
        rows = torch.where(line == ANY, ANY, self.rows[line])
        return Owners(_expanded(rows, dim or 0, self.items.shape), 0, routed=True)

    def line(self) -> tuple[int | None, torch.Tensor]:
        """Return the dimension along which owners differ, and the owners along it; None if all are the same."""
        for dim in range(self.items.dim()):
            if self.items.size(dim) > 1 and self.items.stride(dim):
                return dim, _along(self.items, dim)
        some = self.items.reshape(-1)[:1]
        return None, some if len(some) else torch.tensor([ANY], device="cpu")

    def having(self, items: torch.Tensor) -> Owners:
        """Return other items of the same source."""
        return Owners(items, self.source, self.routed, self.rows)

    def spread(self, shape: Sequence[int]) -> Owners:
        """Return the owners of a tensor that this one is broadcast to."""
        return self.having(self.items.expand(shape))

    def moved(self, items: torch.Tensor, *, routed: bool = False) -> Found:
        """Return the owners that an operation has moved; they are lost if they differ along several dimensions."""
        found = narrowed(items)
        return LOST if found is None else Owners(found, self.source, self.routed or routed, self.rows)


class Lost(Enum):
    """The owners of a tensor that cannot be told."""

    LOST = "lost"


LOST: Final = Lost.LOST
Found = Owners | Lost | None


def owners_along(shape: Sequence[int], dim: int, items: torch.Tensor, source: int = 0) -> Owners:
    """Return the owners of a tensor that holds one item after the other along a dimension."""
    return Owners(_expanded(items, dim, shape), source)


def narrowed(items: torch.Tensor) -> torch.Tensor | None:
    """Return owners expanded along every dimension but one; None if that is not possible."""
    varying = 0
    for dim in range(items.dim()):
        if items.size(dim) == 0:
            return items
        if items.size(dim) > 1 and items.stride(dim):
            first = items.narrow(dim, 0, 1)
            if bool((items == first).all()):
                items = first.expand(items.shape)
            else:
                varying += 1
    return items if varying <= 1 else None


def viewed(owners: Owners, shape: Sequence[int]) -> Found:
    """Return the owners of a tensor after ``view``, which keeps the order of the elements."""
    dim, line = owners.line()
    if dim is None:
        return owners.having(line[:1].reshape([1] * len(shape)).expand(shape))
    total = math.prod(shape)
    inner = math.prod(owners.items.shape[dim + 1 :])
    for place in range(len(shape)):
        after = math.prod(shape[place + 1 :])
        step = math.gcd(inner, after)
        if shape[place] == 1 or not step:
            continue
        # Elements of one step have the same owner, before and after.
        flat = line[torch.arange(total // step, device="cpu") * step // inner % len(line)]
        held = flat.view(math.prod(shape[:place]), shape[place], after // step)
        if bool((held == held[:1, :, :1]).all()):
            return owners.having(_expanded(held[0, :, 0], place, shape))
    return LOST


def joined(found: Sequence[Found], shape: Sequence[int]) -> Found:
    """Return the owners of a result that is computed from several tensors, each broadcast to its shape.

    They are lost if two have different owners in the same place: the rows of the batch are mixed there.
    """
    result: Owners | None = None
    for one in found:
        if one is None:
            continue
        if isinstance(one, Lost):
            return LOST
        other = one.spread(shape)
        if result is None:
            result = other
            continue
        if other.source != result.source:
            other, result = other.by_row(), result.by_row()
        mine, theirs = result.items, other.items
        for dim in range(len(shape)):  # compare each dimension once where both are expanded
            if shape[dim] > 1 and not mine.stride(dim) and not theirs.stride(dim):
                mine, theirs = mine.narrow(dim, 0, 1), theirs.narrow(dim, 0, 1)
        if not bool(((mine == theirs) | (mine == ANY) | (theirs == ANY)).all()):
            return LOST
        both = narrowed(torch.where(mine == ANY, theirs, mine))
        if both is None:
            return LOST
        result = Owners(both.expand(shape), result.source, result.routed and other.routed, result.rows)
    return result


def in_order(items: torch.Tensor, count: int) -> bool:
    """Tell whether each of ``count`` items has an equal share of the places, one after the other."""
    share, rest = divmod(len(items), count)
    return not rest and bool((items.view(count, share) == torch.arange(count, device="cpu")[:, None]).all())


def _along(items: torch.Tensor, dim: int) -> torch.Tensor:
    for other in range(items.dim() - 1, -1, -1):
        if other != dim:
            items = items.select(other, 0)
    return items


def _expanded(items: torch.Tensor, dim: int, shape: Sequence[int]) -> torch.Tensor:
    return items.view([-1 if place == dim else 1 for place in range(len(shape))]).expand(tuple(shape))
