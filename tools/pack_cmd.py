"""``deltafmt pack``."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

from deltafmt.errors import EXIT_OK, UsageError
from deltafmt.tools import console
from deltafmt.tools.calibration_options import add_calibration_arguments, read_calibration
from deltafmt.tools.method_arguments import (
    add_method_argument,
    add_method_flags,
    given_arguments,
    read_method,
    read_rule,
)
from deltafmt.tools.name_arguments import add_architecture_argument, add_name_arguments, name_options
from deltafmt.tools.pack_many import refuse_options, run_many
from deltafmt.tools.pack_report import report
from deltafmt.tools.targets import add_target_arguments, read_target, show

if TYPE_CHECKING:
    from deltafmt.methods import Method

USAGE = """deltafmt pack BASE FINETUNED -o OUT [options]
       deltafmt pack --many BASE FINETUNED... -o FOLDER [options]"""
DESCRIPTION = """\
Pack the difference of two checkpoints into a delta file. For example:

  deltafmt pack base/ math/ -o math.deltafmt --target-ratio 16
  deltafmt pack base/ math/ -o math.deltafmt --method exact
  deltafmt pack --many base/ math/ code/ chat=runs/7/final -o deltas/
"""
EPILOG = """\
A PATTERN matches tensor names as a shell does. A rule's METHOD is a method,
or only key=value,... to change options of the command's method, or whole, which
stores the tensor as it is. The last rule that matches decides:

  --rule '*.mlp.*' nm=2:16,bits=2 --rule '*.attn.*' rtn:bits=3
  --rule lm_head.weight whole

Vectors, tensors that the base lacks or has in another shape, and dtypes other
than BF16, F16 and F32 are stored whole. An interrupted pack goes on if run again.
"""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of at most 100 columns, whose descriptions are printed as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27, width=min(shutil.get_terminal_size().columns, 100))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = Formatter
    parser.usage, parser.description, parser.epilog = USAGE, DESCRIPTION, EPILOG
    parser.add_argument("base", metavar="BASE", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("more", metavar="FINETUNED", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--many", action="store_true", help="pack each into FOLDER/NAME.deltafmt (NAME=PATH)")
    parser.add_argument("-o", "--output", metavar="OUT", help="the delta file to write; - for standard output")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--profile", default="hot", metavar="NAME", help="hot (default) for serving, cold for archives")
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="compress only these; store all others whole"
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="store these tensors whole")
    parser.add_argument(
        "--rule",
        nargs=2,
        action="append",
        default=[],
        metavar=("PATTERN", "METHOD"),
        help="use this method for these tensors; see below",
    )
    add_name_arguments(parser, "the fine-tune")
    add_architecture_argument(parser)
    parser.add_argument("--base-name", metavar="NAME", help="how the delta names its base")
    parser.add_argument("--parent", metavar="DELTA", help="the delta that gives BASE; OUT comes behind it")
    parser.add_argument(
        "--missing",
        metavar="HOW",
        help="what FINETUNED lacks is same (as in BASE) or removed",
    )
    parser.add_argument("--variant", metavar="NAME", help="read the weights of this variant, such as fp16")
    parser.add_argument("--quantized", metavar="HOW", help="read FP8 as values (default), or pack its bytes: exact")
    parser.add_argument(
        "--attach", action="append", default=[], metavar="PATTERN", help="attach these small files, too"
    )
    parser.add_argument(
        "--no-attach",
        action="append",
        default=[],
        metavar="PATTERN",
        help="do not attach these files",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed for random positions (default 0)")
    parser.add_argument("--threads", type=int, metavar="T", help="worker threads (default: one for each processor)")
    add_method_argument(parser)
    parser.add_argument("--exact", action="store_true", help="add exact parts, which restore every byte")
    add_target_arguments(parser)
    add_calibration_arguments(parser)


def add_rare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of any method, which imports all methods; called when an argument is unknown."""
    add_method_flags(parser)


def take_words(options: argparse.Namespace, words: list[str]) -> None:
    """Give words that stand behind an option the places that are left."""
    words = [word for word in (options.base, options.finetuned, *options.more) if word is not None] + words
    options.base, options.finetuned, *options.more = [*words, None, None][: max(len(words), 2)]


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    output = "" if options.plan else options.output
    for name, value in (("BASE", options.base), ("FINETUNED", options.finetuned), ("-o OUT", output)):
        if value is None:
            raise UsageError(f"{name} is missing (see deltafmt pack --help)")
    if options.more and not options.many:
        raise UsageError(
            f"one argument too many: {options.more[0]!r}; --many packs several fine-tunes (see deltafmt pack --help)"
        )
    if options.many:
        refuse_options(options)
    from deltafmt.pipeline.pack import pack

    target = read_target(options, given_arguments(options))
    method = read_method(options)
    rules: list[tuple[str, Method | None]] = [(pattern, read_rule(text, method)) for pattern, text in options.rule]
    reading = [
        each for each in (method, *(ruled for _, ruled in rules)) if each is not None and each.calibration != "none"
    ]
    if options.calibration is not None and not target and not reading:
        raise UsageError(f"method {method.name} reads no calibration text, so {options.calibration} has no effect")
    calibration = read_calibration(options)
    to_stdout = options.output == "-"
    if to_stdout and sys.stdout.isatty():
        raise UsageError("a delta file is not written to a terminal; name a file after -o, or pipe the output on")
    if to_stdout and options.json:
        raise UsageError("--json and -o - both need standard output")
    shared = {
        "rules": rules,
        "include": options.include,
        "exclude": options.exclude,
        **name_options(options),
        "allow_architecture": options.allow_architecture,
        "base_name": options.base_name,
        "missing": options.missing,
        "variant": options.variant,
        "quantized": options.quantized,
        "attach": options.attach,
        "no_attach": options.no_attach,
        "profile": options.profile,
        "seed": options.seed,
        "threads": options.threads,
    }

    if options.many:
        return run_many(options, method, {**shared, "exact": options.exact, "force": options.force})
    shared |= target

    def total() -> int:
        return console.checkpoint_bytes(options.finetuned)

    if options.plan:
        if options.parent:
            raise UsageError("--plan and --parent do not go together: a plan is the same with a parent")
        if options.exact:
            raise UsageError("--plan and --exact do not go together: a plan is the same with exact parts")
        from deltafmt.pipeline.budget import plan_for_target

        if calibration:
            raise UsageError("--plan and --calibration do not go together: a plan is made without reading a text")
        with console.progress_bar("measuring", total, not options.json) as progress:
            choice = plan_for_target(options.base, options.finetuned, **shared, progress=progress)
        show(choice, as_json=options.json)
        return EXIT_OK
    twice = target and calibration and calibration.sequential
    passes = 1 + options.exact + bool(target) + bool(calibration) + bool(twice)
    with console.progress_bar("packing", lambda: passes * total(), not options.json) as progress:
        result = pack(
            options.base,
            options.finetuned,
            sys.stdout.buffer if to_stdout else options.output,
            method=None if target else method,
            **shared,
            parent=options.parent,
            exact=options.exact,
            calibration=calibration,
            force=options.force,
            progress=progress,
        )
    report(result, method, options.finetuned, as_json=options.json)
    return EXIT_OK
