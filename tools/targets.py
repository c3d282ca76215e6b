"""Targets of ``deltafmt pack``: reading the options, and showing what is chosen for one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.unpack_cmd import parse_size

if TYPE_CHECKING:
    from deltafmt.methods import Method
    from deltafmt.pipeline.choice import Choice, Chosen

NEEDS_TARGET = ("plan", "candidate")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of targets."""
    group = parser.add_argument_group("a target: a method is chosen for every tensor")
    group.add_argument("--target-ratio", metavar="R", help="make the file at least R times smaller than the fine-tune")
    group.add_argument("--target-size", metavar="SIZE", help="make it SIZE bytes at most, such as 400MB or 1.5GiB")
    group.add_argument(
        "--candidate", action="append", default=[], metavar="OPTIONS", help="choose from these, not from the usual ones"
    )
    group.add_argument("--plan", action="store_true", help="print what would be chosen, and pack nothing")


def read_target(options: argparse.Namespace, given: list[str]) -> dict[str, Any]:
    """Return the arguments of ``pack`` and ``plan_for_target`` that the options describe; none without a target.

    Args:
        options: of the command line.
        given: options that say how everything is packed, as the user knows them.

    Raises:
        UsageError: an option does not fit, or not with the others.
    """
    ratio, size = options.target_ratio, options.target_size
    if ratio is None and size is None:
        for name in NEEDS_TARGET:
            if getattr(options, name):
                raise UsageError(f"--{name} needs --target-ratio or --target-size")
        return {}
    if ratio is not None and size is not None:
        raise UsageError(f"--target-ratio {ratio} and --target-size {size}: one of them decides")
    if given:
        raise UsageError(f"{given[0]} and a target: a target chooses the methods; --candidate says what from")
    return {
        "target_ratio": None if ratio is None else _ratio(ratio),
        "target_size": None if size is None else parse_size(size),
        "candidates": [_candidate(text) for text in options.candidate],
    }


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0
    if not 1 < ratio < float("inf"):
        raise UsageError(f"--target-ratio {text!r} is not a number above 1")
    return ratio


def _candidate(text: str) -> Method:
    from deltafmt.methods import METHODS
    from deltafmt.methods.options import make_method, split_pairs

    try:
        pairs = split_pairs(text)
        return make_method(METHODS, pairs.pop("method", "deltadq"), pairs)
    except UsageError as error:
        raise UsageError(f"candidate {text!r}: {error}") from error


def kind_of(name: str) -> str:
    """Return what tensors of the same place in other layers are called alike: the last part of the name that tells."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def method_name(chosen: Chosen) -> str:
    """Return how a tensor is packed, in a few words."""
    plan = chosen.plan
    if plan.alias is not None:
        return f"alias of {plan.alias}"
    if plan.method is not None and chosen.size:
        return plan.method.describe()
    return "exact" if chosen.size else "same as the base"


def plan_obj(choice: Choice) -> dict[str, Any]:
    """Return a plan as a plain object."""
    return {
        "target_bytes": choice.target,
        "bytes": choice.size,
        "finetuned_bytes": choice.finetuned_bytes,
        "ratio": round(choice.ratio, 4),
        "loss": choice.loss,
        "tensors": {
            chosen.plan.tensor.name: {"method": method_name(chosen), "bytes": chosen.size, "loss": chosen.loss}
            for chosen in choice.tensors
        },
    }


def print_plan(choice: Choice) -> None:
    """Print a line a tensor, then one a kind of tensor, then the file's."""
    rows = [["tensor", "bytes", "loss", "method"]]
    kinds: dict[str, list[Chosen]] = {}
    for chosen in choice.tensors:
        rows.append([chosen.plan.tensor.name, f"{chosen.size:,}", f"{chosen.loss:.4f}", method_name(chosen)])
        kinds.setdefault(kind_of(chosen.plan.tensor.name), []).append(chosen)
    console.table(rows, (False, True, True, False))
    console.say()
    rows = [["kind", "tensors", "bytes", "loss"]]
    for kind, members in sorted(kinds.items(), key=lambda each: -sum(chosen.size for chosen in each[1])):
        size, loss = sum(chosen.size for chosen in members), sum(chosen.loss for chosen in members)
        rows.append([kind, str(len(members)), f"{size:,}", f"{loss:.4f}"])
    console.table(rows, (False, True, True, True))
    console.say()
    console.say(
        f"file: {choice.size:,} bytes of {choice.target:,}, {choice.ratio:.2f} times smaller, "
        f"{plural(len(choice.tensors), 'tensor')}, predicted loss {choice.loss:.4f}"
    )


def show(choice: Choice, *, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        console.say_json({"ok": True, "plan": plan_obj(choice)})
    else:
        print_plan(choice)
