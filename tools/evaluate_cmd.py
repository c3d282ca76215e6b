"""``deltafmt evaluate``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deltafmt.errors import UsageError
from deltafmt.tools import console
from deltafmt.tools.calibration_options import check_tokenizer
from deltafmt.tools.name_arguments import add_name_arguments, name_options

EPILOG = """\
examples:
  deltafmt evaluate base/ math/ math.deltafmt --text questions.jsonl
  deltafmt evaluate base/ math/ small.deltafmt large.deltafmt --text text.txt --html report.html

The fine-tune, its base and the model that each delta gives read the text. Of
JSON lines with prompt and completion, or question and answer, the tokens of the
answer count. Every figure says how close a delta comes to the fine-tune, on
this text; only a test of your task says how good the fine-tune itself is.

Deltas are unpacked one at a time below TMPDIR, which needs room for the
fine-tune. One block of a model is on the device at a time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", help="checkpoint folder")
    parser.add_argument("finetuned", metavar="FINETUNED", help="checkpoint folder of a causal language model")
    parser.add_argument("deltas", metavar="DELTA", nargs="+", help="a delta file of this base; several may be given")
    parser.add_argument("--text", required=True, metavar="FILE", help="plain text, or .jsonl with text or prompts")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder or tokenizer.json (default: FINETUNED)")
    parser.add_argument("--tokens", type=int, metavar="N", help="read about N tokens of the text (default 16384)")
    parser.add_argument("--length", type=int, metavar="L", help="cut sequences at L tokens (default 512)")
    parser.add_argument(
        "--continuations", type=int, metavar="N", help="prompts that the fine-tune continues, 0 for none (default 8)"
    )
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens of a continuation (default 32)")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU if there is one)")
    add_name_arguments(parser, "the delta file")
    parser.add_argument("--html", metavar="REPORT", help="also write a page with charts")
    parser.add_argument("--force", action="store_true", help="replace REPORT if it exists")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.force and not options.html:
        raise UsageError("--force needs --html REPORT, which it replaces")
    if options.html and not options.force and os.path.lexists(options.html):
        raise UsageError(f"{options.html} exists; --force replaces it")
    if Path(options.finetuned).is_dir():
        check_tokenizer(options.finetuned, options.tokenizer)
    from deltafmt.analysis.evaluation import page, tables
    from deltafmt.analysis.evaluation.evaluate import evaluate

    names = ("tokens", "length", "continuations", "new_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with console.count_bar("evaluating", not options.json) as progress:
        found = evaluate(
            options.base,
            options.finetuned,
            options.deltas,
            options.text,
            tokenizer=options.tokenizer,
            device=options.device,
            **given,
            **name_options(options),
            progress=progress,
        )
    if options.html:
        page.write(found, options.html, force=options.force)
    if options.json:
        console.say_json({"ok": True, "report": options.html, **found.to_obj()})
        return
    shown = tables.table(found)
    console.say(shown.note)
    console.table(shown.rows, (False, *shown.right[:1], *shown.right[2:]))
    for name, why in found.left_out.items():
        console.say(f"left out: {name} ({why})")
    if options.html:
        console.say(f"charts: {options.html}")
