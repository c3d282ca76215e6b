"""``deltafmt apply``: a model and a chain of delta files to a checkpoint folder, new or in place."""

from __future__ import annotations

import argparse

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.errors import UsageError
from deltafmt.tools import console
from deltafmt.tools.folder_report import read_obj, say_written, written_obj
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of
from deltafmt.tools.name_arguments import add_name_arguments, name_options

USAGE = "deltafmt apply MODEL DELTA [DELTA ...] (-o DIR | --in-place) [options]\n       deltafmt apply MODEL --recover"
EPILOG = """\
Each DELTA was made on what the one before it gives (pack --parent). Deltas at the beginning of the chain that MODEL
already contains are skipped. With --in-place, however the command ends, MODEL is the old state or the new one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("model", metavar="MODEL", help="what the first delta was made on: a checkpoint folder")
    parser.add_argument("delta", metavar="DELTA", nargs="*", help="the delta files, in their order")
    parser.add_argument("-o", "--output", metavar="DIR", help="the checkpoint folder to write")
    parser.add_argument("--in-place", action="store_true", help="replace the weights in MODEL; its other files stay")
    parser.add_argument(
        "--recover", action="store_true", help="finish, or clear away, what a killed run has left beside MODEL"
    )
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    parser.add_argument("--force", action="store_true", help="replace DIR if it is an earlier checkpoint")
    parser.add_argument(
        "--code",
        choices=("write", "leave"),
        help="write the last delta's Python code, or leave it out (default: write it, but refuse names of modules)",
    )
    add_name_arguments(parser, "the first delta", "MODEL")
    add_limit_arguments(parser, computes=True)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.apply import apply

    if options.force and options.output is None:
        raise UsageError("--force replaces the folder behind -o, and there is none")

    if not options.recover and options.delta and options.in_place == (options.output is not None):
        said = "both are given" if options.in_place else "give one of the two"
        raise UsageError(f"the result goes to a new folder, -o DIR, or in place of the model, --in-place: {said}")

    def total() -> int:
        return console.delta_bytes(options.delta[-1]) if options.delta else 0

    with console.progress_bar("applying", total, not options.json) as progress:
        result = apply(
            options.model,
            options.delta,
            options.output,
            in_place=options.in_place,
            recover=options.recover,
            force=options.force,
            code=options.code,
            **name_options(options),
            threads=options.threads,
            limits=limits_of(options),
            progress=progress,
        )
    if options.json:
        console.say_json(
            {
                "ok": True,
                "folder": str(result.path),
                "applied": result.applied,
                "skipped": result.skipped,
                "recovered": result.recovered,
                **written_obj(result),
                **read_obj(result),
            }
        )
        return
    if result.recovered:
        console.say(f"{result.path}: a run that was killed is finished")
    elif options.recover:
        console.say(f"{result.path}: nothing was left to finish")
    if result.skipped:
        console.say(f"applied already: {bounded(result.skipped)}")
    if not result.applied:
        return
    say_written(result, options.code)
