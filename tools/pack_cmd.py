"""``deltafmt pack``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from deltafmt.errors import UsageError
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.calibration_options import (
    add_calibration_arguments,
    calibration_obj,
    read_calibration,
    say_calibration,
)
from deltafmt.tools.targets import add_target_arguments, plan_obj, read_target, show

if TYPE_CHECKING:
    from deltafmt.methods import Method
    from deltafmt.pipeline.pack_result import PackResult

MENTIONED = 10
PREFIX = "method_option_"
EPILOG = """\
patterns are shell patterns on tensor names, such as '*.mlp.*'. A rule's OPTIONS are 'exact', or
key=value pairs joined by commas: method=NAME, and options of that method (--method help lists them).
What a rule leaves out is as the command's options say, or, if the rule names another method, as that
method has it. The last rule that matches a name decides:

  --rule '*.mlp.*' nm=2:16,bits=2 --rule '*.attn.*' method=rtn,bits=3 --rule lm_head.weight exact

Vectors, tensors that the base lacks or has in another shape, and dtypes other than BF16, F16 and F32
are always kept exactly. An interrupted pack goes on where it stopped when the same command is run again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    # Packing has a thread for each processor. Threads of the linear algebra library beside them wait for one another in
    # busy loops: low-rank methods then take up to twenty times as long. It reads this when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("-o", "--output", metavar="OUT", help="the delta file to make; - for standard output")
    parser.add_argument("--method", metavar="NAME", help="deltadq, or help for a list (deltadq)")
    parser.add_argument("--profile", default="hot", metavar="NAME", help="hot (mapped and uploaded as it lies) or cold")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random positions (0)")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="compress only these")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="keep these exactly")
    parser.add_argument(
        "--rule", nargs=2, action="append", default=[], metavar=("PATTERN", "OPTIONS"), help="options for some tensors"
    )
    parser.add_argument("--threads", type=int, metavar="T", help="worker threads (one a processor)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_calibration_arguments(parser)
    add_target_arguments(parser)
    _add_method_options(parser)


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all methods; which of them the chosen one has is seen when it is made."""
    from deltafmt.methods import METHODS
    from deltafmt.methods.options import Option, options_of

    group = parser.add_argument_group("options of the methods")
    known: dict[str, list[tuple[str, Option]]] = {}
    for name, method in METHODS.items():
        for key, each in options_of(method).items():
            known.setdefault(key, []).append((name, each))
    for key, owners in known.items():
        flag, each = f"--{key.replace('_', '-')}", owners[0][1]
        texts: dict[str, list[str]] = {}
        for name, other in owners:
            texts.setdefault(other.help, []).append(name)
        shown = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items()).replace("%", "%%")
        target = PREFIX + key
        if each.is_switch:
            switch = argparse.BooleanOptionalAction
            group.add_argument(flag, dest=target, action=switch, default=argparse.SUPPRESS, help=shown)
        else:
            group.add_argument(flag, dest=target, metavar=each.metavar, default=argparse.SUPPRESS, help=shown)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.method == "help":
        _list_methods()
        return
    output = "" if options.plan else options.output
    for name, value in (("BASE", options.base), ("FINETUNED", options.finetuned), ("-o OUT", output)):
        if value is None:
            raise UsageError(f"{name} is missing (see deltafmt pack --help)")
    from deltafmt.checkpoint.folder import Checkpoint
    from deltafmt.pipeline.budget import plan_for_target
    from deltafmt.pipeline.pack import pack

    target = read_target(options, _given(options))
    method = _method(options)
    calibration = read_calibration(options)
    rules: list[tuple[str, Method | None]] = [(pattern, _ruled(method, text)) for pattern, text in options.rule]
    to_stdout = options.output == "-"
    if to_stdout and sys.stdout.isatty():
        raise UsageError("a delta file is not written to a terminal; give -o a name, or send it on with a pipe")
    if to_stdout and options.json:
        raise UsageError("--json and -o - both need standard output")
    total = Checkpoint(options.finetuned).nbytes if sys.stderr.isatty() else 0
    shared = {
        **target,
        "rules": rules,
        "include": options.include,
        "exclude": options.exclude,
        "profile": options.profile,
        "seed": options.seed,
        "threads": options.threads,
    }
    if options.plan:
        if calibration:
            raise UsageError("--plan and --calibration: a plan is printed without reading a text")
        with console.progress_bar("measuring", total, not options.json) as progress:
            choice = plan_for_target(options.base, options.finetuned, **shared, progress=progress)
        show(choice, as_json=options.json)
        return
    passes = 1 + bool(target) + bool(calibration) + bool(target and calibration and calibration.sequential)
    with console.progress_bar("packing", passes * total, not options.json) as progress:
        result = pack(
            options.base,
            options.finetuned,
            sys.stdout.buffer if to_stdout else options.output,
            method=None if target else method,
            **shared,
            calibration=calibration,
            force=options.force,
            progress=progress,
        )
    _report(options, result)


def _report(options: argparse.Namespace, result: PackResult) -> None:
    console.warn_left_out(result.skipped_files)
    if options.json:
        console.say_json(
            {
                "ok": True,
                "file": str(result.path),
                "bytes": result.size,
                "finetuned_bytes": result.finetuned_bytes,
                "ratio": round(result.ratio, 4),
                "content_id": result.content_id,
                "actions": result.actions,
                "kept_exactly": result.kept,
                "in_base_only": result.removed,
                "narrow": result.narrow,
                "resumed_tensors": result.resumed,
                **calibration_obj(result),
                **({"plan": plan_obj(result.choice)} if result.choice else {}),
            }
        )
        return
    if result.path is None:
        return
    resumed = f" (went on after {plural(result.resumed, 'tensor')})" if result.resumed else ""
    smaller = f"{result.ratio:.2f} times smaller than {options.finetuned}"
    console.say(f"{result.path}: {result.size:,} bytes, {smaller}{resumed}")
    words = {"add": "deltas", "replace": "kept exactly", "same": "same as the base", "alias": "tied"}
    console.say(", ".join(f"{number} {words[action]}" for action, number in sorted(result.actions.items())))
    from deltafmt.pipeline.plan import CHOSEN

    if result.removed:
        console.say(f"in the base only, and left out: {plural(result.removed, 'tensor')}")
    if result.narrow:
        console.say(
            f"note: {plural(result.narrow, 'delta')} of under 256 columns keep less than half of each row at random, "
            "which may cost accuracy; --nm 2:2 keeps everything"
        )
    say_calibration(result, MENTIONED)
    # What was asked for needs no mention; what was not may surprise.
    surprising = [f"kept exactly: {name} ({reason})" for name, reason in result.kept.items() if reason not in CHOSEN]
    for line in surprising[:MENTIONED]:
        console.say(line)
    if len(surprising) > MENTIONED:
        console.say(f"and {len(surprising) - MENTIONED:,} more matrices kept exactly; inspect --tensors lists them")


def _method(options: argparse.Namespace) -> Method:
    """Return the method that the command's own options describe."""
    from deltafmt.methods import METHODS, DeltaDQ
    from deltafmt.methods.options import make_method

    given = {key.removeprefix(PREFIX): value for key, value in vars(options).items() if key.startswith(PREFIX)}
    texts = {key: value if isinstance(value, str) else ("no", "yes")[value] for key, value in given.items()}
    return make_method(METHODS, options.method or DeltaDQ.name, texts)


def _given(options: argparse.Namespace) -> list[str]:
    """Return the options given that say how everything is packed."""
    method = [] if options.method is None else [f"--method {options.method}"]
    keys = [key.removeprefix(PREFIX).replace("_", "-") for key in vars(options) if key.startswith(PREFIX)]
    return method + [f"--{key}" for key in keys]


def _ruled(method: Method, text: str) -> Method | None:
    """Return the method of a rule's options, None for ``exact``."""
    from deltafmt.methods import METHODS
    from deltafmt.methods.options import make_method, split_pairs

    if text == "exact":
        return None
    try:
        pairs = split_pairs(text)
        return make_method(METHODS, pairs.pop("method", method.name), pairs, method)
    except UsageError as error:
        raise UsageError(f"rule {text!r}: {error}") from error


def _list_methods() -> None:
    """Print every method and its options."""
    from deltafmt.methods import METHODS
    from deltafmt.methods.options import options_of

    for name, method in METHODS.items():
        console.say(f"{name}: {method.summary}")
        for each in options_of(method).values():
            value = "yes|no" if each.is_switch else each.metavar
            console.say(f"  {each.key + '=' + value:20} {each.help}")
