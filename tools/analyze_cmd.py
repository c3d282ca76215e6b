"""``deltafmt analyze``."""

from __future__ import annotations

import argparse
import os

from deltafmt.errors import UsageError
from deltafmt.tools import console
from deltafmt.tools.calibration_options import check_tokenizer
from deltafmt.tools.method_arguments import read_spelling
from deltafmt.tools.name_arguments import add_architecture_argument, add_name_arguments, name_options, say_names
from deltafmt.tools.quantized_arguments import add_variant_argument

NM = "4:16"
BITS = 4
EPILOG = """\
examples:
  deltafmt analyze base/ math/ --delta math.deltafmt
  deltafmt analyze base/ math/ --method deltadq:nm=2:16 --method rtn:bits=2
  deltafmt analyze base/ math/ --calibration text.txt --html report.html

--delta and --method can be given several times; their figures then stand side
by side. For each --method, the pair is packed into a temporary file. Without
--delta and --method, that is done with deltadq and the options --nm and --bits.

The figures describe a delta; they do not rank methods by accuracy. Methods that
keep random elements lose 300% and more of the squares of a delta and still work,
because such errors average out over a row. deltafmt evaluate compares deltas by
what the models that they give predict of a text.

Singular values are exact for matrices whose smaller side is at most 1024, and
estimated by a randomized projection beyond. Products and histograms look at up
to 256 rows of a matrix. One block of rows is in memory at a time. Without
--calibration, the inputs x of the layers are standard normal vectors.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", help="checkpoint folder or .safetensors file")
    parser.add_argument(
        "--delta", action="append", default=[], metavar="FILE", help="measure what this delta file of the pair loses"
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="METHOD",
        help="measure what this method loses: NAME or NAME:key=value,...; deltafmt methods lists them",
    )
    parser.add_argument(
        "--nm", metavar="N:M", help=f"keep N of every M columns in histograms, and in deltadq by default ({NM})"
    )
    parser.add_argument(
        "--bits", type=int, metavar="K", help=f"bits of a code in the same places, 2 or more (default {BITS})"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text or .jsonl that the fine-tune reads for the inputs of its layers"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="folder or tokenizer.json, where FINETUNED has no tokenizer"
    )
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="look only at these tensors")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these tensors out")
    add_name_arguments(parser, "the fine-tune")
    add_architecture_argument(parser)
    add_variant_argument(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed for random inputs (default 0)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--html", metavar="REPORT", help="also write a page with plots")
    parser.add_argument("--force", action="store_true", help="replace REPORT if it exists")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    quantization = _quantization(options)
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"seed {options.seed} is not in 0 to 4294967295")
    if options.tokenizer and not options.calibration:
        raise UsageError("--tokenizer needs --calibration FILE")
    if options.calibration:
        check_tokenizer(options.finetuned, options.tokenizer)
    if options.force and not options.html:
        raise UsageError("--force needs --html REPORT, which it replaces")
    if options.html and not options.force and os.path.lexists(options.html):
        raise UsageError(f"{options.html} exists; --force replaces it")
    methods = [read_spelling("--method", text) for text in options.method]
    from deltafmt.analysis import analyze, html, tables

    passes = 1 + max(len(options.delta) + len(methods), 1)

    def total() -> int:
        return passes * console.checkpoint_bytes(options.finetuned)

    with console.progress_bar("analyzing", total, not options.json) as progress:
        report = analyze(
            options.base,
            options.finetuned,
            deltas=options.delta,
            methods=methods,
            quantization=quantization,
            calibration=options.calibration,
            tokenizer=options.tokenizer,
            include=options.include,
            exclude=options.exclude,
            **name_options(options),
            allow_architecture=options.allow_architecture,
            variant=options.variant,
            seed=options.seed,
            progress=progress,
        )
    if options.html:
        html.write(report, options.html, force=options.force)
    if options.json:
        console.say_json({"ok": True, "report": options.html, **report.to_obj()})
        return
    say_names(report.names)
    shown = [tables.tensor_table(report)] if options.tensors else tables.tables(report)
    for number, table in enumerate(shown):
        if number:
            console.say()
        console.say(table.title)
        console.say(table.note)
        console.table(table.rows, table.right)
    for name, reason in report.skipped.items():
        if reason not in ("excluded", "not included"):
            console.say(f"left out: {name} ({reason})")
    if options.html:
        console.say(f"plots: {options.html}")


def _quantization(options: argparse.Namespace) -> tuple[int, int, int]:
    """Return N, M and k of the histograms, and of deltadq where nothing else is measured.

    Raises:
        UsageError: they are given and shown nowhere.
    """
    from deltafmt.methods.declare import parse_nm

    given = [flag for flag, value in (("--nm", options.nm), ("--bits", options.bits)) if value is not None]
    if given and (options.delta or options.method) and not options.html and not options.json:
        raise UsageError(
            f"{given[0]} beside --delta or --method is for histograms, which --html and --json show; "
            "write --method deltadq:nm=N:M,bits=K for a method"
        )
    return (*parse_nm(options.nm or NM), BITS if options.bits is None else options.bits)
