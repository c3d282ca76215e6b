"""What operations of torch do to the owners of their inputs; an operation without a rule here loses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from deltafmt.runtime.form_only import NEW_TENSORS
from deltafmt.runtime.owners import ANY, LOST, Found, Lost, Owners, joined, viewed

Rule = Callable[["Seen"], Found | tuple[Found, ...]]

# Operations whose outputs depend on no row: new tensors, and figures of the whole batch.
NO_ROWS: Final = frozenset(
    (
        *NEW_TENSORS,
        *("zero", "fill", "normal", "uniform"),
        *("histc", "bincount", "_local_scalar_dense", "equal", "is_nonzero", "item"),
        *("sym_size", "size", "is_same_size", "_assert_async"),
    )
)


class Seen:
    """One operation, as a rule sees it.

    Attributes:
        args: its arguments by name.
        outputs: the tensors that it returned.
    """

    def __init__(
        self,
        owners: Callable[[torch.Tensor], Found],
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[torch.Tensor],
    ) -> None:
        self.func = func
        self.positional, self.named = args, kwargs
        self.outputs = outputs
        self._owners = owners
        names = [argument.name for argument in func._schema.arguments]  # noqa: SLF001 - torch has no public name for it
        self.args: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}

    @property
    def shape(self) -> torch.Size:
        """The shape of the first output."""
        return self.outputs[0].shape

    def owners(self, value: Any) -> Found:
        """Return the owners of an argument."""
        return self._owners(value) if isinstance(value, torch.Tensor) else None

    @property
    def first(self) -> Found:
        """The owners of the first argument."""
        return self.owners(self.positional[0] if self.positional else next(iter(self.args.values())))

    def dim(self, name: str = "dim", default: int = 0) -> int:
        """Return an argument that names a dimension of the first one, counted from the front."""
        dims: int = self.positional[0].dim()
        return int(self.args.get(name, default)) % max(dims, 1)


def name_of(func: Any) -> str:
    """Return the name of an operation without its overload and without the mark of its form in place."""
    name = str(func._schema.name).rpartition("::")[2]  # noqa: SLF001 - torch has no public name for it
    return name if name.startswith("__") else name.rstrip("_")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors_in(one)]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one)]
    return []


def pointwise(seen: Seen) -> Found:
    """Join the inputs, each broadcast to the output."""
    given = tensors_in((seen.positional, seen.named))
    return joined([seen.owners(tensor) for tensor in given], seen.shape)


def _moved(seen: Seen) -> Found | tuple[Found, ...]:
    """Run an operation that only moves values on the owners of its first input."""
    first = seen.first
    if not isinstance(first, Owners):
        return first
    found = seen.func(first.items, *seen.positional[1:], **seen.named)
    if isinstance(found, torch.Tensor):
        return first.moved(found)
    return tuple(first.moved(one) for one in found)


def _view(seen: Seen) -> Found:
    first = seen.first
    if isinstance(first, Owners):
        return viewed(first, seen.shape) if seen.outputs[0].numel() else Owners(first.items.new_empty(seen.shape))
    return first


def _same(seen: Seen) -> tuple[Found, ...]:
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
            first = first.having(_along(line, dim, shape))
    return (first, *[None] * (len(seen.outputs) - 1))


def _along(line: torch.Tensor, dim: int, shape: torch.Size) -> torch.Tensor:
    return line.view([-1 if place == dim else 1 for place in range(len(shape))]).expand(shape)


def _over_dim(seen: Seen) -> Found | tuple[Found, ...]:
    """Keep the owners unless the operation works along the dimension in which they differ."""
    first = seen.first
    if isinstance(first, Owners) and first.line()[0] == seen.dim(default=-1):
        return LOST
    return _same(seen)


def _reduced(seen: Seen) -> Found:
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


def _cat(seen: Seen) -> Found:
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
            line = one.line()[1] if isinstance(one, Owners) else torch.tensor([ANY])
            parts.append(line.expand(tensor.shape[dim]))
        return Owners(_along(torch.cat(parts), dim, seen.shape), some.source, routed or some.routed, some.rows)
    head = [one.having(one.items.narrow(dim, 0, 1)) for one in found if isinstance(one, Owners) and one.items.size(dim)]
    shape = [1 if place == dim else size for place, size in enumerate(seen.shape)]
    both = joined(head, shape)
    return both.spread(seen.shape) if isinstance(both, Owners) else both


def _stack(seen: Seen) -> Found:
    tensors = seen.args["tensors"]
    dim = int(seen.args.get("dim", 0)) % (tensors[0].dim() + 1)
    both = joined([seen.owners(tensor) for tensor in tensors], tensors[0].shape)
    return both.having(both.items.unsqueeze(dim).expand(seen.shape)) if isinstance(both, Owners) else both


def _product(seen: Seen) -> Found:
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


def _grouped(seen: Seen) -> Found:
    """Multiply consecutive rows of the first matrix with one matrix each."""
    first = seen.first
    if not isinstance(first, Owners) or first.line()[0] == first.items.dim() - 1:
        return LOST
    return (
        LOST if seen.owners(seen.positional[1]) is not None else first.having(first.items[..., :1].expand(seen.shape))
    )


def _linear(seen: Seen) -> Found:
    first = seen.first
    if (
        not isinstance(first, Owners)
        or seen.owners(seen.positional[1]) is not None
        or first.line()[0] == first.items.dim() - 1
    ):
        return LOST
    return first.having(first.items[..., :1].expand(seen.shape))


def _attention(seen: Seen) -> tuple[Found, ...]:
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
            found = found.having(_along(line, 0, seen.shape)) if dim == 0 and len(line) == seen.shape[0] else LOST
    return (found, *[None] * (len(seen.outputs) - 1))


def _convolution(seen: Seen) -> Found:
    first = seen.first
    if not isinstance(first, Owners) or seen.owners(seen.args["weight"]) is not None:
        return LOST
    dim, line = first.line()
    return first.having(_along(line, 0, seen.shape)) if dim in (0, None) else LOST


def _embedding(seen: Seen) -> Found:
    table, ids = seen.owners(seen.args["weight"]), seen.owners(seen.args["indices"])
    if table is not None:
        return LOST
    return ids.having(ids.items.unsqueeze(-1).expand(seen.shape)) if isinstance(ids, Owners) else ids


def _host(value: Any) -> Any:
    """Return arguments on the host, where the owners are."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return type(value)(_host(one) for one in value) if isinstance(value, list | tuple) else value


