"""``deltafmt verify``: one or more delta files checked completely, and a base compared with them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.container.reader import Container
from deltafmt.errors import EXIT_OK, DeltafmtError
from deltafmt.pipeline.summary import left_out_line, plural, served_line, served_obj
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of
from deltafmt.tools.name_arguments import add_name_arguments, name_options, names_obj, say_names
from deltafmt.tools.quantized_arguments import say_dequantized

if TYPE_CHECKING:
    from deltafmt.pipeline.verify import VerifyResult

EPILOG = """\
A delta with a parent among the files before it is checked against what these give on BASE.

Every file is checked, also after one that is damaged. The exit code is that of the first file that fails: 3 if the file
is not valid, 4 if the base is not its base, 5 if it cannot be read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("delta", metavar="DELTA", nargs="+", help="a delta file; several may be given")
    parser.add_argument("--base", metavar="BASE", help="check that this is the base that the delta was packed against")
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    add_name_arguments(parser, "the delta", "BASE")
    add_limit_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    options.limits = limits_of(options)
    before = links_before(options.delta) if options.base and len(options.delta) > 1 else {}
    if len(options.delta) == 1:
        found = _check(options.delta[0], [], options)
        if options.json:
            console.say_json(found)
        return EXIT_OK
    code = EXIT_OK
    results = []
    for file in options.delta:
        try:
            results.append(_check(file, before.get(file, []), options))
        except DeltafmtError as error:
            code = code or error.exit_code
            console.warn(str(error))
            results.append({"ok": False, "file": file, "error": str(error), "exit_code": error.exit_code})
    if options.json:
        console.say_json({"ok": code == EXIT_OK, "files": results})
    return code


def _check(file: str, before: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Check one file and return its object for JSON; without ``--json``, say that it is intact."""
    from deltafmt.pipeline.verify import verify

    with console.progress_bar("verifying", lambda: console.delta_bytes(file), not options.json) as progress:
        result = verify(
            file,
            options.base,
            before=before,
            **name_options(options),
            threads=options.threads,
            limits=options.limits,
            progress=progress,
        )
    if not options.json:
        console.say(f"{file}: {describe(result, before)}")
        if result.restored:
            console.say(f"restored byte for byte with this base: {bounded(result.restored)}")
        if result.served is not None:
            console.say(served_line(result.served))
        say_names(result.names)
        say_dequantized(result.dequantized)
        if result.removed:
            console.say(left_out_line(result.removed))
    return {
        "ok": True,
        "file": file,
        "sections": result.sections,
        "tensors": result.tensors,
        "base_tensors": result.base_tensors,
        "before": before,
        "content_id": result.content_id,
        "removed": list(result.removed),
        "attached": list(result.attached),
        "restored_files": list(result.restored),
        "served": served_obj(result.served),
        "names": names_obj(result.names),
        "dequantized": result.dequantized.to_obj(),
    }


def links_before(files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of a chain that come before each file, where they are given before it; files that fail, none."""
    known: dict[bytes, str] = {}
    found: dict[str, list[str]] = {}
    for file in files:
        # What is wrong with a file is said when it is checked.
        with contextlib.suppress(DeltafmtError), Container(file) as container:
            parent = known.get(container.parent or b"")
            if parent is not None:
                found[file] = [*found.get(parent, []), parent]
            known[container.content_id] = file
    return found


def describe(result: VerifyResult, before: Sequence[str] = ()) -> str:
    """Return in words that a file is intact, and whether the base was compared with it."""
    intact = f"file intact, {plural(result.tensors, 'tensor')} in {plural(result.sections, 'section')}"
    if result.base_tensors is None:
        return intact
    if result.base_tensors == 0:
        return f"{intact}; it holds every tensor whole, so any base fits"
    of_what = f"what {before[-1]} gives on this base" if before else "this base"
    return f"{intact}; made for {of_what} ({plural(result.base_tensors, 'tensor')} compared)"
