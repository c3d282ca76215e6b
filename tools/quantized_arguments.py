"""Options about weights that are quantized, and what is said of those that are read as values."""

from __future__ import annotations

import argparse

from deltafmt.pipeline.read_as_values import Dequantized
from deltafmt.tools import console


def add_variant_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--variant``."""
    parser.add_argument("--variant", metavar="NAME", help="read the weights of this variant, such as fp16")


def say_dequantized(found: Dequantized, *, ask: bool = False) -> None:
    """Say which tensors are 8-bit floats that are read as values.

    Args:
        found: how many there are.
        ask: True where another way may be asked for.
    """
    said = str(found)
    if said:
        console.say(f"values: {said}{'; --quantized exact packs the stored bytes' if ask else ''}")
