"""The tensor of the base that each tensor of a fine-tune belongs to, where names or layouts differ.

Equal names belong together. Where both sides have layers left, their names are compared in plain spelling, then by
their beginnings, then as joined tensors and members, and at last in the names that transformers uses in memory. What is
found so counts only if it leaves no layer over on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deltafmt.checkpoint.heads import Head
from deltafmt.checkpoint.layouts import Slice
from deltafmt.checkpoint.matching import Library, fits, layers, match_shapes, unique
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.spellings import is_layered, plain_name
from deltafmt.checkpoint.stitched import Run, stitch
from deltafmt.format.constants import DTYPE_BITS, element_count


class Shaped(Protocol):
    """Whatever has a shape: a tensor of a checkpoint, an entry of a delta file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""


@dataclass(slots=True)
class Correspondence:
    """What belongs together.

    Attributes:
        tensors: the base's tensor by the name of the fine-tune's; a tensor without a counterpart is missing.
        found: names among them that were not found by equal names or by the user's rules.
        left: names of the fine-tune's layers that have no counterpart although the base has layers left.
        free: names of the base's layers that nothing took, if ``left`` is not empty.
        heads: beginnings that explain something; where the match is not used, they are what a user may say.
        ambiguous: beginnings that do equally well, in groups.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    heads: list[Head] = field(default_factory=list)
    ambiguous: list[tuple[Head, ...]] = field(default_factory=list)


def correspond(
    wanted: Mapping[str, Shaped],
    base: Mapping[str, Tensor],
    renames: Renames | None = None,
    library: Library | None = None,
) -> Correspondence:
    """Find the base's tensor of every tensor of a fine-tune.

    Args:
        wanted: the fine-tune's tensors by name.
        base: the base's tensors by name.
        renames: what the user says of the names.
        library: gives names as transformers has them in memory; called only where everything else leaves layers over.
    """
    rules = renames or Renames()
    stripped = rules.stripped(base)
    by_name = {name: base[stripped[found]] for name in wanted if (found := rules.apply(name)) in stripped}
    result = Correspondence(dict(by_name))
    taken = {tensor.name for tensor in by_name.values()}
    left = {name: tensor.shape for name, tensor in wanted.items() if name not in by_name}
    free = {name: tensor.shape for name, tensor in base.items() if name not in taken}
    numbered = any(map(is_layered, (*wanted, *base)))
    if not layers(left, numbered=numbered) or not layers(free, numbered=numbered):
        _match_rest(left, free, base, rules, result)
        _match_copies(wanted, base, rules, numbered, result)
        return result
    match = match_shapes(left, free, rules.apply, rules.strip, library, numbered=numbered)
    result.heads, result.ambiguous = match.heads, match.ambiguous
    if match.is_open:
        result.left = layers(match.left, numbered=numbered)
        result.free = layers(match.free, numbered=numbered)
        return result
    for name, slices in match.slices.items():
        made = _stitched(name, left[name], slices, base)
        if made is not None:
            result.tensors[name] = made
            result.found.append(name)
    _match_copies(wanted, base, rules, numbered, result)
    return result


def _match_copies(
    wanted: Mapping[str, Shaped], base: Mapping[str, Tensor], rules: Renames, numbered: bool, result: Correspondence
) -> None:
    """Match layers that are left to tensors of the base that others have taken: a moving average, a frozen copy."""
    left = {name: tensor.shape for name, tensor in wanted.items() if name not in result.tensors}
    if not layers(left, numbered=numbered):
        return
    shapes = {name: tensor.shape for name, tensor in base.items()}
    match = match_shapes(left, shapes, rules.apply, rules.strip, numbered=numbered)
    if layers(match.left, numbered=numbered) or match.ambiguous:
        return
    for name, slices in match.slices.items():
        made = _stitched(name, left[name], slices, base)
        if made is not None:
            result.tensors[name] = made
            result.found.append(name)


def _stitched(name: str, shape: tuple[int, ...], slices: list[Slice], base: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tensor that slices of the base's tensors give, or None if they are of several dtypes."""
    runs = [Run(base[part.name], part.start, part.count) for part in slices]
    if len(runs) == 1 and runs[0].count == element_count(runs[0].tensor.shape):
        return runs[0].tensor if len(runs[0].tensor.shape) == len(shape) else stitch(name, shape, runs)
    dtypes = {run.tensor.dtype for run in runs}
    return stitch(name, shape, runs) if len(dtypes) == 1 and DTYPE_BITS[dtypes.pop()] % 8 == 0 else None


def _match_rest(
    left: Mapping[str, tuple[int, ...]],
    free: Mapping[str, tuple[int, ...]],
    base: Mapping[str, Tensor],
    rules: Renames,
    result: Correspondence,
) -> None:
    """Match what is left outside the layers by plain spelling alone; a head of another name is another head."""
    names = unique((plain_name(rules.strip(name)), name) for name in free)
    for name, shape in left.items():
        other = names.get(plain_name(rules.apply(name)))
        if other is not None and fits(shape, free[other], may_grow=True):
            result.tensors[name] = base[other]
            result.found.append(name)
