"""What happens to owners where an index or a mask says which values go where."""

from __future__ import annotations

from typing import Any

import torch

from deltafmt.runtime.follow_moves import same_rule
from deltafmt.runtime.follow_seen import Seen, along, name_of
from deltafmt.runtime.owners import ANY, LOST, Found, Lost, Owners, joined


def _host(value: Any) -> Any:
    """Return arguments on the host, where the owners are."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return type(value)(_host(one) for one in value) if isinstance(value, list | tuple) else value


def index_rule(seen: Seen) -> Found:
    """Follow an index: of rows by values, or of other dimensions."""
    first, indices = seen.first, seen.args["indices"]
    if isinstance(first, Lost):
        return LOST
    places = [place for place, index in enumerate(indices) if index is not None]
    if first is None:  # a table: the indices decide whose the output is
        found = [seen.owners(indices[place]) for place in places]
        if LOST in found or places != list(range(places[0], places[-1] + 1)):
            return LOST
        if any(indices[place].dtype == torch.bool for place in places):
            return None
        shape = torch.broadcast_shapes(*[indices[place].shape for place in places])  # type: ignore[no-untyped-call]
        owners = joined(found, shape)
        if not isinstance(owners, Owners):
            return owners
        before, after = places[0], len(seen.shape) - places[0] - len(shape)
        items = owners.items[(None,) * before][(..., *(None,) * after)].expand(seen.shape)
        return owners.having(items)
    covered, last = set(), 0
    for index in indices:
        width = index.dim() if index is not None and index.dtype == torch.bool else 1
        covered |= set(range(last, last + width)) if index is not None else set()
        last += width
    # What lies behind the indexed dimensions is moved whole: one element of it will do.
    items = first.items
    tail = items.shape[last:]
    dim = first.line()[0]
    thin = dim is None or dim < last
    if thin:
        items = items[(slice(None),) * last + (0,) * len(tail)]
    found_items = items[tuple(slice(None) if index is None else index.cpu() for index in indices)]
    if thin:
        found_items = found_items[(..., *(None,) * len(tail))].expand(seen.shape)
    return first.moved(found_items, routed=dim in covered)


def taken_rule(seen: Seen) -> Found:
    """Take values along a dimension by indices: ``gather``, ``index_select``, ``take_along_dim``."""
    first, index = seen.first, seen.args["index"]
    dim = seen.dim()
    if first is None:
        owners = seen.owners(index)
        if isinstance(owners, Owners) and name_of(seen.func) == "index_select":
            return owners.having(along(owners.line()[1], dim, seen.shape))
        return owners
    if isinstance(first, Lost):
        return LOST
    place = first.line()[0]
    if place == dim or name_of(seen.func) == "gather":
        return first.moved(seen.func(first.items, dim, index.cpu()), routed=place == dim)
    return same_rule(seen)[0]


def sorted_rule(seen: Seen) -> tuple[Found, ...]:
    """Follow values that are put in order along a dimension."""
    first = seen.first
    if not isinstance(first, Owners):
        return (first, first)
    dim = seen.dim(default=-1)
    if first.line()[0] != dim:
        return (_resized(first, seen.shape), _resized(first, seen.shape))
    return (first.moved(first.items.gather(dim, seen.outputs[1].cpu()), routed=True), LOST)


def _resized(owners: Owners, shape: torch.Size) -> Found:
    dim, line = owners.line()
    return owners.having(along(line, 0 if dim is None else dim, shape))


def copied_rule(seen: Seen) -> Found:
    """Give the tensor that is copied to the owners of the one that is copied."""
    source = seen.owners(seen.args["src"])
    return source.spread(seen.shape) if isinstance(source, Owners) else source


def written_rule(seen: Seen) -> Found:
    """Write values along one dimension: ``index_add``, ``index_copy``, ``scatter``."""
    first = seen.first
    value = seen.args.get("src", seen.args.get("source"))
    source = seen.owners(value)
    if source is None or isinstance(first, Lost):
        return first
    if isinstance(source, Lost):
        return LOST
    dim = seen.dim()
    place, line = source.line()
    if place is not None and place != dim:
        whole = source.having(along(line, place, seen.shape)) if seen.shape[place] == len(line) else LOST
        return joined([whole, first], seen.shape)
    if isinstance(first, Owners) and (first.line()[0] not in (dim, None) or first.source != source.source):
        return LOST
    index = seen.args["index"].cpu()
    if index.dim() > 1:
        index = index.select(1 - dim, 0) if index.dim() == 2 and not index.stride(1 - dim) else None
    if index is None:
        return LOST
    line = line.expand(len(index))
    held = torch.full((seen.shape[dim],), ANY, device="cpu")
    if isinstance(first, Owners):
        held = first.line()[1].expand(seen.shape[dim]).clone()
    before = held[index]
    held[index] = line
    if not bool((((before == ANY) | (before == line)) & (held[index] == line)).all()):
        return LOST
    return Owners(along(held, dim, seen.shape), source.source, True, source.rows)


def put_rule(seen: Seen) -> Found:
    """Write values to indexed places, in several dimensions."""
    first, source = seen.first, seen.owners(seen.args["values"])
    if source is None or isinstance(first, Lost):
        return first
    if isinstance(source, Lost):
        return LOST
    held = torch.full((), ANY, device="cpu").expand(seen.shape).clone() if first is None else first.items.clone()
    indices = tuple(slice(None) if index is None else index.cpu() for index in seen.args["indices"])
    held[indices] = source.items
    return source.moved(held, routed=True)


def masked_scatter_rule(seen: Seen) -> Found:
    """Write a list of values to the places of a mask: the images' features to the places that the text has for them."""
    return seen.first if seen.first is not None else LOST


def gathered_rule(seen: Seen) -> Found:
    """Put the tensors of all processes behind each other; the rows are the same in each."""
    first = seen.first
    if not isinstance(first, Owners):
        return first
    count = seen.shape[0] // max(first.items.shape[0], 1)
    return first.moved(first.items.repeat(count, *[1] * (first.items.dim() - 1)))


def summed_rule(seen: Seen) -> tuple[Found, ...]:
    """Add up the tensors of all processes, in place; the rows are the same in each."""
    return tuple(seen.owners(tensor) for tensor in seen.outputs)


def unfilled_rule(seen: Seen) -> Found:
    """Scatter one value: nothing of another row comes in, but the places may be those of rows."""
    if isinstance(seen.args.get("src"), torch.Tensor):
        return written_rule(seen)
    owners = seen.owners(seen.args["index"])
    if seen.first is not None or owners is None:
        return seen.first
    if isinstance(owners, Lost):
        return LOST
    place, line = owners.line()
    if place is None:
        return owners.having(line.view([1] * len(seen.shape)).expand(seen.shape))
    return (
        LOST if place == seen.dim() or len(line) != seen.shape[place] else owners.having(along(line, place, seen.shape))
    )
