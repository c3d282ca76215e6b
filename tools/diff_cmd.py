"""``deltafmt diff``: the differences between two delta files or two checkpoints, tensor by tensor."""

from __future__ import annotations

import argparse

from deltafmt.errors import EXIT_OK
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of
from deltafmt.tools.name_arguments import add_name_arguments, name_options, names_obj, say_names
from deltafmt.tools.quantized_arguments import add_variant_argument

# The exit code of git diff --exit-code, diff and cmp for inputs that differ.
EXIT_DIFFERENT = 1


EPILOG = """\
Delta files are compared by the digests in their indexes; their bytes are not read. verify tells whether a file is
damaged.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("a", metavar="A", help="a delta file, a checkpoint folder or a .safetensors file")
    parser.add_argument("b", metavar="B", help="another delta file if A is one, otherwise another checkpoint")
    parser.add_argument(
        "--exit-code", action="store_true", help="exit with 1 if A and B differ; without this option, exit with 0"
    )
    add_name_arguments(parser, "B", "A")
    add_variant_argument(parser)
    parser.add_argument("--quantized", metavar="HOW", help="FP8 is read as values (default), or compared exact")
    add_limit_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from deltafmt.pipeline.diff import diff

    result = diff(
        options.a,
        options.b,
        **name_options(options),
        variant=options.variant,
        quantized=options.quantized,
        limits=limits_of(options),
    )
    code = EXIT_DIFFERENT if options.exit_code and result.changes else EXIT_OK
    if options.json:
        changes = [change.to_obj() for change in result.changes]
        console.say_json(
            {
                "ok": True,
                "equal": not changes,
                "same": result.same,
                "changes": changes,
                "names": names_obj(result.names),
            }
        )
        return code
    say_names(result.names)
    rows = []
    for change in result.changes:
        numbers = "" if change.relative is None else f"relative {change.relative:.2e}, largest {change.largest:.2e}"
        rows.append([change.kind, change.name, change.detail, numbers])
    if rows:
        console.table(rows, (False, False, False, False))
    console.say(f"{plural(len(result.changes), 'difference')}, {plural(result.same, 'tensor')} the same")
    return code
