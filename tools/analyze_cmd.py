"""``deltafmt analyze``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from deltafmt.errors import UsageError
from deltafmt.tools import console

if TYPE_CHECKING:
    from deltafmt.methods import Method

EPILOG = """\
--delta and --method can be given several times, which compares them. --method takes a method's options as pack's rules
do, such as rtn,bits=3 (pack --method help lists them), and packs the pair into a temporary file. With neither, that is
done with deltadq and the options --nm and --bits, which also go for the histograms of the page. Singular values are
exact for matrices whose smaller side is at most 1024, and estimated by a randomized projection beyond. Products and
histograms look at up to 256 rows of a matrix. One block of rows is in memory at a time. Without --calibration, the
inputs x of the layers are standard normal vectors.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", help="checkpoint folder or .safetensors file")
    parser.add_argument(
        "--delta", action="append", default=[], metavar="FILE", help="a delta file of this pair, to see what it loses"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME[,KEY=VALUE]", help="a method, to see what it loses"
    )
    parser.add_argument("--nm", default="4:16", metavar="N:M", help="keep N of every M columns (4:16)")
    parser.add_argument("--bits", type=int, default=4, metavar="K", help="bits of a code, 2 or more (4)")
    parser.add_argument(
        "--calibration", metavar="FILE", help="text or .jsonl that the fine-tune reads for the inputs of its layers"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or folder (FINETUNED)")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="look only at these tensors")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these tensors out")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--html", metavar="REPORT", help="also write a page with plots")
    parser.add_argument("--force", action="store_true", help="replace REPORT if it exists")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.methods.options import parse_nm

    quantization = (*parse_nm(options.nm), options.bits)
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"seed {options.seed} is not in 0 to 4294967295")
    if options.tokenizer and not options.calibration:
        raise UsageError("--tokenizer is for --calibration")
    if options.html and not options.force and os.path.lexists(options.html):
        raise UsageError(f"{options.html} exists; --force replaces it")
    methods = [_method(text) for text in options.method]
    from deltafmt.analysis import analyze, html, tables
    from deltafmt.checkpoint.folder import Checkpoint

    with Checkpoint(options.finetuned) as finetuned:
        total = (1 + max(len(options.delta) + len(methods), 1)) * finetuned.nbytes
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
            seed=options.seed,
            progress=progress,
        )
    if options.html:
        html.write(report, options.html, force=options.force)
    if options.json:
        console.say_json({"ok": True, "report": options.html, **report.to_obj()})
        return
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


def _method(text: str) -> Method:
    from deltafmt.methods import METHODS
    from deltafmt.methods.options import make_method, split_pairs

    name, comma, pairs = text.partition(",")
    try:
        return make_method(METHODS, name, split_pairs(pairs) if comma else {})
    except UsageError as error:
        raise UsageError(f"--method {text}: {error}") from error
