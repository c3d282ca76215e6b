"""``deltafmt warmup``: the kernels that serving some deltas can need, compiled before a request needs them."""

from __future__ import annotations

import argparse

from deltafmt.errors import UsageError
from deltafmt.tools import console

EPILOG = """\
What is compiled lies in Triton's cache (the folder of TRITON_CACHE_DIR, or ~/.triton/cache), where every later process
of the same user and version finds it. Files that were packed alike need the same kernels: one of them is enough.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("delta", metavar="DELTA", nargs="+", help="a delta file to be served; several may be given")
    parser.add_argument(
        "--tokens",
        metavar="LIST",
        default="1,16,2048",
        help="numbers of tokens of the batches to serve, in decoding steps and prompts (default: 1,16,2048)",
    )
    parser.add_argument(
        "--target",
        metavar="GPU",
        help="compile for this GPU, for example cuda:90 for compute capability 9.0 (default: the GPU of this machine)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that compile (default: one for each processor)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.torch import warmup

    tokens = _numbers(options.tokens)
    with console.count_bar("compiling", not options.json) as bar:
        found = warmup(options.delta, tokens=tokens, target=options.target, workers=options.workers, progress=bar)
    if options.json:
        console.say_json(
            {
                "ok": True,
                "target": found.target or None,
                "compiled": found.compiled,
                "cached": found.cached,
                "seconds": round(found.seconds, 3),
            }
        )
    elif not found.target:
        console.say("no GPU here, so there is nothing to compile; --target cuda:90 compiles for another machine's")
    else:
        console.say(
            f"{found.compiled} kernels compiled for {found.target} in {found.seconds:.1f} s, "
            f"{found.cached} were compiled before"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``1,16,2048``.

    Raises:
        UsageError: the text is no such list.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--tokens {text!r} is not a list of numbers such as 1,16,2048") from None
