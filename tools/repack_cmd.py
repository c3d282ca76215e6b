"""``deltafmt repack``: a delta file rewritten for serving (hot) or for archives (cold), or without exact parts."""

from __future__ import annotations

import argparse

from deltafmt.errors import UsageError
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("delta", metavar="DELTA", help="the delta file to read")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the delta file to write")
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="hot: stored as it is uploaded, for serving; cold: compressed, for archives",
    )
    parser.add_argument(
        "--drop", metavar="exact", help="leave the exact parts of a progressive file out: what is left is served"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_limit_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.repack import repack

    if options.profile is None and options.drop is None:
        raise UsageError("nothing to do: give --profile hot, --profile cold or --drop exact")
    result = repack(
        options.delta,
        options.output,
        profile=options.profile,
        drop=options.drop,
        force=options.force,
        limits=limits_of(options),
    )
    if options.json:
        console.say_json(
            {
                "ok": True,
                "file": str(result.path),
                "bytes": result.size,
                "bytes_before": result.old_size,
                "content_id": result.content_id,
            }
        )
        return
    console.say(f"{result.path}: {result.size:,} bytes, before {result.old_size:,}; content id {result.content_id}")
