"""``deltafmt pack --many``: all fine-tunes of one base in one run, with a table of what was made."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltafmt.errors import EXIT_OK, DeltafmtError, UsageError
from deltafmt.pipeline.summary import plural, times
from deltafmt.tools import console
from deltafmt.tools.pack_report import actions, narrow, remarks, result_obj
from deltafmt.tools.remedies import message_of

if TYPE_CHECKING:
    from deltafmt.methods import Method
    from deltafmt.pipeline.pack_many import ManyResult

# Fine-tunes whose warnings are printed; those of others are in --json.
_WARNED = 10


def run_many(options: argparse.Namespace, method: Method, shared: Mapping[str, Any]) -> int:
    """Pack every fine-tune; return the exit code, which is that of the first one that failed.

    Args:
        options: of the command line.
        method: compresses the matrices.
        shared: arguments of ``pack`` for all fine-tunes.

    Raises:
        UsageError: two fine-tunes have one name, or as :func:`deltafmt.pack_many` raises.
    """
    from deltafmt.pipeline.many_outputs import unique
    from deltafmt.pipeline.pack_many import pack_many

    sources = unique(_named(word) for word in (options.finetuned, *options.more))

    def total() -> int:
        return sum(map(_bytes, sources.values()))

    with console.progress_bar("packing", total, not options.json) as progress:
        result = pack_many(options.base, sources, options.output, method=method, **shared, progress=progress)
    for name, error in result.failed.items():
        console.warn(f"{name}: {message_of(error)}")
    code = next((error.exit_code for error in result.failed.values()), EXIT_OK)
    if options.json:
        console.say_json(_obj(result, list(sources), ok=code == EXIT_OK))
        return code
    _warn(result, method)
    _table(result, list(sources))
    _summary(result, options.base)
    return code


def refuse_options(options: argparse.Namespace) -> None:
    """Refuse options that are for one fine-tune alone.

    Raises:
        UsageError: names the option.
    """
    if options.parent:
        raise UsageError("--many and --parent: a chain has one link after another; pack them one by one without --many")
    for name in ("target-ratio", "target-size", "plan", "candidate", "calibration"):
        if getattr(options, name.replace("-", "_")):
            raise UsageError(
                f"--many and --{name}: that takes a run for each fine-tune; give --method and --rule, or pack them one "
                "by one without --many"
            )
    if options.output == "-":
        raise UsageError("--many writes several files, and standard output takes one; name a folder after -o")


def _named(word: str) -> tuple[str, str]:
    """Return name and path of a fine-tune, which is given as PATH or NAME=PATH."""
    from deltafmt.pipeline.many_outputs import own_name

    name, equals, path = word.partition("=")
    return (name, path) if equals and not Path(word).exists() else (own_name(word), word)


def _bytes(path: Path) -> int:
    try:
        return console.checkpoint_bytes(str(path))
    except DeltafmtError:  # the run says what is wrong with it
        return 0


def _warn(result: ManyResult, method: Method) -> None:
    warned = 0
    for name, packed in result.packed.items():
        lines = [*remarks(packed), *([narrow(packed.narrow, method)] if packed.narrow else [])]
        if packed.left_out:
            first = next(iter(packed.left_out))
            lines.append(f"{plural(len(packed.left_out), 'file')} left out, such as {first}; --json names them all")
        if packed.unmatched:
            lines.append(
                f"{plural(len(packed.unmatched), 'tensor')} of its layers have no counterpart in the base, such as "
                f'"{packed.unmatched[0]}"; --rename FROM=TO says what belongs together'
            )
        if lines and warned < _WARNED:
            for line in lines:
                console.warn(f"{name}: {line}")
        warned += bool(lines)
    if warned > _WARNED:
        console.warn(f"and warnings about {plural(warned - _WARNED, 'more fine-tune')}, which --json has")


def _table(result: ManyResult, names: list[str]) -> None:
    rows = [["fine-tune", "bytes", "of its own", "tensors"]]
    for name in names:
        if name in result.failed:
            rows.append([name, "", "", "failed"])
            continue
        size, whole = result.paths[name].stat().st_size, result.finetuned_bytes[name]
        packed = result.packed.get(name)
        resumed = f" (went on after {packed.resumed:,})" if packed and packed.resumed else ""
        done = "finished before" if packed is None else f"{actions(packed)}{resumed}"
        rows.append([name, f"{size:,}", f"{100 * size / whole:.1f}%", done])
    console.table(rows, (False, True, True, False))


def _summary(result: ManyResult, base: str) -> None:
    """Say what all files take together."""
    done = len(result.packed) + len(result.finished)
    if done:
        folder = next(iter(result.paths.values())).parent
        console.say(
            f"{folder}: {plural(done, 'fine-tune')} of {base}, {result.size:,} bytes, {times(result.ratio)} than "
            f"their own {sum(result.finetuned_bytes.values()):,}"
        )
    if result.failed:
        console.say(
            f"failed: {len(result.failed):,} of {len(result.paths):,}; the same command packs them once they are mended"
        )


def _obj(result: ManyResult, names: list[str], *, ok: bool) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    for name in names:
        path = str(result.paths[name])
        if name in result.failed:
            error = result.failed[name]
            row = {"ok": False, "file": path, "error": message_of(error), "exit_code": error.exit_code}
        elif name in result.packed:
            row = {"ok": True, "finished_before": False, **result_obj(result.packed[name])}
        else:
            size, whole = result.paths[name].stat().st_size, result.finetuned_bytes[name]
            row = {
                "ok": True,
                "finished_before": True,
                "file": path,
                "bytes": size,
                "finetuned_bytes": whole,
                "ratio": round(whole / size, 4),
                "content_id": result.finished[name],
            }
        files.append({"name": name, **row})
    return {
        "ok": ok,
        "bytes": result.size,
        "finetuned_bytes": sum(result.finetuned_bytes.values()),
        "failed": len(result.failed),
        "files": files,
    }
