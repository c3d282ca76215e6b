"""``deltafmt analyze``."""

from __future__ import annotations

import argparse
import os

from deltafmt.errors import UsageError
from deltafmt.tools import console

EPILOG = """\
Without --delta, the pair is packed into a temporary file with deltadq and the options --nm and --bits, and what that
loses is shown. Singular values are exact for matrices whose smaller side is at most 1024, and estimated by a
randomized projection beyond. Products and histograms look at up to 256 rows of a matrix. Only one block of rows is in
memory at a time. Without --calibration, the inputs x of the layers are standard normal vectors.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", help="checkpoint folder or .safetensors file")
    parser.add_argument("--delta", metavar="FILE", help="a delta file of this pair, whose losses are shown")
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
    from deltafmt.analysis import analyze, html, tables
    from deltafmt.checkpoint.folder import Checkpoint

    with Checkpoint(options.finetuned) as finetuned:
        total = 2 * finetuned.nbytes
    with console.progress_bar("analyzing", total, not options.json) as progress:
        report = analyze(
            options.base,
            options.finetuned,
            delta=options.delta,
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
