"""``deltafmt import-lora``: a LoRA adapter from PEFT to a delta file."""

from __future__ import annotations

import argparse

from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.name_arguments import add_name_arguments, name_options, names_obj, say_names

EPILOG = """\
The factors are stored as they are, except that B is multiplied by the adapter's scaling. DoRA, convolutions and
adapters whose training changed the base's weights are refused. unpack then writes the merged checkpoint, with the
base's configuration and, if the adapter has no tokenizer, the base's tokenizer.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", help="the base: a checkpoint folder or a .safetensors file")
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter: a folder as PEFT saves it")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the delta file to write")
    parser.add_argument(
        "--profile",
        default="hot",
        metavar="NAME",
        help="hot (default): stored as it is uploaded, for serving; cold: compressed, for archives",
    )
    add_name_arguments(parser, "the adapter")
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.import_lora import import_lora

    with console.progress_bar(
        "importing", lambda: console.checkpoint_bytes(options.base), not options.json
    ) as progress:
        result = import_lora(
            options.base,
            options.adapter,
            options.output,
            **name_options(options),
            profile=options.profile,
            force=options.force,
            threads=options.threads,
            progress=progress,
        )
    console.warn_left_out(result.left_out)
    if options.json:
        console.say_json(
            {
                "ok": True,
                "file": str(result.path),
                "bytes": result.size,
                "adapter_bytes": result.adapter_bytes,
                "content_id": result.content_id,
                "ranks": {str(rank): count for rank, count in sorted(result.ranks.items())},
                "replaced": result.replaced,
                "same": result.same,
                "base_name": result.base_name or None,
                "names": names_obj(result.names),
                "left_out": result.left_out,
            }
        )
        return
    console.say(f"{result.path}: {result.size:,} bytes, from an adapter of {result.adapter_bytes:,}")
    parts = [f"{plural(count, 'delta')} of rank {rank}" for rank, count in sorted(result.ranks.items())]
    if result.replaced:
        parts.append(f"{len(result.replaced)} stored whole")
    console.say(", ".join([*parts, f"{result.same} same as the base"]))
    say_names(result.names)
    if result.base_name:
        console.say(f"the adapter names its base {result.base_name}")
