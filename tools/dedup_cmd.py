"""``deltafmt dedup``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltafmt.errors import EXIT_OK
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.remedies import message_of

if TYPE_CHECKING:
    from deltafmt.analysis.dedup import DedupResult, FineTune, Proposal

# Groups of equal files that are printed, and files of a group.
MENTIONED = 10
_PATHS = 4

# The folder that the commands name for the delta files.
FOLDER = "deltas"

# Why a checkpoint is the base, where the user has not said so.
CHOSEN = {
    "model cards": "model cards name it as the base",
    "bytes": "it saves most of the others, which a fine-tune can do, too: name a base that you know with --base",
}

EPILOG = """\
FOLDER is a checkpoint folder, a .safetensors file, or a folder of checkpoint folders. Nothing is written. The commands
that are printed keep the base as it is, and make a delta file of each fine-tune. unpack restores the fine-tune's weight
files from it byte for byte. Sizes of delta files are estimates from samples; +- is two standard errors, and 0 where
every byte was coded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="a checkpoint, or a folder of checkpoints")
    parser.add_argument("--base", metavar="BASE", help="take this checkpoint as the base, and look for no other")
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code, which is that of the first checkpoint that cannot be read."""
    from deltafmt.analysis.dedup import dedup

    with console.stage_bar(not options.json) as progress:
        result = dedup(options.folders, base=options.base, threads=options.threads, progress=progress)
    for path, error in result.failed.items():
        console.warn(f"{path} is left out: {message_of(error)}")
    code = next((error.exit_code for error in result.failed.values()), EXIT_OK)
    if options.json:
        console.say_json(_obj(result, ok=code == EXIT_OK))
        return code
    _say(result)
    return code


def _say(result: DedupResult) -> None:
    from deltafmt.analysis.copies import redundant

    whole = sum(result.weight_bytes)
    console.say(f"{plural(len(result.paths), 'checkpoint')}, {whole:,} bytes of weights")
    console.say(f"equal files: {plural(len(result.files), 'group')}, {redundant(result.files):,} bytes are copies")
    for files in result.files[:MENTIONED]:
        shown = ", ".join(map(str, files.paths[:_PATHS]))
        more = f" and {len(files.paths) - _PATHS:,} more" if len(files.paths) > _PATHS else ""
        console.say(f"  {files.size:,} bytes each: {shown}{more}")
    if len(result.files) > MENTIONED:
        console.say(f"  and {plural(len(result.files) - MENTIONED, 'more group')}, which --json lists")
    copies = sum(len(tensors.places) - 1 for tensors in result.tensors)
    console.say(f"equal tensors: {copies:,} are copies of another, {redundant(result.tensors):,} bytes")
    for number, proposal in enumerate(result.proposals):
        console.say()
        _say_proposal(proposal, number)
    if result.alone:
        console.say()
        console.say(f"no base makes these smaller: {', '.join(map(str, result.alone))}")


def _say_proposal(proposal: Proposal, number: int) -> None:
    console.say(f"base: {proposal.base}")
    if proposal.chosen_by in CHOSEN:
        console.say(CHOSEN[proposal.chosen_by])
    rows = [["fine-tune", "bytes", "equal", "near", "as a delta", "+-", "of its own"]]
    for each in proposal.finetunes:
        saving = each.saving
        rows.append(
            [
                each.name,
                f"{saving.whole:,}",
                f"{saving.same:,}",
                f"{saving.near:,}",
                f"{saving.size:,}",
                f"{saving.error:,}",
                f"{100 * saving.size / saving.whole:.1f}%",
            ]
        )
    console.table(rows, (False, True, True, True, True, True, True))
    whole = sum(each.saving.whole for each in proposal.finetunes)
    console.say(f"saves {proposal.saved:,} of {whole:,} bytes (+- {proposal.error:,}):")
    for command in commands(proposal, FOLDER if number == 0 else f"{FOLDER}-{number + 1}"):
        console.say(f"  {command}")


def commands(proposal: Proposal, folder: str) -> Iterator[str]:
    """Give the commands that make a proposal's delta files and check them, and the one that restores the first.

    Args:
        proposal: the proposal.
        folder: where the delta files go.
    """
    base = _quoted(proposal.base)
    sources = " ".join(map(_source, proposal.finetunes))
    yield f"deltafmt pack --many {base} {sources} -o {folder} --method exact"
    files = " ".join(_quoted(Path(folder) / f"{each.name}.deltafmt") for each in proposal.finetunes)
    yield f"deltafmt verify {files} --base {base}"
    first = proposal.finetunes[0].name
    yield f"deltafmt unpack {base} {_quoted(Path(folder) / f'{first}.deltafmt')} -o {_quoted(Path('restored') / first)}"


def _source(each: FineTune) -> str:
    from deltafmt.pipeline.many_outputs import own_name

    named = own_name(each.path) != each.name or "=" in str(each.path)
    return shlex.quote(f"{each.name}={each.path}" if named else _plain(each.path))


def _quoted(path: Path) -> str:
    return shlex.quote(_plain(path))


def _plain(path: Path) -> str:
    """Return a path that no command takes for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _obj(result: DedupResult, *, ok: bool) -> dict[str, Any]:
    from deltafmt.analysis.copies import redundant

    paths = result.paths
    return {
        "ok": ok,
        "checkpoints": [
            {"path": str(path), "bytes": size} for path, size in zip(paths, result.weight_bytes, strict=True)
        ],
        "failed": [
            {"path": str(path), "error": message_of(error), "exit_code": error.exit_code}
            for path, error in result.failed.items()
        ],
        "equal_files": {
            "redundant_bytes": redundant(result.files),
            "groups": [{"bytes": each.size, "paths": [str(path) for path in each.paths]} for each in result.files],
        },
        "equal_tensors": {
            "redundant_bytes": redundant(result.tensors),
            "groups": [
                {
                    "dtype": each.dtype,
                    "shape": list(each.shape),
                    "bytes": each.nbytes,
                    "places": [{"path": str(paths[number]), "name": name} for number, name in each.places],
                }
                for each in result.tensors
            ],
        },
        "proposals": [_proposal_obj(proposal, number) for number, proposal in enumerate(result.proposals)],
        "alone": [str(path) for path in result.alone],
    }


def _proposal_obj(proposal: Proposal, number: int) -> dict[str, Any]:
    rows = []
    for each in proposal.finetunes:
        saving = each.saving
        rows.append(
            {
                "name": each.name,
                "path": str(each.path),
                "bytes": saving.whole,
                "equal_bytes": saving.same,
                "near_bytes": saving.near,
                "new_bytes": saving.new,
                "delta_bytes": saving.size,
                "delta_error": saving.error,
                "without_base_bytes": saving.alone,
                "windows": saving.windows,
            }
        )
    return {
        "base": str(proposal.base),
        "chosen_by": proposal.chosen_by,
        "saved_bytes": proposal.saved,
        "saved_error": proposal.error,
        "finetunes": rows,
        "commands": list(commands(proposal, FOLDER if number == 0 else f"{FOLDER}-{number + 1}")),
    }
