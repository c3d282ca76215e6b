"""``deltafmt export-lora``: a delta file of low-rank terms to a LoRA adapter for PEFT."""

from __future__ import annotations

import argparse

from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of
from deltafmt.tools.name_arguments import add_name_arguments, name_options

EPILOG = """\
Every term of the delta must be lowrank; several terms of one tensor become one pair of factors with the sum of their
ranks. Coded factors are decoded, so the adapter can be several times larger than the delta; --plan says its size.
Tensors that the delta stores whole become modules_to_save, and so do an embedding that changes and a head that the base
ties to it. The scaling is 1: the product B A is the delta.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("delta", metavar="DELTA", help="the delta file")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="the adapter folder to write")
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="the delta's base: the adapter names it; its config.json is used if none is attached",
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="BF16, F16 or F32 (default: as stored, and F32 for coded factors)"
    )
    parser.add_argument(
        "--task-type", metavar="NAME", help="PEFT's task type (default: that of the imported adapter, or CAUSAL_LM)"
    )
    parser.add_argument(
        "--for",
        dest="reader",
        choices=("vllm",),
        help="write an adapter that vLLM loads: no module is stored whole; norms and biases are left out and named",
    )
    parser.add_argument("--plan", action="store_true", help="say what would be written, and its size; write nothing")
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    add_name_arguments(parser, "the delta", "BASE")
    add_limit_arguments(parser, computes=True)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.export_lora import export_lora

    result = export_lora(
        options.delta,
        options.output,
        base=options.base,
        dtype=options.dtype and options.dtype.upper(),
        task_type=options.task_type,
        **name_options(options),
        reader=options.reader,
        force=options.force,
        plan=options.plan,
        limits=limits_of(options),
    )
    for warning in result.warnings:
        console.warn(f"warning: {warning}")
    if options.json:
        console.say_json(
            {
                "ok": True,
                "folder": str(result.path),
                "written": not options.plan,
                "bytes": result.nbytes,
                "factor_bytes": result.factor_bytes,
                "rank": result.rank,
                "modules": result.modules,
                "target_parameters": result.parameters,
                "modules_to_save": result.saved,
                "task_type": result.task,
                "files": result.files,
                "warnings": result.warnings,
                "tied_embedding": result.tied or None,
                "left_out": result.left_out,
                "max_lora_rank": result.max_lora_rank,
            }
        )
        return
    saved = f", {plural(len(result.saved), 'module')} stored whole" if result.saved else ""
    files = f" and {', '.join(result.files)}" if result.files else ""
    console.say(f"{result.path}: factors of {plural(result.modules, 'module')}, rank {result.rank}{saved}{files}")
    whole = f", {result.nbytes - result.factor_bytes:,} of them stored whole" if result.saved else ""
    console.say(f"{result.nbytes:,} bytes of tensors{whole}{', if it is written' if options.plan else ''}")
    if result.tied:
        console.say(f"{result.tied} changes, and the base ties it to its head: both are stored whole")
    if result.left_out:
        console.say(f"left out, as vLLM loads no vectors: {', '.join(map(_cost, result.left_out.items()))}")
    if result.max_lora_rank:
        console.say(f"vLLM loads it with --enable-lora --max-lora-rank {result.max_lora_rank}")


def _cost(left_out: tuple[str, float | None]) -> str:
    """Return a vector that is left out, with how far it moved."""
    name, share = left_out
    return name if share is None else f"{name} (moved by {share:.2%})"
