"""``deltafmt``: parse the command line, run one command, turn every error into one line and an exit code.

Exit codes: 0 done; 1 ``diff --exit-code`` found differences, or an internal error; 2 wrong usage; 3 a file is not
valid; 4 wrong base; 5 reading or writing failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from deltafmt._version import __version__
from deltafmt.errors import EXIT_INTERRUPTED, EXIT_OK, DeltafmtError, StorageError, UsageError, shortened
from deltafmt.output import reason
from deltafmt.tools import console
from deltafmt.tools.remedies import message_of

COMMANDS = {
    "pack": "pack the difference of two checkpoints into a delta file",
    "methods": "list the compression methods of pack, or explain one with its options",
    "unpack": "apply a delta to its base and write a loadable checkpoint folder",
    "apply": "apply a chain of deltas to a model, into a new folder or in place",
    "squash": "make one delta file of a chain",
    "convert": "turn a patch of another program into a delta file, or a delta file into a patch",
    "inspect": "show what is in a delta file and what it costs, without reading its sections",
    "verify": "check a delta file completely, and a base against it",
    "repack": "rewrite a delta file for serving (hot) or for archives (cold), without loss",
    "diff": "show what differs between two delta files, or two checkpoints",
    "import-lora": "turn a LoRA adapter into a delta file",
    "export-lora": "turn a delta file of low-rank terms into a LoRA adapter",
    "warmup": "compile the kernels that serving some delta files needs, before a request needs them",
    "dedup": "show what several checkpoints have in common, and what keeping one as a base would save",
    "analyze": "show what a fine-tune's delta looks like, and what compressing it loses",
    "evaluate": "compare what deltas and the fine-tune predict of a text",
}

# The options that are paths, and what the help calls them.
PATHS = {
    "base": "BASE",
    "input": "IN",
    "finetuned": "FINETUNED",
    "more": "FINETUNED",
    "delta": "DELTA",
    "folders": "FOLDER",
    "output": "-o",
    "parent": "--parent",
}

# The commands whose module has ``add_rare_arguments``.
WITH_RARE_OPTIONS = ("pack",)

# The commands that compress or decompress.
COMPUTING = ("pack", "unpack", "apply", "squash", "convert", "verify", "import-lora", "export-lora", "dedup", "analyze")

# What argparse says, and the same in this project's words.
_PLAIN = (
    (r"the following arguments are required: ([^,]+)", r"\1 is missing"),
    (r"the following arguments are required: (.+)", r"\1 are missing"),
    (r"argument (\S+): invalid int value: (.+)", r"\1 \2 is not a whole number"),
    (r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", r"\1 \2 is not one of \3"),
    (r"argument (\S+): expected one argument", r"\1 needs a value"),
    (r"argument (\S+): expected (\d+) arguments", r"\1 needs \2 values"),
)


def plain(message: str) -> str:
    """Return an error of argparse in plain words: ``DELTA is missing``; other messages stay."""
    for pattern, words in _PLAIN:
        found = re.fullmatch(pattern, message)
        if found:
            said = found.expand(words).replace("-o/--output", "-o")
            # Some versions of argparse put choices into quotes.
            before, choices, after = said.partition(" is not one of ")
            return before + choices + after.replace("'", "")
    return message


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2.

    Attributes:
        rare: adds options whose declarations are slow to import; called when an argument is unknown without them.
    """

    rare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and if there are unknown arguments, once more with the rare options."""
        found = super().parse_known_args(args, namespace)
        if found[1] and self.rare is not None:
            self.rare(self)
            self.rare = None
            found = super().parse_known_args(args, namespace)
        return found

    def error(self, message: str) -> NoReturn:
        """Raise what :func:`main` turns into one line."""
        raise UsageError(f"{plain(message)} (see {self.prog} --help)")


def build_parser(command: str | None) -> Parser:
    """Return the parser; only the named command's module is imported for its options."""
    parser = Parser(prog="deltafmt", description="Store fine-tuned models as compressed deltas of a base.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--verbose", action="store_true", help="with --version: also print what deltafmt runs on")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            _module(name).add_arguments(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
            if name in WITH_RARE_OPTIONS:
                sub.rare = _module(name).add_rare_arguments
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"deltafmt.tools.{command.replace('-', '_')}_cmd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _interrupt)
        # A terminal that closes. nohup has it ignored, and so it stays.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, _interrupt)
    as_json = "--json" in arguments
    try:
        options = _parse(arguments)
        if options is None:
            return EXIT_OK
        if getattr(options, "output", None) == "-" and options.command != "pack":
            raise UsageError(f"{options.command} does not write to standard output; name the output after -o")
        _say_missing_loops(options.command)
        with _seldom_collected():
            code: int | None = _module(options.command).run(options)
        sys.stdout.flush()
        return EXIT_OK if code is None else code
    except DeltafmtError as error:
        return _report(message_of(error), error.exit_code, as_json)
    except KeyboardInterrupt as error:
        return _report(str(error) or "interrupted", EXIT_INTERRUPTED, as_json)
    except BrokenPipeError:
        # Whoever read our output has stopped; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        return _report(f"{reason(error)}{name}", StorageError.exit_code, as_json)
    except MemoryError:
        return _report("out of memory", StorageError.exit_code, as_json)
    except Exception as error:
        if os.environ.get("DELTAFMT_TRACEBACK"):
            raise
        text = f"internal error, please report it: {type(error).__name__}: {error} (DELTAFMT_TRACEBACK=1 shows more)"
        return _report(text, 1, as_json)


def _open_closed_streams() -> None:
    """Give the standard streams that the caller has closed a descriptor, or a file that is opened later would be them.

    Writing to standard output then fails, as it does for other programs. Warnings go nowhere.
    """
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            # It gets the lowest free number, which is the stream's own unless a host program has taken that.
            opened = os.open(os.devnull, mode)
            setattr(sys, name, open(opened, "w" if number else "r", closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Have Python look for cyclic garbage less often: a third of a pack of many small tensors went into that."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _core() -> Any:
    return importlib.import_module("deltafmt.core")


def _parse(arguments: list[str]) -> argparse.Namespace | None:
    """Return the options of a command; None if the version was asked for, which is then printed."""
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in (None, *COMMANDS) and not {"-h", "--help", "--version"} & set(arguments):
        raise UsageError(f"unknown command {command!r}; there are {', '.join(COMMANDS)} (see deltafmt --help)")
    before = arguments if command is None else arguments[: arguments.index(command)]
    if "--version" in before:
        _say_version(verbose="--verbose" in arguments)
        return None
    options: argparse.Namespace
    options, unknown = build_parser(command).parse_known_args(arguments)
    if unknown and options.command in WITH_RARE_OPTIONS and not any(word.startswith("-") for word in unknown):
        # argparse does not give optional places to words that stand behind an option.
        _module(options.command).take_words(options, unknown)
        unknown = []
    if unknown:
        raise _unknown(unknown[0], options.command, arguments)
    for name, said in PATHS.items():
        given = getattr(options, name, None)
        if given == "" or (isinstance(given, list) and "" in given):
            # A path of no characters would be the current folder.
            raise UsageError(f"{said} is empty, as from a variable that is not set (see deltafmt {command} --help)")
    return options


def _say_missing_loops(command: str) -> None:
    line = _core().missing_line() if command in COMPUTING else None
    if line:
        console.warn(line)


def _say_version(*, verbose: bool) -> None:
    """Print the version, and with ``verbose`` which loops and packages are used."""
    console.say(f"deltafmt {__version__}")
    if verbose:
        from importlib.metadata import PackageNotFoundError, version

        console.say(f"loops: {_core().describe()}")
        console.say(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
        for name in ("numpy", "zstandard", "msgpack", "xxhash", "blake3", "torch", "triton", "transformers"):
            with contextlib.suppress(PackageNotFoundError):
                console.say(f"{name} {version(name)}")


def _unknown(word: str, command: str, arguments: list[str]) -> UsageError:
    """Return the error for an argument that a command does not take."""
    if not word.startswith("-"):
        return UsageError(f"one argument too many: {word!r} (see deltafmt {command} --help)")
    if word in arguments and arguments.index(word) < arguments.index(command):
        return UsageError(f"{word} stands before the command; write it after: deltafmt {command} ... {word}")
    return UsageError(f"{command} has no option {word} (see deltafmt {command} --help)")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _report(message: str, code: int, as_json: bool) -> int:
    line = shortened(" ".join(message.split("\n")))
    # The output itself may be what failed; the exit code still tells.
    with contextlib.suppress(OSError):
        console.warn(line)
    with contextlib.suppress(OSError):
        if as_json:
            console.say_json({"ok": False, "error": line, "exit_code": code})
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes it once more at the end, and would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    raise SystemExit(main())
