"""What a caller of ``pack`` or ``pack_many`` chose, and the job that it gives for one fine-tune."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

from deltafmt.checkpoint.base_name import base_name as folder_name
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.restored import read_heads
from deltafmt.errors import Remedy, UsageError
from deltafmt.format.choices import check_list
from deltafmt.methods.base import Method
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.pipeline.completeness import REMOVED, Completeness
from deltafmt.pipeline.job import PackJob, check_options
from deltafmt.pipeline.pairing import PairOptions
from deltafmt.pipeline.plan import Plan, Rule
from deltafmt.pipeline.prepare import open_pair, prepare
from deltafmt.pipeline.quantized_pairs import EXACT
from deltafmt.pipeline.target import target_metadata


@dataclass(frozen=True, slots=True)
class PackOptions:
    """The arguments of :func:`deltafmt.pack` that decide the bytes of a file, apart from targets and calibrations."""

    method: Method
    rules: Sequence[Rule]
    include: Sequence[str]
    exclude: Sequence[str]
    missing: str | None
    variant: str | None
    attach: Sequence[str]
    no_attach: Sequence[str]
    quantized: str | None
    pair: PairOptions
    base_name: str | None
    profile: str
    seed: int
    exact: bool = False

    @classmethod
    def read(
        cls,
        *,
        method: Method | None = None,
        rules: Sequence[Rule] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        missing: str | None = None,
        variant: str | None = None,
        attach: Sequence[str] = (),
        no_attach: Sequence[str] = (),
        quantized: str | None = None,
        rename: Sequence[str] = (),
        strip_prefix: Sequence[str] = (),
        allow_architecture: bool = False,
        base_name: str | None = None,
        profile: str = "hot",
        seed: int = 0,
        exact: bool = False,
    ) -> Self:
        """Return the options that arguments give; those that are left out are what ``pack`` takes without them.

        Raises:
            UsageError: a value is none that a file can have, or does not go with the method.
        """
        check_options(profile, seed)
        lists = {"rules": rules, "include": include, "exclude": exclude, "attach": attach, "no_attach": no_attach}
        for option, value in lists.items():
            check_list(option, value)
        _check_method(method)
        for rule in rules:
            _check_rule(rule)
        pair = PairOptions.parse(rename, strip_prefix, allow_architecture)
        method = method or DeltaDQ()
        if method.exact:
            # What is there is restored as it is, so nothing is missed.
            quantized, missing = _exact_quantized(quantized), missing or REMOVED
        return cls(
            method,
            rules,
            include,
            exclude,
            missing,
            variant,
            attach,
            no_attach,
            quantized,
            pair,
            base_name,
            profile,
            seed,
            exact,
        )

    def open(
        self, base: str | os.PathLike[str], finetuned: str | os.PathLike[str]
    ) -> AbstractContextManager[tuple[Checkpoint, Checkpoint]]:
        """Open a pair, as :func:`deltafmt.pipeline.prepare.open_pair` does."""
        return open_pair(base, finetuned, self.variant, self.attach, self.no_attach, self.quantized)

    def job(self, before: Checkpoint, after: Checkpoint, target: int | None = None) -> PackJob:
        """Return what is packed of an open pair.

        Args:
            before, after: base and fine-tune.
            target: the bytes that the file may have; the methods are then chosen later. None uses the method.

        Raises:
            UsageError, InvalidFileError, WrongBaseError: as :func:`deltafmt.pack` raises them.
        """
        default = self.method
        description = default.describe() if target is None else target_metadata(target)
        only = default if target is None else None
        prepared = prepare(before, after, only, self.rules, self.include, self.exclude, self.missing, self.pair)
        named = folder_name(before) if self.base_name is None else self.base_name
        plans, pairing, lacks = _in_order(prepared.plans), prepared.pairing, prepared.completeness
        restores = self.exact or (default.exact and target is None and all(plan.is_exact for plan in plans))
        if self.exact:
            _check_progressive(after, plans)
        if restores:
            _check_restorable(after, lacks)
        described = self.profile, self.seed, description, pairing, named, lacks
        job = PackJob(before, after, plans, *described, restores=restores, progressive=self.exact)
        _check_hot(job)
        return job


def _check_rule(rule: object) -> None:
    """Refuse what is no pair of a pattern and a method.

    Raises:
        UsageError: names it.
    """
    if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
        raise UsageError(f"{rule!r} is no rule; give a pattern and a method, or None to store whole")
    _check_method(rule[1])


def _check_method(method: object) -> None:
    """Refuse what is no method, such as its name.

    Raises:
        UsageError: names it.
    """
    if method is not None and not isinstance(method, Method):
        made = "make one, as by Exact()" if isinstance(method, type) else "deltafmt.methods.parse reads a text"
        raise UsageError(f"{method!r} is no method; {made}")


def _exact_quantized(quantized: str | None) -> str:
    """Return how an exact pack reads codes: as the bytes that they are.

    Raises:
        UsageError: they are to be read as values.
    """
    if quantized not in (None, EXACT):
        raise UsageError(f"quantized {quantized!r} and the method exact: values are not the bytes that are stored")
    return EXACT


def _check_progressive(finetuned: Checkpoint, plans: Sequence[Plan]) -> None:
    """Refuse a progressive file that cannot be, before any work is done.

    Raises:
        UsageError: a tensor is exact by itself, or the fine-tune is read as values.
    """
    archived = next((plan for plan in plans if plan.method is not None and plan.method.exact), None)
    if archived is not None:
        raise UsageError(
            f"exact parts go behind what is served, and the method exact leaves nothing of "
            f'"{archived.tensor.name}" to serve; choose another method for it, or leave exact parts out'
        )
    if finetuned.dequantized:
        text = f"{finetuned.path} is FP8 and is read as values, from which its files cannot be restored byte for byte"
        raise UsageError(text, Remedy("quantized", EXACT))


def _in_order(plans: Sequence[Plan]) -> list[Plan]:
    """Return plans in the order of the file: sections of exact tensors lie behind all others (section 5.7)."""
    return sorted(plans, key=lambda plan: plan.in_exact_sections)


def _check_restorable(finetuned: Checkpoint, lacks: Completeness) -> None:
    """Refuse a fine-tune whose files cannot be restored byte for byte, before any work is done.

    Raises:
        UsageError: tensors are to be taken from the base, which no file of the fine-tune has; or tensors of its files
            are left out, because they have no elements.
        InvalidFileError: a file has bytes that belong to no tensor.
    """
    if lacks.empty:
        raise UsageError(
            f'"{lacks.empty[0]}" of {finetuned.path} has no elements and is left out, and the file that has it could '
            "not be restored byte for byte; leave exact parts out, or choose the method exact"
        )
    if lacks.taken:
        raise UsageError(
            f"missing 'same' takes \"{lacks.taken[0]}\" from the base, and restored files have no place for it: it "
            f"would be in no file of {finetuned.path}; leave the files as they are with missing 'removed'"
        )
    read_heads(finetuned)


def _check_hot(job: PackJob) -> None:
    """Refuse a hot file with an index that kernels cannot read.

    Raises:
        UsageError: a method has a rank index.
    """
    if job.profile == "hot" and any(layout.cold_only for plan in job.plans for layout in plan.layouts()):
        text = "a hot file cannot have a rank index, because kernels read the file as it lies"
        raise UsageError(text, Remedy("profile", "cold"))