def _index(seen: Seen) -> Found:
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


def _taken(seen: Seen) -> Found:
    """Take values along a dimension by indices: ``gather``, ``index_select``, ``take_along_dim``."""
    first, index = seen.first, seen.args["index"]
    dim = seen.dim()
    if first is None:
        owners = seen.owners(index)
        if isinstance(owners, Owners) and name_of(seen.func) == "index_select":
            return owners.having(_along(owners.line()[1], dim, seen.shape))
        return owners
    if isinstance(first, Lost):
        return LOST
    place = first.line()[0]
    if place == dim or name_of(seen.func) == "gather":
        return first.moved(seen.func(first.items, dim, index.cpu()), routed=place == dim)
    return _same(seen)[0]


def _sorted(seen: Seen) -> tuple[Found, ...]:
    first = seen.first
    if not isinstance(first, Owners):
        return (first, first)
    dim = seen.dim(default=-1)
    if first.line()[0] != dim:
        return (_resized(first, seen.shape), _resized(first, seen.shape))
    return (first.moved(first.items.gather(dim, seen.outputs[1].cpu()), routed=True), LOST)


def _resized(owners: Owners, shape: torch.Size) -> Found:
    dim, line = owners.line()
    return owners.having(_along(line, 0 if dim is None else dim, shape))


def _copied(seen: Seen) -> Found:
    source = seen.owners(seen.args["src"])
    return source.spread(seen.shape) if isinstance(source, Owners) else source


def _written(seen: Seen) -> Found:
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
        whole = source.having(_along(line, place, seen.shape)) if seen.shape[place] == len(line) else LOST
        return joined([whole, first], seen.shape)
    if isinstance(first, Owners) and (first.line()[0] not in (dim, None) or first.source != source.source):
        return LOST
    index = seen.args["index"].cpu()
    if index.dim() > 1:
        index = index.select(1 - dim, 0) if index.dim() == 2 and not index.stride(1 - dim) else None
    if index is None:
        return LOST
    line = line.expand(len(index))
    held = torch.full((seen.shape[dim],), ANY)
    if isinstance(first, Owners):
        held = first.line()[1].expand(seen.shape[dim]).clone()
    before = held[index]
    held[index] = line
    if not bool((((before == ANY) | (before == line)) & (held[index] == line)).all()):
        return LOST
    return Owners(_along(held, dim, seen.shape), source.source, True, source.rows)


