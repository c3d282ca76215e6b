"""What happens to owners where an operation moves, joins or reduces values."""

from __future__ import annotations

import torch

from deltafmt.runtime.follow_seen import Seen, along, tensors_in
from deltafmt.runtime.owners import ANY, LOST, Found, Owners, joined, viewed


def pointwise(seen: Seen) -> Found:
    """Join the inputs, each broadcast to the output."""
    given = tensors_in((seen.positional, seen.named))
    return joined([seen.owners(tensor) for tensor in given], seen.shape)


def moved_rule(seen: Seen) -> Found | tuple[Found, ...]:
    """Run an operation that only moves values on the owners of its first input."""
    first = seen.first
    if not isinstance(first, Owners):
        return first
    found = seen.func(first.items, *seen.positional[1:], **seen.named)
    if isinstance(found, torch.Tensor):
        return first.moved(found)
    return tuple(first.moved(one) for one in found)


def view_rule(seen: Seen) -> Found:
    """Follow another form of the same elements in the same order."""
    first = seen.first
    if isinstance(first, Owners):
        return viewed(first, seen.shape) if seen.outputs[0].numel() else Owners(first.items.new_empty(seen.shape))
    return first


def same_rule(seen: Seen) -> tuple[Found, ...]:
    """Keep the owners where the first output has the form of the first input; further outputs are of no use."""
    first = seen.first
    if isinstance(first, Owners):
        dim, line = first.line()
        shape = seen.shape
        if dim is None:
            first = first.having(line.view([1] * len(shape)).expand(shape))
        elif len(shape) != first.items.dim() or shape[dim] != len(line):
            first = LOST
        else:
            first = first.having(along(line, dim, shape))
    return (first, *[None] * (len(seen.outputs) - 1))


def pairs_rule(seen: Seen) -> Found:
    """Take pairs of numbers for complex ones, or complex ones for pairs: the last dimension goes, or comes."""
    first = seen.first
    if not isinstance(first, Owners):
        return first
    if len(seen.shape) > first.items.dim():
        return first.having(first.items.unsqueeze(-1).expand(seen.shape))
    return LOST if first.line()[0] == first.items.dim() - 1 else first.having(first.items[..., 0])


def over_dim_rule(seen: Seen) -> Found | tuple[Found, ...]:
    """Keep the owners unless the operation works along the dimension in which they differ."""
    first = seen.first
    if isinstance(first, Owners) and first.line()[0] == seen.dim(default=-1):
        return LOST
    return same_rule(seen)


def reduced_rule(seen: Seen) -> Found:
    """Drop dimensions. What is taken over all rows belongs to none of them."""
    first = seen.first
    if not isinstance(first, Owners):
        return first
    if "other" in seen.args:  # the larger of two tensors
        return pointwise(seen)
    dims = seen.args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    dims = [dim % first.items.dim() for dim in dims]
    if first.line()[0] in dims:
        return None
    items = first.items
    for dim in sorted(dims, reverse=True):
        items = items.narrow(dim, 0, 1) if seen.args.get("keepdim") else items.select(dim, 0)
    return first.having(items)


def cat_rule(seen: Seen) -> Found:
    """Follow tensors that are joined along a dimension."""
    tensors = [tensor for tensor in seen.args["tensors"] if tensor.dim() > 1 or tensor.numel()]
    found = [seen.owners(tensor) for tensor in tensors]
    some = next((one for one in found if isinstance(one, Owners)), None)
    if LOST in found or some is None:
        return LOST if LOST in found else None
    if any(isinstance(one, Owners) and one.source != some.source for one in found):
        return LOST
    routed = any(isinstance(one, Owners) and one.routed for one in found)
    dim = int(seen.args.get("dim", 0))
    dim %= tensors[0].dim()
    # A part without owners has those of the other parts, unless they differ along the dimension itself.
    lines = [one.line()[0] if isinstance(one, Owners) else None for one in found]
    constants = {int(one.line()[1][0]) for one in found if isinstance(one, Owners)}
    if dim in lines or (len(constants) > 1 and not any(place is not None for place in lines)):
        if any(place not in (dim, None) for place in lines):
            return LOST
        parts = []
        for one, tensor in zip(found, tensors, strict=True):
            line = one.line()[1] if isinstance(one, Owners) else torch.tensor([ANY], device="cpu")
            parts.append(line.expand(tensor.shape[dim]))
        return Owners(along(torch.cat(parts), dim, seen.shape), some.source, routed or some.routed, some.rows)
    head = [one.having(one.items.narrow(dim, 0, 1)) for one in found if isinstance(one, Owners) and one.items.size(dim)]
    shape = [1 if place == dim else size for place, size in enumerate(seen.shape)]
    both = joined(head, shape)
    return both.spread(seen.shape) if isinstance(both, Owners) else both


def stack_rule(seen: Seen) -> Found:
    """Follow tensors that are joined along a new dimension."""
    tensors = seen.args["tensors"]
    dim = int(seen.args.get("dim", 0)) % (tensors[0].dim() + 1)
    both = joined([seen.owners(tensor) for tensor in tensors], tensors[0].shape)
    return both.having(both.items.unsqueeze(dim).expand(seen.shape)) if isinstance(both, Owners) else both
