"""``deltafmt pack``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import TYPE_CHECKING

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.errors import UsageError
from deltafmt.pipeline.summary import left_out_line, plural, times
from deltafmt.tools import console
from deltafmt.tools.calibration_options import (
    add_calibration_arguments,
    calibration_obj,
    read_calibration,
    say_calibration,
)
from deltafmt.tools.method_arguments import (
    add_method_argument,
    add_method_flags,
    given_arguments,
    read_method,
    read_rule,
)
from deltafmt.tools.name_arguments import (
    add_architecture_argument,
    add_name_arguments,
    name_options,
    names_obj,
    say_names,
)
from deltafmt.tools.quantized_arguments import say_dequantized
from deltafmt.tools.targets import add_target_arguments, plan_obj, read_target, say_chosen, show

if TYPE_CHECKING:
    from deltafmt.methods import Method
    from deltafmt.pipeline.pack_result import PackResult

MENTIONED = 10
USAGE = "deltafmt pack BASE FINETUNED -o OUT [options]"
DESCRIPTION = """\
Pack the difference of two checkpoints into a delta file. For example:

  deltafmt pack base/ math/ -o math.deltafmt --target-ratio 16
  deltafmt pack base/ math/ -o math.deltafmt --method exact
"""
EPILOG = """\
A PATTERN matches tensor names as a shell does. A rule's METHOD is a method,
or only key=value,... to change options of the command's method, or whole, which
stores the tensor as it is. The last rule that matches decides:

  --rule '*.mlp.*' nm=2:16,bits=2 --rule '*.attn.*' rtn:bits=3
  --rule lm_head.weight whole

Vectors, tensors that the base lacks or has in another shape, and dtypes other
than BF16, F16 and F32 are stored whole. An interrupted pack goes on if run again.
"""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of at most 100 columns, whose descriptions are printed as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27, width=min(shutil.get_terminal_size().columns, 100))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    # Packing has a thread for each processor. Threads of the linear algebra library beside them wait for one another in
    # busy loops: low-rank methods then take up to twenty times as long. It reads this when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parser.formatter_class = Formatter
    parser.usage, parser.description, parser.epilog = USAGE, DESCRIPTION, EPILOG
    parser.add_argument("base", metavar="BASE", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("finetuned", metavar="FINETUNED", nargs="?", help="checkpoint folder or .safetensors file")
    parser.add_argument("-o", "--output", metavar="OUT", help="the delta file to write; - for standard output")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--profile", default="hot", metavar="NAME", help="hot (default) for serving, cold for archives")
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="compress only tensors of these names"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="store tensors of these names whole"
    )
    parser.add_argument(
        "--rule",
        nargs=2,
        action="append",
        default=[],
        metavar=("PATTERN", "METHOD"),
        help="use another method for these names; see below",
    )
    add_name_arguments(parser, "the fine-tune")
    add_architecture_argument(parser)
    parser.add_argument("--base-name", metavar="NAME", help="how the delta names its base")
    parser.add_argument(
        "--missing",
        metavar="HOW",
        help="same (as in BASE) or removed: what FINETUNED lacks",
    )
    parser.add_argument("--variant", metavar="NAME", help="read the weights of this variant, such as fp16")
    parser.add_argument("--quantized", metavar="HOW", help="FP8 is read as values (default), or packed exact")
    parser.add_argument(
        "--attach", action="append", default=[], metavar="PATTERN", help="files that travel although not by themselves"
    )
    parser.add_argument(
        "--no-attach",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files beside the weights that do not travel",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed for random positions (default 0)")
    parser.add_argument("--threads", type=int, metavar="T", help="worker threads (default: one for each processor)")
    add_method_argument(parser)
    parser.add_argument(
        "--exact", action="store_true", help="serve the delta, and restore every byte from exact parts behind it"
    )
    add_target_arguments(parser)
    add_calibration_arguments(parser)


def add_rare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of any method, which imports all methods; called when an argument is unknown."""
    add_method_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    output = "" if options.plan else options.output
    for name, value in (("BASE", options.base), ("FINETUNED", options.finetuned), ("-o OUT", output)):
        if value is None:
            raise UsageError(f"{name} is missing (see deltafmt pack --help)")
    from deltafmt.pipeline.pack import pack

    target = read_target(options, given_arguments(options))
    method = read_method(options)
    calibration = read_calibration(options)
    rules: list[tuple[str, Method | None]] = [(pattern, read_rule(text, method)) for pattern, text in options.rule]
    to_stdout = options.output == "-"
    if to_stdout and sys.stdout.isatty():
        raise UsageError("a delta file is not written to a terminal; name a file after -o, or pipe the output on")
    if to_stdout and options.json:
        raise UsageError("--json and -o - both need standard output")
    shared = {
        **target,
        "rules": rules,
        "include": options.include,
        "exclude": options.exclude,
        **name_options(options),
        "allow_architecture": options.allow_architecture,
        "base_name": options.base_name,
        "missing": options.missing,
        "variant": options.variant,
        "quantized": options.quantized,
        "attach": options.attach,
        "no_attach": options.no_attach,
        "profile": options.profile,
        "seed": options.seed,
        "exact": options.exact,
        "threads": options.threads,
    }

    def total() -> int:
        return console.checkpoint_bytes(options.finetuned)

    if options.plan:
        from deltafmt.pipeline.budget import plan_for_target

        if calibration:
            raise UsageError("--plan and --calibration do not go together: a plan is made without reading a text")
        with console.progress_bar("measuring", total, not options.json) as progress:
            choice = plan_for_target(options.base, options.finetuned, **shared, progress=progress)
        show(choice, as_json=options.json)
        return
    passes = (
        1 + options.exact + bool(target) + bool(calibration) + bool(target and calibration and calibration.sequential)
    )
    with console.progress_bar("packing", lambda: passes * total(), not options.json) as progress:
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
    _report(options, result, method)


