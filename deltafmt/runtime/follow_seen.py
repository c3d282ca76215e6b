"""One operation of torch, as the rules see it that say what becomes of the owners of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from deltafmt.runtime.owners import Found
from deltafmt.runtime.shape_queries import NEW_TENSORS

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


def along(line: torch.Tensor, dim: int, shape: torch.Size) -> torch.Tensor:
    """Return owners that differ along one dimension, expanded to a shape."""
    return line.view([-1 if place == dim else 1 for place in range(len(shape))]).expand(shape)
