"""``deltafmt unpack``: a base and a delta file to a checkpoint folder that loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deltafmt.errors import UsageError
from deltafmt.tools import console
from deltafmt.tools.byte_sizes import parse_size
from deltafmt.tools.folder_report import read_obj, say_written, written_obj
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of
from deltafmt.tools.name_arguments import add_name_arguments, name_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("base", metavar="BASE", help="the base: a checkpoint folder or a .safetensors file")
    parser.add_argument("delta", metavar="DELTA", help="the delta file")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="the checkpoint folder to write")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="start another weight file when one has so many bytes of tensors (default: 5GB, or the files that were "
        "packed where the delta restores them)",
    )
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    parser.add_argument("--force", action="store_true", help="replace DIR if it is an earlier checkpoint")
    parser.add_argument(
        "--force-base",
        action="store_true",
        help="accept a base whose bytes differ from those packed against; the output's metadata records it",
    )
    parser.add_argument(
        "--code",
        choices=("write", "leave"),
        help="write the delta's Python code, or leave it out (default: write it, but refuse names of modules)",
    )
    add_name_arguments(parser, "the delta", "BASE")
    add_limit_arguments(parser, computes=True)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.outputs import is_delta_file
    from deltafmt.pipeline.unpack import unpack

    if Path(options.delta).is_dir() and Path(options.base).is_file() and is_delta_file(Path(options.base)):
        raise UsageError(f"{options.base} is a delta file and {options.delta} a folder; BASE stands before DELTA")
    limit = None if options.max_shard_size is None else parse_size(options.max_shard_size)
    with console.progress_bar("unpacking", lambda: console.delta_bytes(options.delta), not options.json) as progress:
        result = unpack(
            options.base,
            options.delta,
            options.output,
            force=options.force,
            force_base=options.force_base,
            code=options.code,
            **name_options(options),
            max_shard_bytes=limit,
            threads=options.threads,
            limits=limits_of(options),
            progress=progress,
        )
    if result.mismatched:
        console.warn(_other_base(result.mismatched))
    if options.json:
        console.say_json(
            {
                "ok": True,
                "folder": str(result.path),
                **written_obj(result),
                "mismatched": result.mismatched,
                **read_obj(result),
            }
        )
        return
    say_written(result, options.code)


def _other_base(names: Sequence[str]) -> str:
    """Return the warning about base tensors that differ from those packed against."""
    first = f'tensor "{names[0]}"'
    if len(names) == 1:
        return f"warning: {first} of the base differs from the one that was packed against"
    return f"warning: {len(names):,} tensors of the base differ from those packed against, the first is {first}"
