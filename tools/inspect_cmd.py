"""``deltafmt inspect``: a delta file's parts and their sizes, read from its index alone."""

from __future__ import annotations

import argparse

from deltafmt.checkpoint.name_changes import entry_changes
from deltafmt.container.reader import Container
from deltafmt.container.served import served_part
from deltafmt.pipeline import summary
from deltafmt.pipeline.read_as_values import dequantized
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of
from deltafmt.tools.name_arguments import say_names
from deltafmt.tools.quantized_arguments import say_dequantized


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("delta", metavar="DELTA", help="the delta file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape, size and action")
    add_limit_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    with Container(options.delta, limits=limits_of(options)) as container:
        if options.json:
            console.say_json({"ok": True, **summary.summary_obj(container)})
        elif options.tensors:
            _print_tensors(container)
        else:
            _print_tree(container)


def _print_tree(container: Container) -> None:
    entries = list(container.entries())
    total = summary.finetuned_bytes(entries)
    tree = summary.cost_tree(container)
    console.say(
        f"{container.name}: {container.size:,} bytes, {container.profile}, "
        f"{summary.times(total / container.size)} than {total:,} bytes of tensors"
    )
    console.say(f"content id {container.content_id.hex()}, which verify checks")
    served = served_part(container, entries)
    if served is not None:
        console.say(summary.served_line(served))
    if container.parent is not None:
        console.say(f"parent: {container.parent.hex()}, whose result is the base")
    for key, value in container.metadata.items():
        console.say(f"{key}: {summary.spelled_out(value) if key == 'method' else value}")
    for text, action in (("same as the base", "same"), ("tied", "alias")):
        found = sum(entry.action == action for entry in entries)
        if found:
            console.say(f"{text}: {plural(found, 'tensor')}")
    say_names(entry_changes(entries))
    say_dequantized(dequantized(container.scaled(), container.metadata))
    if container.removed:
        console.say(summary.left_out_line(container.removed))
    console.say()
    rows: list[list[str]] = []
    _tree_rows(tree, "", "", container.size, rows)
    if not console.can_print("├─└│"):
        plain = str.maketrans("├─└│", "|-`|")
        rows = [[row[0].translate(plain), *row[1:]] for row in rows]
    console.table(rows, (False, True, True, False))


def _tree_rows(node: summary.Node, lead: str, below: str, whole: int, rows: list[list[str]]) -> None:
    rows.append([lead + node.label, f"{node.size:,}", f"{100 * node.size / whole:.2f}%", node.note])
    for i, child in enumerate(node.children):
        last = i == len(node.children) - 1
        _tree_rows(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), whole, rows)


def _print_tensors(container: Container) -> None:
    rows = [["tensor", "dtype", "shape", "bytes", "stored", "how"]]
    for entry in container.entries():
        stored = sum(ref.length for _, ref in entry.refs())
        shape = "x".join(map(str, entry.shape)) or "scalar"
        rows.append([entry.name, entry.dtype, shape, f"{entry.nbytes:,}", f"{stored:,}", summary.describe_entry(entry)])
    console.table(rows, (False, False, False, True, True, False))