def _report(options: argparse.Namespace, result: PackResult, method: Method) -> None:
    console.warn_left_out(result.left_out)
    for line in _remarks(result):
        console.warn(line)
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
                "in_base_only": len(result.removed),
                "removed": result.removed,
                "taken_from_base": result.taken,
                "not_in_index": result.unlisted,
                "attached": result.attached,
                "left_out": result.left_out,
                "remarks": result.remarks,
                "base_name": result.base_name or None,
                "names": names_obj(result.names),
                "dequantized": result.dequantized.to_obj(),
                "unmatched": {"finetuned": result.unmatched, "base": result.unmatched_base},
                "architecture": result.architecture or None,
                "narrow": result.narrow,
                "resumed_tensors": result.resumed,
                "restored_files": result.restored,
                "served": {"bytes": result.served, "content_id": result.served_id} if result.served else None,
                **calibration_obj(result),
                **({"plan": plan_obj(result.choice)} if result.choice else {}),
            }
        )
        return
    if result.path is None:
        return
    resumed = f" (went on after {plural(result.resumed, 'tensor')})" if result.resumed else ""
    smaller = f"{times(result.ratio)} than {options.finetuned}"
    console.say(f"{result.path}: {result.size:,} bytes, {smaller}{resumed}")
    console.say(_actions(result))
    say_names(result.names)
    say_dequantized(result.dequantized, ask=True)
    if result.unmatched:
        console.say(
            f"warning: {plural(len(result.unmatched), 'tensor')} of the fine-tune's layers and "
            f'{len(result.unmatched_base):,} of the base\'s have no counterpart, such as "{result.unmatched[0]}" and '
            f'"{result.unmatched_base[0]}"; --rename FROM=TO says what belongs together'
        )
    if result.architecture:
        console.say(f"the types of the models differ: {result.architecture}")
    if result.removed:
        console.say(left_out_line(result.removed))
    if result.taken:
        console.say(f"taken from the base: {plural(len(result.taken), 'tensor')}: {bounded(result.taken)}")
    _say_files(result)
    if result.choice:
        say_chosen(result.choice)
    elif result.narrow:
        console.say(_narrow(result.narrow, method))
    say_calibration(result, MENTIONED)
    from deltafmt.pipeline.plan import CHOSEN

    # Whoever asked for a tensor to be stored whole knows it; other reasons may surprise.
    surprising = [f"stored whole: {name} ({reason})" for name, reason in result.kept.items() if reason not in CHOSEN]
    for line in surprising[:MENTIONED]:
        console.say(line)
    if len(surprising) > MENTIONED:
        console.say(f"and {len(surprising) - MENTIONED:,} more matrices stored whole; inspect --tensors lists them")


def _say_files(result: PackResult) -> None:
    """Say which files travel."""
    if result.served:
        smaller = times(result.finetuned_bytes / result.served)
        console.say(f"served from its first {result.served:,} bytes, {smaller}; content id {result.served_id}")
    if result.restored:
        console.say(f"restored byte for byte by unpack: {bounded(result.restored)}")
    if result.attached:
        console.say(f"attached: {bounded(result.attached, 30)}")


def _remarks(result: PackResult) -> list[str]:
    """Return the remarks about the inputs, and which tensors the index does not name."""
    found = list(result.remarks)
    if result.unlisted:
        shards = ", ".join(dict.fromkeys(result.unlisted.values()))
        found.append(
            f"{plural(len(result.unlisted), 'tensor')} of {shards} that the index does not name, packed all the same "
            f"as loaders read them: {bounded(result.unlisted)}"
        )
    return found


def _actions(result: PackResult) -> str:
    """Return how many tensors were stored how, such as ``57 tensors compressed, 17 small ones stored whole``."""
    large = len(result.kept)
    small = result.actions.get("replace", 0) - large
    counts = {
        f"small {'one' if small == 1 else 'ones'} stored whole": small,
        f"{'matrix' if large == 1 else 'matrices'} stored whole": large,
        "same as the base": result.actions.get("same", 0),
        "tied to another": result.actions.get("alias", 0),
    }
    added, exact = result.actions.get("add", 0), result.actions.get("exact", 0)
    first = [f"{plural(added, 'tensor')} compressed"] if added or not exact else []
    first += [f"{plural(exact, 'tensor') if not first else f'{exact:,}'} exact"] if exact else []
    return ", ".join([*first, *(f"{number:,} {words}" for words, number in counts.items() if number)])


def _narrow(number: int, method: Method) -> str:
    """Return the warning about matrices of so few columns that dropping most of a row does not average out."""
    from deltafmt.methods.declare import options_of

    verb = "matrix is" if number == 1 else "matrices are"
    nm = options_of(type(method)).get("nm")
    kept, mended = ("", "") if nm is None else (f" with {nm.write(nm.of(method))}", "--nm 2:2, or ")
    return (
        f"warning: {number:,} {verb} 256 columns wide or less;{kept} the restored model will probably not work. "
        f"Use {mended}--target-ratio R"
    )
