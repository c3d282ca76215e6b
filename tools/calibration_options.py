"""The options of ``deltafmt pack`` about a calibration text, and what it says of one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError
from deltafmt.tools import console

if TYPE_CHECKING:
    from deltafmt.pipeline.calibrate import Calibration
    from deltafmt.pipeline.pack_result import PackResult

# Options by the fields of a calibration.
FIELDS = {
    "tokens": "--calibration-tokens",
    "length": "--calibration-length",
    "device": "--calibration-device",
    "tokenizer": "--tokenizer",
    "sequential": "--sequential",
}


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group(
        "calibration", "The fine-tune reads a text first, for the methods gptq and sparsegpt and those that can use it."
    )
    group.add_argument("--calibration", metavar="FILE", help="text, or .jsonl with text, prompt or question a line")
    group.add_argument(FIELDS["tokens"], type=int, metavar="N", help="tokens to read, about (262144)")
    group.add_argument(FIELDS["length"], type=int, metavar="L", help="tokens of the longest sequence (2048)")
    group.add_argument(FIELDS["device"], metavar="NAME", help="cpu or cuda (a GPU if there is one)")
    group.add_argument(FIELDS["tokenizer"], metavar="PATH", help="folder or tokenizer.json, if FINETUNED has none")
    group.add_argument(
        FIELDS["sequential"],
        action="store_true",
        default=None,
        help="each block reads what those before it give as they will be stored, errors and all",
    )


def read_calibration(options: argparse.Namespace) -> Calibration | None:
    """Return the calibration that the options describe, None for none.

    Raises:
        UsageError: an option is out of range, or there is no text for it.
    """
    from deltafmt.pipeline.calibrate import Calibration

    names = {field: flag.removeprefix("--").replace("-", "_") for field, flag in FIELDS.items()}
    given = {field: getattr(options, name) for field, name in names.items() if getattr(options, name) is not None}
    if options.calibration is not None:
        return Calibration(options.calibration, **given)
    if given:
        raise UsageError(f"{FIELDS[next(iter(given))]} is for --calibration")
    return None


def calibration_obj(result: PackResult) -> dict[str, Any]:
    """Return what there is to say of a calibration and of the method's notes, for JSON."""
    obj: dict[str, Any] = {}
    if result.calibration_tokens:
        obj |= {"calibration_tokens": result.calibration_tokens, "uncalibrated": result.uncalibrated}
        obj["sequential"] = result.sequential
    return obj | ({"notes": result.notes} if result.notes else {})


def say_calibration(result: PackResult, mentioned: int) -> None:
    """Print what there is to say of a calibration and of the method's notes; of so many tensors by name."""
    if result.calibration_tokens:
        how = ", each block seeing the errors of those before it" if result.sequential else ""
        console.say(f"calibrated with {result.calibration_tokens:,} tokens{how}")
    for names in (
        [f"not calibrated: {name} (no second moments of its inputs alone)" for name in result.uncalibrated],
        [f"note: {name}: {text}" for name, text in result.notes.items()],
    ):
        for line in names[:mentioned]:
            console.say(line)
        if len(names) > mentioned:
            console.say(f"and {len(names) - mentioned:,} more of these; --json lists them")
