"""Targets of ``deltafmt pack``: reading the options, and showing what is chosen for one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError
from deltafmt.pipeline.summary import WHOLE, plural, times
from deltafmt.tools import console
from deltafmt.tools.byte_sizes import parse_size
from deltafmt.tools.method_arguments import read_spelling

if TYPE_CHECKING:
    from deltafmt.pipeline.choice import Choice, Chosen

NEEDS_TARGET = ("plan", "candidate")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of targets."""
    group = parser.add_argument_group(
        "target", "A target chooses a method for each tensor, by predicting what each would lose."
    )
    group.add_argument("--target-ratio", metavar="R", help="be at least R times smaller than FINETUNED")
    group.add_argument("--target-size", metavar="SIZE", help="take SIZE bytes at most, such as 400MB or 1.5GiB")
    group.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="METHOD",
        help="choose from these, such as rtn:bits=3",
    )
    group.add_argument("--plan", action="store_true", help="print what would be chosen; write no file")


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
        raise UsageError(
            f"{given[0]} and a target: a target chooses the methods; --candidate names what it chooses from"
        )
    return {
        "target_ratio": None if ratio is None else _ratio(ratio),
        "target_size": None if size is None else parse_size(size),
        "candidates": [read_spelling("candidate", text) for text in options.candidate],
    }


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0
    if not 1 < ratio < float("inf"):
        raise UsageError(f"--target-ratio {text!r} is not a number above 1")
    return ratio


def kind_of(name: str) -> str:
    """Return the name that tensors of the same place in all layers share, such as ``q_proj``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def method_name(chosen: Chosen) -> str:
    """Return how a tensor is packed: the spelling of its method, or a few words."""
    plan = chosen.plan
    if plan.alias is not None:
        return f"alias of {plan.alias}"
    if plan.method is not None and chosen.size:
        return plan.method.spelling()
    return WHOLE if chosen.size else "same as the base"


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
    """Print a line for each tensor, then one for each kind of tensor, then the file's."""
    rows = [["tensor", "bytes", "score", "method"]]
    kinds: dict[str, list[Chosen]] = {}
    for chosen in choice.tensors:
        rows.append([chosen.plan.tensor.name, f"{chosen.size:,}", f"{chosen.loss:.4f}", method_name(chosen)])
        kinds.setdefault(kind_of(chosen.plan.tensor.name), []).append(chosen)
    console.table(rows, (False, True, True, False))
    console.say()
    rows = [["kind", "tensors", "bytes", "score"]]
    for kind, members in sorted(kinds.items(), key=lambda each: -sum(chosen.size for chosen in each[1])):
        size, loss = sum(chosen.size for chosen in members), sum(chosen.loss for chosen in members)
        rows.append([kind, str(len(members)), f"{size:,}", f"{loss:.4f}"])
    console.table(rows, (False, True, True, True))
    console.say()
    console.say(score_line(choice))
    console.say(
        f"file: {choice.size:,} bytes of {choice.target:,}, {times(choice.ratio)}, "
        f"{plural(len(choice.tensors), 'tensor')}"
    )


def say_chosen(choice: Choice) -> None:
    """Print which methods were chosen for a target, for how many tensors."""
    methods: dict[str, list[Chosen]] = {}
    for chosen in choice.tensors:
        if chosen.plan.method is not None and chosen.size:
            methods.setdefault(method_name(chosen), []).append(chosen)
    if methods:
        rows = [["chosen method", "tensors", "bytes"]]
        for name, members in sorted(methods.items(), key=lambda each: -sum(chosen.size for chosen in each[1])):
            rows.append([name, f"{len(members):,}", f"{sum(chosen.size for chosen in members):,}"])
        console.table(rows, (False, True, True))
    console.say(score_line(choice))


def score_line(choice: Choice) -> str:
    """Return the score of a plan, and how to read it."""
    return f"score: {choice.loss:.4f} (to compare plans of this pair; lower is better; not an accuracy)"


def show(choice: Choice, *, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        console.say_json({"ok": True, "plan": plan_obj(choice)})
    else:
        print_plan(choice)
