"""``deltafmt pack``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltafmt.errors import UsageError
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console

if TYPE_CHECKING:
    from deltafmt.methods import DeltaDQ, Method
    from deltafmt.pipeline.pack import PackResult

MENTIONED = 10
EPILOG = """\
patterns are shell patterns on tensor names, such as '*.mlp.*'. A rule's OPTIONS are 'exact', or
key=value pairs of nm, bits, share, index, grid, scale and scale_group, joined by commas; what a rule
leaves out is as the command's options say, and the last rule that matches a name decides:

  --rule '*.mlp.*' nm=2:16,bits=2 --rule lm_head.weight exact

Vectors, tensors that the base lacks or has in another shape, and dtypes other than BF16, F16 and F32
are always kept exactly. An interrupted pack goes on where it stopped when the same command is run again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("-o", "--output", metavar="OUT", help="the delta file to make; - for standard output")
    parser.add_argument("--method", default="deltadq", metavar="NAME", help="deltadq, or help for a list")
    parser.add_argument("--nm", default="4:16", metavar="N:M", help="keep N of every M columns (4:16)")
    parser.add_argument("--bits", type=int, default=4, metavar="K", help="bits of a code: 1-6 or 8 (4)")
    parser.add_argument("--share", type=int, default=4, metavar="V", help="rows that share positions: 1, 2, 4, 8 (4)")
    parser.add_argument(
        "--index", default="seeded", metavar="KIND", help="seeded (no index bytes), fixed, or rank (cold files)"
    )
    parser.add_argument("--grid", metavar="KIND", help="midtread or midrise (midrise for 1 and 2 bits)")
    parser.add_argument("--scale", metavar="RULE", help="minmax or mse (mse below 4 bits)")
    parser.add_argument("--scale-group", type=int, default=0, metavar="G", help="kept entries a scale (a whole row)")
    parser.add_argument("--scale-dtype", default="BF16", metavar="DTYPE", help="BF16 or F32 (BF16)")
    parser.add_argument("--no-rescale", action="store_true", help="do not multiply what is kept by M/N")
    parser.add_argument("--profile", default="hot", metavar="NAME", help="hot (mapped and uploaded as it lies) or cold")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random positions (0)")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="compress only these")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="keep these exactly")
    parser.add_argument(
        "--rule", nargs=2, action="append", default=[], metavar=("PATTERN", "OPTIONS"), help="options for some tensors"
    )
    parser.add_argument("--threads", type=int, metavar="T", help="worker threads (one a processor)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.methods import METHODS

    if options.method == "help":
        for name, found in METHODS.items():
            console.say(f"{name}: {found.summary}")
        return
    for name, value in (("BASE", options.base), ("FINETUNED", options.finetuned), ("-o OUT", options.output)):
        if value is None:
            raise UsageError(f"{name} is missing (see deltafmt pack --help)")
    if options.method not in METHODS:
        raise UsageError(f"unknown method {options.method!r}; --method help lists them")
    from deltafmt.checkpoint.folder import Checkpoint
    from deltafmt.pipeline.pack import pack

    method = _method(options)
    rules: list[tuple[str, Method | None]] = [(pattern, _ruled(method, text)) for pattern, text in options.rule]
    to_stdout = options.output == "-"
    if to_stdout and sys.stdout.isatty():
        raise UsageError("a delta file is not written to a terminal; give -o a name, or send it on with a pipe")
    if to_stdout and options.json:
        raise UsageError("--json and -o - both need standard output")
    total = Checkpoint(options.finetuned).nbytes if sys.stderr.isatty() else 0
    with console.progress_bar("packing", total, not options.json) as progress:
        result = pack(
            options.base,
            options.finetuned,
            sys.stdout.buffer if to_stdout else options.output,
            method=method,
            rules=rules,
            include=options.include,
            exclude=options.exclude,
            profile=options.profile,
            seed=options.seed,
            force=options.force,
            threads=options.threads,
            progress=progress,
        )
    _report(options, result)


def _report(options: argparse.Namespace, result: PackResult) -> None:
    for name in result.skipped_files:
        console.warn(f"{name} does not travel with the delta; small files at the top of the folder do")
    if options.json:
        console.say_json(
            {
                "ok": True,
                "file": str(result.path),
                "bytes": result.size,
                "finetuned_bytes": result.finetuned_bytes,
                "ratio": round(result.ratio, 4),
                "content_id": result.content_id,
                "actions": result.actions,
                "kept_exactly": result.kept,
                "in_base_only": result.removed,
                "narrow": result.narrow,
                "resumed_tensors": result.resumed,
            }
        )
        return
    if result.path is None:
        return
    resumed = f" (went on after {plural(result.resumed, 'tensor')})" if result.resumed else ""
    smaller = f"{result.ratio:.2f} times smaller than {options.finetuned}"
    console.say(f"{result.path}: {result.size:,} bytes, {smaller}{resumed}")
    words = {"add": "deltas", "replace": "kept exactly", "same": "same as the base", "alias": "tied"}
    console.say(", ".join(f"{number} {words[action]}" for action, number in sorted(result.actions.items())))
    from deltafmt.pipeline.plan import CHOSEN

    if result.removed:
        console.say(f"in the base only, and left out: {plural(result.removed, 'tensor')}")
    if result.narrow:
        console.say(
            f"note: {plural(result.narrow, 'delta')} of under 256 columns keep less than half of each row at random, "
            "which may cost accuracy; --nm 2:2 keeps everything"
        )
    # What was asked for needs no mention; what was not may surprise.
    surprising = [f"kept exactly: {name} ({reason})" for name, reason in result.kept.items() if reason not in CHOSEN]
    for line in surprising[:MENTIONED]:
        console.say(line)
    if len(surprising) > MENTIONED:
        console.say(f"and {len(surprising) - MENTIONED:,} more matrices kept exactly; inspect --tensors lists them")


def _method(options: argparse.Namespace) -> DeltaDQ:
    from deltafmt.methods import DeltaDQ

    n, m = parse_nm(options.nm)
    return DeltaDQ(
        n,
        m,
        options.bits,
        options.index,
        options.share,
        options.grid,
        options.scale,
        options.scale_group,
        options.scale_dtype,
        not options.no_rescale,
    )


def parse_nm(text: str) -> tuple[int, int]:
    """Return N and M of ``N:M``.

    Raises:
        UsageError: not of that form.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(map(_is_number, parts)):
        raise UsageError(f"{text!r} is not of the form N:M, such as 4:16")
    return int(parts[0]), int(parts[1])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _ruled(method: DeltaDQ, text: str) -> DeltaDQ | None:
    if text == "exact":
        return None
    changes: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"rule {text!r}: {pair!r} is neither 'exact' nor key=value")
        if key == "nm":
            changes["n"], changes["m"] = parse_nm(value)
        elif key in ("bits", "share", "scale_group"):
            if not _is_number(value):
                raise UsageError(f"rule {text!r}: {key} is a number, not {value!r}")
            changes[key] = int(value)
        elif key in ("index", "grid", "scale", "scale_dtype"):
            changes[key] = value
        else:
            raise UsageError(f"rule {text!r}: unknown key {key!r}")
    return replace(method, **changes)
