"""The options of ``deltafmt pack`` about a calibration text, and the lines about it in the output."""

from __future__ import annotations

import argparse
from pathlib import Path
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
        "calibration",
        "The fine-tune reads a text first, for methods that need or can use one.",
    )
    group.add_argument("--calibration", metavar="FILE", help="plain text, or .jsonl with text or prompt fields")
    group.add_argument(FIELDS["tokens"], type=int, metavar="N", help="read about N tokens (default 262144)")
    group.add_argument(FIELDS["length"], type=int, metavar="L", help="cut sequences at L tokens (default 2048)")
    group.add_argument(FIELDS["device"], metavar="D", help="cpu or cuda (default: a GPU if there is one)")
    group.add_argument(FIELDS["tokenizer"], metavar="PATH", help="folder or tokenizer.json (default: FINETUNED)")
    group.add_argument(
        FIELDS["sequential"],
        action="store_true",
        default=None,
        help="calibrate blocks on outputs of compressed blocks",
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
        calibration = Calibration(options.calibration, **given)
        check_tokenizer(options.finetuned, options.tokenizer)
        return calibration
    if given:
        raise UsageError(f"{FIELDS[next(iter(given))]} needs --calibration FILE")
    return None


def check_tokenizer(finetuned: str, tokenizer: str | None) -> None:
    """Refuse a fine-tune without a tokenizer before anything is read.

    Raises:
        UsageError: the folder has none of the files of a tokenizer.
    """
    from deltafmt.calibration.tokens import TOKENIZER_FILES

    folder = Path(finetuned if tokenizer is None else tokenizer)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"{folder} has no tokenizer; add --tokenizer PATH, a folder or a tokenizer.json that has one")


def calibration_obj(result: PackResult) -> dict[str, Any]:
    """Return the result of a calibration and the notes of methods, for JSON."""
    obj: dict[str, Any] = {}
    if result.calibration_tokens:
        obj |= {"calibration_tokens": result.calibration_tokens, "uncalibrated": result.uncalibrated}
        obj["sequential"] = result.sequential
    return obj | ({"notes": result.notes} if result.notes else {})


def say_calibration(result: PackResult, mentioned: int) -> None:
    """Print the result of a calibration and the notes of methods; name at most so many tensors each."""
    if result.calibration_tokens:
        how = ", each block on the outputs of the compressed blocks before it" if result.sequential else ""
        console.say(f"calibrated with {result.calibration_tokens:,} tokens{how}")
    for names in (
        [f"not calibrated: {name} (the text gave no second moments of its inputs)" for name in result.uncalibrated],
        [f"note: {name}: {text}" for name, text in result.notes.items()],
    ):
        for line in names[:mentioned]:
            console.say(line)
        if len(names) > mentioned:
            console.say(f"and {len(names) - mentioned:,} more; --json lists them all")
