"""Where a tensor of a chain comes from: the entries that say it, from the last link down to the base of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltafmt.delta import DeltaFile
from deltafmt.errors import Remedy, UsageError, WrongBaseError
from deltafmt.format.constants import element_count
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry

# What a user does if one delta cannot stand for a chain.
WAY_OUT = "apply the chain, and pack the folder that it gives"


@dataclass(frozen=True, slots=True)
class Step:
    """What one link says of a tensor.

    Attributes:
        link: the number of the link.
        entry: its entry; of a tied tensor, that of its target.
    """

    link: int
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Trail:
    """The steps of a tensor of the last link, the first link's first.

    Attributes:
        steps: the steps; of a tensor that a link stores whole, those from this link on.
        base: what the first step takes from the base of the chain, under the tensor's last name; None if nothing.
    """

    steps: tuple[Step, ...]
    base: BaseRef | None

    @property
    def changes(self) -> tuple[Step, ...]:
        """The steps that may change a bit."""
        return tuple(step for step in self.steps if step.entry.action != "same")


def trail_of(deltas: Sequence[DeltaFile], name: str) -> Trail:
    """Return the trail of a tensor of the last link.

    Raises:
        UsageError: a link is made of several tensors of the one before it, or of values that it gives.
        WrongBaseError: a link says another thing of a tensor than the one before it.
    """
    link = len(deltas) - 1
    steps = [Step(link, deltas[link].resolve(name))]
    while steps[0].entry.base is not None and link > 0:
        entry, base = steps[0].entry, steps[0].entry.base
        link -= 1
        before = _entry_before(deltas, link, entry, base)
        _check_follows(deltas, link, entry, base, before)
        steps.insert(0, Step(link, before))
    first = steps[0].entry
    return Trail(tuple(steps), None if first.base is None else _under(first.base, first.name, name))


def _entry_before(deltas: Sequence[DeltaFile], link: int, entry: TensorEntry, base: BaseRef) -> TensorEntry:
    """Return the entry of the link before an entry's own, which gives the entry's base."""
    source = entry.name
    if base.parts:
        part = base.parts[0]
        source = part.name
        whole = len(base.parts) == 1 and part.start == 0 and source in deltas[link]
        if not whole or deltas[link][source].shape != base.shape:
            raise UsageError(
                f'{deltas[link + 1].container.name}: tensor "{entry.name}" is made of parts of what '
                f"{deltas[link].container.name} gives; {WAY_OUT}"
            )
    if source not in deltas[link]:
        raise WrongBaseError(
            f'{deltas[link + 1].container.name}: tensor "{source}" is not one of those that '
            f"{deltas[link].container.name} gives"
        )
    return deltas[link].resolve(source)


def _check_follows(
    deltas: Sequence[DeltaFile], link: int, entry: TensorEntry, base: BaseRef, before: TensorEntry
) -> None:
    """Check that the base of an entry is what the link before it gives, as far as the files tell."""
    name = deltas[link + 1].container.name
    if (before.dtype, before.shape) != (base.dtype, base.shape):
        raise UsageError(
            f'{name}: tensor "{entry.name}" is read as {base.dtype}, where {deltas[link].container.name} gives '
            f"{before.dtype}; {WAY_OUT}"
        )
    given = before.base.digest if before.action == "same" and before.base is not None else None
    if before.exact is not None:
        given = before.exact.digest
    if given is not None and given != base.digest:
        raise WrongBaseError(f'{name}: tensor "{entry.name}" was not made on what {deltas[link].container.name} gives')


def _under(base: BaseRef, first: str, name: str) -> BaseRef:
    """Return what an entry takes from the base, for an entry of another name."""
    if base.parts:
        own = (BasePart(name, 0, element_count(base.shape)),)
        return replace(base, parts=()) if base.parts == own else base
    return base if first == name else replace(base, parts=(BasePart(first, 0, element_count(base.shape)),))


def is_copied(deltas: Sequence[DeltaFile], name: str, trail: Trail) -> bool:
    """Tell whether one step says all of a tensor; otherwise the tensor is restored and made exact anew.

    Raises:
        UsageError: terms stand behind another change, and what both give has no sum.
    """
    changes = trail.changes
    if len(changes) <= 1:
        # An exact part needs a served part before it, which a chain has not.
        return not any(step.entry.terms and step.entry.exact is not None for step in changes)
    last, other = changes[-1], changes[-2]
    if last.entry.action == "add" and last.entry.exact is None:
        raise UsageError(
            f'tensor "{name}" has terms in {deltas[last.link].container.name} on top of a change in '
            f"{deltas[other.link].container.name}: each rounds by itself, so no sum of terms gives both; {WAY_OUT}"
        )
    return False


def base_is_needed(deltas: Sequence[DeltaFile], name: str, trail: Trail) -> UsageError:
    """Return the error for a tensor that is made exact anew, where no base is given."""
    first, last = trail.changes[0], trail.changes[-1]
    where = f"changes in {deltas[first.link].container.name} and in {deltas[last.link].container.name}"
    if first is last:
        where = f"has terms and an exact part in {deltas[last.link].container.name}"
    return UsageError(
        f'tensor "{name}" {where}, and differences are sorted by the values of the base',
        Remedy("base", None),
    )
