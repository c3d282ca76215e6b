"""``deltafmt import-lora``: a LoRA adapter from PEFT to a delta file."""

from __future__ import annotations

import argparse
import json

from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.name_arguments import add_name_arguments, name_options, names_obj, say_names
from deltafmt.tools.quantized_arguments import add_variant_argument, say_dequantized

EPILOG = """\
The factors are stored as they are, except that B is multiplied by the adapter's scaling. What is not of low rank (DoRA,
convolutions, a head that the base ties to its embedding) is stored whole, as PEFT computes it. Adapters whose training
changed the base's weights are refused. unpack then writes the merged checkpoint, with the base's configuration and, if
the adapter has no tokenizer, the base's tokenizer.
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
    add_variant_argument(parser)
    parser.add_argument(
        "--method",
        metavar="METHOD",
        help="compress what is not of low rank, such as DoRA's tensors: NAME or NAME:key=value,... as for pack "
        "(default: store it whole)",
    )
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.import_lora import import_lora
    from deltafmt.tools.method_arguments import read_spelling

    method = None if options.method is None else read_spelling("--method", options.method)
    with console.progress_bar(
        "importing", lambda: console.checkpoint_bytes(options.base), not options.json
    ) as progress:
        result = import_lora(
            options.base,
            options.adapter,
            options.output,
            **name_options(options),
            variant=options.variant,
            profile=options.profile,
            force=options.force,
            threads=options.threads,
            progress=progress,
            method=method,
        )
    console.warn_left_out(result.left_out)
    for warning in result.warnings:
        console.warn(f"warning: {warning}")
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
                "computed": result.computed,
                "compressed": result.compressed,
                "grown": result.grown,
                "untied": result.untied,
                "config": result.config,
                "warnings": result.warnings,
                "same": result.same,
                "base_name": result.base_name or None,
                "names": names_obj(result.names),
                "dequantized": result.dequantized.to_obj(),
                "left_out": result.left_out,
            }
        )
        return
    console.say(f"{result.path}: {result.size:,} bytes, from an adapter of {result.adapter_bytes:,}")
    parts = [f"{plural(count, 'delta')} of rank {rank}" for rank, count in sorted(result.ranks.items())]
    if result.replaced:
        parts.append(f"{len(result.replaced)} stored whole")
    if result.compressed:
        parts.append(f"{len(result.compressed)} compressed by {options.method}")
    if result.grown:
        parts.append(f"{len(result.grown)} with more rows than the base")
    console.say(", ".join([*parts, f"{result.same} same as the base"]))
    say_names(result.names)
    say_dequantized(result.dequantized)
    if result.config:
        changed = ", ".join(f"{key}: {json.dumps(value)}" for key, value in result.config.items())
        console.say(f"config.json gets {changed}")
    if result.base_name:
        console.say(f"the adapter names its base {result.base_name}")
