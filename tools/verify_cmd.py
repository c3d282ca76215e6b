"""``deltafmt verify``."""

from __future__ import annotations

import argparse

from deltafmt.pipeline.summary import plural
from deltafmt.tools import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("delta", metavar="DELTA", help="delta file")
    parser.add_argument("--base", metavar="BASE", help="compare this base with the one that was packed against")
    parser.add_argument("--threads", type=int, metavar="T", help="worker threads (one a processor)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.verify import verify

    result = verify(options.delta, options.base, threads=options.threads)
    if options.json:
        console.say_json(
            {
                "ok": True,
                "file": options.delta,
                "sections": result.sections,
                "tensors": result.tensors,
                "base_tensors": result.base_tensors,
                "content_id": result.content_id,
            }
        )
        return
    base = "" if result.base_tensors is None else f"; {plural(result.base_tensors, 'base tensor')} match"
    console.say(
        f"{options.delta}: ok, {plural(result.tensors, 'tensor')} in {plural(result.sections, 'section')}{base}"
    )
