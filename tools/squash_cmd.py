"""``deltafmt squash``: a chain of delta files to one delta file that gives the same."""

from __future__ import annotations

import argparse

from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of

EPILOG = """\
A tensor that only one delta changes is copied. A tensor that several deltas change is coded anew as an exact tensor,
for which --base is needed. Lossy terms on top of another change are refused, because each delta rounds by itself.
Apply the chain then, and pack the folder that it gives.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("delta", metavar="DELTA", nargs="+", help="the delta files, in their order")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the delta file to write")
    parser.add_argument("--base", metavar="BASE", help="what the first delta was made on")
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_limit_arguments(parser, computes=True)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.squash import squash

    last = options.delta[-1]
    with console.progress_bar("squashing", lambda: console.delta_bytes(last), not options.json) as progress:
        result = squash(
            options.delta,
            options.output,
            base=options.base,
            force=options.force,
            threads=options.threads,
            limits=limits_of(options),
            progress=progress,
        )
    if options.json:
        console.say_json(
            {
                "ok": True,
                "file": str(result.path),
                "bytes": result.size,
                "bytes_before": result.old_size,
                "content_id": result.content_id,
                "parent": result.parent or None,
                "copied": result.copied,
                "made_anew": result.restored,
            }
        )
        return
    files = plural(len(options.delta), "file")
    console.say(f"{result.path}: {result.size:,} bytes, before {result.old_size:,} in {files}")
    console.say(f"{plural(result.copied, 'tensor')} copied, {len(result.restored):,} made exact anew")
    if result.parent:
        console.say(f"parent: {result.parent}")
