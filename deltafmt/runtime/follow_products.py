"""What happens to owners in products: of matrices, in attention, convolutions and look-ups."""

from __future__ import annotations

import torch

from deltafmt.runtime.follow_seen import Seen, along
from deltafmt.runtime.owners import LOST, Found, Lost, Owners, joined


def product_rule(seen: Seen) -> Found:
    """Multiply matrices; rows of the batch may not be summed over."""
    names = [
        name
        for name in ("self", "mat1", "batch1", "mat2", "batch2", "vec", "vec2", "mat_a", "mat_b", "input", "weight")
        if isinstance(seen.args.get(name), torch.Tensor)
    ]
    left, right = (seen.args[name] for name in names[-2:])
    parts: list[Found] = []
    for tensor, summed, kept in ((left, -1, -2), (right, -2 if right.dim() > 1 else -1, -1)):
        owners = seen.owners(tensor)
        if isinstance(owners, Owners):
            place = owners.line()[0]
            if place == tensor.dim() + summed:
                return LOST
            items = owners.items.select(summed, 0)
            if tensor.dim() > 1:
                items = items.unsqueeze(summed if kept == -2 else -2)
            owners = owners.having(items)
        parts.append(owners)
    if len(names) == 3:
        parts.append(seen.owners(seen.args[names[0]]))
    return joined(parts, seen.shape)


def solved_rule(seen: Seen) -> Found:
    """Solve systems of equations, one for each place of the leading dimensions."""
    parts: list[Found] = []
    for found in (seen.owners(seen.positional[0]), seen.owners(seen.positional[1])):
        if isinstance(found, Owners):
            if found.line()[0] in (found.items.dim() - 1, found.items.dim() - 2):
                return LOST
            parts.append(found.having(found.items[..., :1, :1]))
        else:
            parts.append(found)
    return joined(parts, seen.shape)


def grouped_rule(seen: Seen) -> Found:
    """Multiply consecutive rows of the first matrix with one matrix each."""
    first = seen.first
    if not isinstance(first, Owners) or first.line()[0] == first.items.dim() - 1:
        return LOST
    return (
        LOST if seen.owners(seen.positional[1]) is not None else first.having(first.items[..., :1].expand(seen.shape))
    )


def linear_rule(seen: Seen) -> Found:
    """Follow a product with a weight that depends on no row."""
    first = seen.first
    if (
        not isinstance(first, Owners)
        or seen.owners(seen.positional[1]) is not None
        or first.line()[0] == first.items.dim() - 1
    ):
        return LOST
    return first.having(first.items[..., :1].expand(seen.shape))


def attention_rule(seen: Seen) -> tuple[Found, ...]:
    """Attend: the queries decide whose the output is. Keys and values of other rows are masked."""
    query = seen.owners(seen.args["query"])
    others = [seen.owners(seen.args.get(name)) for name in ("key", "value", "attn_mask", "attn_bias", "bias")]
    found: Found
    if LOST in others or isinstance(query, Lost):
        found = LOST
    elif isinstance(query, Owners):
        dim = query.line()[0]
        found = LOST if dim == query.items.dim() - 1 else query.having(query.items[..., :1].expand(seen.shape))
        for other in others:
            if isinstance(other, Owners) and other.line()[0] != dim:
                found = LOST
    else:
        found = next((other for other in others if other is not None), None)
        if isinstance(found, Owners):
            dim, line = found.line()
            found = found.having(along(line, 0, seen.shape)) if dim == 0 and len(line) == seen.shape[0] else LOST
    return (found, *[None] * (len(seen.outputs) - 1))


def convolution_rule(seen: Seen) -> Found:
    """Follow a convolution with a kernel that depends on no row."""
    first = seen.first
    if not isinstance(first, Owners) or seen.owners(seen.args["weight"]) is not None:
        return LOST
    dim, line = first.line()
    return first.having(along(line, 0, seen.shape)) if dim in (0, None) else LOST


def embedding_rule(seen: Seen) -> Found:
    """Follow a look-up in a table: the rows are those of the ids."""
    table, ids = seen.owners(seen.args["weight"]), seen.owners(seen.args["indices"])
    if table is not None:
        return LOST
    return ids.having(ids.items.unsqueeze(-1).expand(seen.shape)) if isinstance(ids, Owners) else ids
