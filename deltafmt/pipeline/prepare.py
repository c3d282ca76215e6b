"""From two checkpoints to the plans of a pack: is the fine-tune whole, and how is each of its tensors packed."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.checkpoint.travel import AttachRules
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.format.choices import check_choice
from deltafmt.methods.base import Method
from deltafmt.pipeline.completeness import (
    MISSING,
    SAME,
    Bases,
    Completeness,
    check_flattened,
    check_layers,
    check_merged,
    check_partial,
    find_empty,
    find_lacking,
    refuse_lacking,
)
from deltafmt.pipeline.pairing import Pairing, PairOptions, pair_up
from deltafmt.pipeline.plan import Plan, Rule, make_plan
from deltafmt.pipeline.quantized_pairs import read_pair

FROM_BASE = "taken from the base"


@contextlib.contextmanager
def open_pair(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    variant: str | None,
    attach: Sequence[str],
    no_attach: Sequence[str],
    quantized: str | None = None,
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Open the two checkpoints of a pack, decide what travels beside the fine-tune's weights, and how codes are read.

    Raises:
        UsageError: a pattern takes no file, or ``quantized`` says nothing.
        UnsupportedError: a checkpoint's weights are codes that are not read as weights.
        InvalidFileError, StorageError: a checkpoint cannot be read, or a link leaves the fine-tune's folder.
    """
    rules = AttachRules(tuple(attach), tuple(no_attach))
    with (
        Checkpoint(base, variant=variant, lenient=True) as before,
        Checkpoint(finetuned, variant=variant, rules=rules) as after,
    ):
        if not after.path.is_dir() and (attach or no_attach):
            raise UsageError(f"{after.path} is a file, and the patterns choose files of a folder")
        after.decide_travelling()
        read_pair(before, after, quantized)
        yield before, after


@dataclass(frozen=True, slots=True)
class Prepared:
    """The plans of a pack, what belongs together, and what the fine-tune lacks."""

    plans: list[Plan]
    pairing: Pairing
    completeness: Completeness


def prepare(
    base: Checkpoint,
    finetuned: Checkpoint,
    method: Method | None,
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    missing: str | None = None,
    options: PairOptions | None = None,
) -> Prepared:
    """Plan every tensor of a fine-tune, and those that are taken from the base.

    Args:
        base, finetuned, method, rules, include, exclude: as :func:`deltafmt.pipeline.plan.make_plan` takes them.
        missing: what is done with tensors that the fine-tune lacks: ``same`` takes them from the base, ``removed``
            leaves them out; None refuses the fine-tune.
        options: what the user says of the pair's names.

    Raises:
        UsageError, WrongBaseError: as :func:`deltafmt.pipeline.pairing.pair_up` and
            :func:`deltafmt.pipeline.plan.make_plan` raise them; or tensors are to be taken from a base that has other
            names.
        InvalidFileError: the fine-tune is not whole.
    """
    if missing is not None:
        check_choice("missing", missing, MISSING)
    whole = {name for name in finetuned.tensors if _is_chosen(name, method, rules, exclude)}
    empty = _leave_out_empty(base, base.tensors, finetuned, whole, missing)
    if not finetuned.tensors and missing != SAME:
        raise InvalidFileError(f"{finetuned.path}: no tensor is left once those without elements are left out")
    try:
        pairing = pair_up(base, finetuned, options)
    except WrongBaseError as error:
        cause = _in_a_component(base, finetuned)
        raise error if not cause else WrongBaseError(f"{error}; {cause}") from error
    # Those that the base has under other names are only known now.
    late = _leave_out_empty(base, pairing.tensors, finetuned, whole, missing)
    if late:
        left = {name: tensor for name, tensor in pairing.tensors.items() if name in finetuned.tensors}
        pairing = replace(pairing, tensors=left)
    plans = make_plan(base, finetuned, method, rules, include, exclude, pairing)
    check_flattened(pairing.tensors, finetuned, whole)
    check_partial(base, pairing.tensors, finetuned, whole)
    found = find_lacking(base, finetuned, pairing)
    if missing is None:
        refuse_lacking(base, finetuned, found)
    check_merged(pairing.tensors, finetuned, whole)
    found.empty = empty + late
    if missing == SAME:
        _check_names(finetuned, pairing, found)
        found.taken = found.lacking
        taken = [Plan(base.tensors[name], base.tensors[name], None, FROM_BASE) for name in found.taken]
        plans = sorted([*plans, *taken], key=lambda plan: natural_key(plan.tensor.name))
    elif missing is None:
        check_layers(base, finetuned)
    return Prepared(plans, pairing, found)


def _leave_out_empty(
    base: Checkpoint, bases: Bases, finetuned: Checkpoint, whole: Collection[str], missing: str | None
) -> list[str]:
    """Leave tensors that a save has emptied out of the fine-tune, or refuse it; return their names."""
    empty = find_empty(bases, finetuned, whole)
    if empty and missing is None:
        refuse_lacking(base, finetuned, Completeness(empty=empty))
    for name in empty:
        del finetuned.tensors[name]
    return empty


def _check_names(finetuned: Checkpoint, pairing: Pairing, found: Completeness) -> None:
    """Refuse to take tensors from a base with other names: the result would have names of both kinds.

    Raises:
        UsageError: names a tensor that is called otherwise in the base.
    """
    for name, tensor in pairing.tensors.items():
        other = tensor.parts()[0].name
        if found.lacking and other != name and name not in pairing.tied:
            raise UsageError(
                f'missing {SAME!r}: "{found.lacking[0]}" is to be taken from the base, whose names are others: tensor '
                f'"{name}" of {finetuned.path} is "{other}" there; save the fine-tune with the base\'s names'
            )


def _is_chosen(name: str, method: Method | None, rules: Sequence[Rule], exclude: Sequence[str]) -> bool:
    """Tell whether the user has every bit of a tensor kept."""
    ruled = [chosen for pattern, chosen in rules if fnmatch.fnmatchcase(name, pattern)]
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude) or (ruled and ruled[-1] is None):
        return True
    chosen = ruled[-1] if ruled else method
    return chosen is not None and chosen.exact


def _in_a_component(base: Checkpoint, finetuned: Checkpoint) -> str:
    """Return the folder of the base that holds the fine-tune's tensors, if the fine-tune is a component of the base."""
    first = next(iter(finetuned.tensors))
    for component in base.names.components:
        if component and f"{component}/{first}" in base.tensors:
            return f"the base holds it in its folder {component}; give that folder as the base"
    return ""
