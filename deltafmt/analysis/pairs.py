"""The tensors of a pair of checkpoints: the choice of those to analyze, their kind of layer and depth, their rows."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.format.choices import check_list
from deltafmt.format.constants import DELTA_DTYPES
from deltafmt.pipeline.plan import leading_dimensions
from deltafmt.terms import floats

Floats = NDArray[np.float32]

BLOCK_ELEMENTS = 1 << 21
_EMBEDDING = re.compile(r"embed|wte|wpe|^shared$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a pair in float32, shape (rows, columns); ``first`` is the first row's number."""

    first: int
    base: Floats
    finetuned: Floats
    delta: Floats


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of both checkpoints.

    Attributes:
        name: the tensor's name.
        kind: the kind of the tensor's layer, such as ``q_proj``.
        depth: the number of the tensor's layer; None outside the layers.
        base, finetuned: the tensor in the base and in the fine-tune, on disk.
    """

    name: str
    kind: str
    depth: int | None
    base: Tensor
    finetuned: Tensor

    @property
    def rows(self) -> int:
        """The number of rows that both sides have."""
        return min(self.base.rows, self.finetuned.rows)

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.finetuned.columns

    @property
    def is_matrix(self) -> bool:
        """True if the tensor has two dimensions or more."""
        return len(self.finetuned.shape) >= 2

    @property
    def is_linear(self) -> bool:
        """True if the tensor multiplies a vector of inputs: a matrix whose name is not that of an embedding."""
        return self.is_matrix and not _EMBEDDING.search(self.kind)

    def as_matrix(self, leading: int | None) -> TensorPair:
        """Return the same pair with the rows of so many leading dimensions."""
        return replace(self, base=self.base.as_matrix(leading), finetuned=self.finetuned.as_matrix(leading))

    def rows_of(self, start: int, stop: int) -> Block:
        """Return rows ``start`` to ``stop`` of base, fine-tune and delta.

        Raises:
            NonFiniteError: the delta holds NaN or infinity.
        """
        with self.base.row_range(start, stop) as before, self.finetuned.row_range(start, stop) as after:
            delta, finite = floats.subtract(after, self.finetuned.dtype, before, self.base.dtype)
            if not finite:
                raise NonFiniteError(f'tensor "{self.name}": the delta holds NaN or infinity')
            # float32 rows need no widening, and are copied instead: the mapped pages are given back.
            left, right = (
                np.array(floats.widen(raw, tensor.dtype))
                for raw, tensor in ((before, self.base), (after, self.finetuned))
            )
        return Block(start, left, right, delta)

    def blocks(self) -> Iterator[Block]:
        """Iterate over the rows that both sides have, some megabytes at a time."""
        step = max(BLOCK_ELEMENTS // max(self.columns, 1), 1)
        for start in range(0, self.rows, step):
            yield self.rows_of(start, min(start + step, self.rows))


def find_pairs(
    base: Mapping[str, Tensor], finetuned: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[TensorPair], dict[str, str]]:
    """Return the tensors to analyze, and the reason why each other tensor of the fine-tune is left out.

    Args:
        base: the base's tensors, by the names of the fine-tune's.
        finetuned: the fine-tune.
        include: shell patterns; if given, only tensors whose names match one of them are analyzed.
        exclude: shell patterns; tensors whose names match one of them are left out.

    Raises:
        UsageError: a pattern matches no tensor.
    """
    check_list("include", include)
    check_list("exclude", exclude)
    names = list(finetuned.tensors)
    for pattern in (*include, *exclude):
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"pattern {pattern!r} matches no tensor of {finetuned.path}")
    skipped: dict[str, str] = {}
    chosen: list[tuple[Tensor, Tensor]] = []
    for name, tensor in finetuned.tensors.items():
        other = base.get(name)
        reason = _why_not(tensor, other)
        if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            reason = "not included"
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        if reason or other is None:
            skipped[name] = reason
        else:
            leading = leading_dimensions(tensor.shape)
            chosen.append((other.as_matrix(leading), tensor.as_matrix(leading)))
    kinds = layer_kinds([tensor.name for _, tensor in chosen])
    return [TensorPair(tensor.name, *kinds[tensor.name], other, tensor) for other, tensor in chosen], skipped


def _why_not(tensor: Tensor, base: Tensor | None) -> str:
    if base is None:
        return "not in the base"
    if tensor.dtype not in DELTA_DTYPES:
        return f"dtype {tensor.dtype}"
    if base.dtype not in DELTA_DTYPES:
        return f"the base's dtype {base.dtype}"
    if len(base.shape) != len(tensor.shape) or base.shape[1:] != tensor.shape[1:]:
        return "another shape than the base's"
    if len(tensor.shape) < 2 and base.shape != tensor.shape:
        return "another shape than the base's"
    return "" if tensor.nbytes and base.nbytes else "empty"


def layer_kinds(names: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """Return the kind of layer and the depth that the names of tensors tell.

    The depth is the first part of a name that is a number. The kind of layer is the rest of the name behind it, without
    ``weight`` at the end. Where its last part is unique, the kind is that part alone: ``self_attn.q_proj`` becomes
    ``q_proj``, but ``attention.output.dense`` and ``intermediate.dense`` stay.
    """
    whole: dict[str, tuple[str, int | None]] = {}
    for name in names:
        parts = name.split(".")
        if parts[-1] == "weight" and len(parts) > 1:
            parts.pop()
        place = next((i for i, part in enumerate(parts[:-1]) if _is_number(part)), None)
        tail = parts if place is None else parts[place + 1 :]
        depth = None if place is None else int(parts[place])
        whole[name] = ".".join("*" if _is_number(part) else part for part in tail), depth
    tails: dict[str, set[str]] = {}
    for kind, _ in whole.values():
        tails.setdefault(kind.rpartition(".")[2], set()).add(kind)
    short = {kind: last for last, found in tails.items() for kind in found if len(found) == 1}
    return {name: (short.get(kind, kind), depth) for name, (kind, depth) in whole.items()}


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10