def _put(seen: Seen) -> Found:
    """Write values to indexed places, in several dimensions."""
    first, source = seen.first, seen.owners(seen.args["values"])
    if source is None or isinstance(first, Lost):
        return first
    if isinstance(source, Lost):
        return LOST
    held = torch.full((), ANY).expand(seen.shape).clone() if first is None else first.items.clone()
    indices = tuple(slice(None) if index is None else index.cpu() for index in seen.args["indices"])
    held[indices] = source.items
    return source.moved(held, routed=True)


def _masked_scatter(seen: Seen) -> Found:
    """Write a list of values to the places of a mask: the images' features to the places that the text has for them."""
    return seen.first if seen.first is not None else LOST


def _gathered(seen: Seen) -> Found:
    """Put the tensors of all processes behind each other; the rows are the same in each."""
    first = seen.first
    if not isinstance(first, Owners):
        return first
    count = seen.shape[0] // max(first.items.shape[0], 1)
    return first.moved(first.items.repeat(count, *[1] * (first.items.dim() - 1)))


def _summed(seen: Seen) -> tuple[Found, ...]:
    """Add up the tensors of all processes, in place; the rows are the same in each."""
    return tuple(seen.owners(tensor) for tensor in seen.outputs)


def _unfilled(seen: Seen) -> Found:
    """Scatter one value: nothing of another row comes in, but the places may be those of rows."""
    if isinstance(seen.args.get("src"), torch.Tensor):
        return _written(seen)
    index = seen.args["index"]
    if seen.first is not None or seen.owners(index) is None:
        return seen.first
    return seen.owners(index) if index.shape == seen.shape else LOST


RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), _view),
    **dict.fromkeys(
        (
            *("t", "transpose", "permute", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes"),
            *("chunk", "unbind", "narrow", "expand", "unfold", "repeat", "flip", "roll", "movedim", "tril", "triu"),
            *("diagonal", "rot90", "tile"),
        ),
        _moved,
    ),
    **dict.fromkeys(
        (
            *("_to_copy", "clone", "detach", "alias", "lift_fresh", "lift", "contiguous", "native_dropout", "to"),
            *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
            *("_fused_rms_norm", "rms_norm", "layer_norm", "max_pool2d_with_indices", "avg_pool2d", "constant_pad_nd"),
            *("_adaptive_avg_pool2d", "mean_pool", "upsample_bilinear2d", "upsample_bicubic2d", "avg_pool1d", "glu"),
            *("upsample_nearest2d", "upsample_nearest1d", "_conj", "view_as_real", "view_as_complex", "nan_to_num"),
            *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_fft_r2c", "_fft_c2r", "_fft_c2c"),
            *("all_reduce", "wait_tensor", "_wrap_tensor_autograd"),  # of several processes
        ),
        _same,
    ),
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax"),
        _over_dim,
    ),
    **dict.fromkeys(
        (
            *("sum", "mean", "amax", "amin", "argmax", "argmin", "any", "all", "var", "std", "prod", "var_mean", "max"),
            *("min", "logsumexp", "linalg_vector_norm", "norm", "std_mean"),
        ),
        _reduced,
    ),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"), _product),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
            *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
            *("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
        ),
        _attention,
    ),
    **dict.fromkeys(("gather", "index_select"), _taken),
    **dict.fromkeys(("sort", "topk"), _sorted),
    **dict.fromkeys(("index_add", "index_copy"), _written),
    **dict.fromkeys(("scatter", "scatter_add"), _unfilled),
    "linear": _linear,
    "all_gather_into_tensor": _gathered,
    "allreduce": _summed,
    "_grouped_mm": _grouped,
    "cat": _cat,
    "stack": _stack,
    "convolution": _convolution,
    "embedding": _embedding,
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _put,
    "copy": _copied,
    "masked_scatter": _masked_scatter,
    "floor_divide": pointwise,  # which torch does not call so
}
