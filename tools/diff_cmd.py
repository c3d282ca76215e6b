"""``deltafmt diff``."""

from __future__ import annotations

import argparse

from deltafmt.pipeline.summary import plural
from deltafmt.tools import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("a", metavar="A", help="delta file, or checkpoint folder or .safetensors file")
    parser.add_argument("b", metavar="B", help="another of the same kind")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.diff import diff

    result = diff(options.a, options.b)
    if options.json:
        changes = [change.to_obj() for change in result.changes]
        console.say_json({"ok": True, "same": result.same, "changes": changes})
        return
    rows = []
    for change in result.changes:
        numbers = "" if change.relative is None else f"relative {change.relative:.2e}, largest {change.largest:.2e}"
        rows.append([change.kind, change.name, change.detail, numbers])
    if rows:
        console.table(rows, (False, False, False, False))
    console.say(f"{plural(len(result.changes), 'difference')}, {plural(result.same, 'tensor')} the same")
