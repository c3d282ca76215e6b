"""A calibration: the text that the fine-tune reads, how it reads it, and for which matrices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from deltafmt.calibration.devices import check_device
from deltafmt.calibration.tokens import LENGTH, TOKENS
from deltafmt.errors import Remedy, UsageError
from deltafmt.methods.base import Method
from deltafmt.output import storage_error
from deltafmt.pipeline.plan import Plan
from deltafmt.regular_file import open_regular

# What a file's metadata says of a sequential calibration.
SEQUENTIAL = {"calibration.sequential": "yes"}


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text for the fine-tune to read, and how.

    Attributes:
        text: the file: plain text, or ``.jsonl`` with a ``text``, or ``prompt`` and ``completion``, or ``question`` and
            ``answer``, in every line.
        tokens: about how many tokens to use, in whole sequences from the start of the text.
        length: tokens of the longest sequence.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for a GPU if there is one.
        tokenizer: a folder or ``tokenizer.json``, if the fine-tune's folder has no tokenizer.
        sequential: True to calibrate each block on the outputs of the compressed blocks before it. False to calibrate
            it on the outputs of the fine-tune's own blocks.

    Raises:
        UsageError: an option is out of range.
    """

    text: str | os.PathLike[str]
    tokens: int = TOKENS
    length: int = LENGTH
    device: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"{self.tokens} calibration tokens are fewer than one")
        if self.length < 2:
            raise UsageError(f"a calibration length of {self.length} tokens is less than two")
        check_device(self.device, "calibration")

    def digest(self) -> str:
        """Return the BLAKE3 of the text, hexadecimal.

        Raises:
            StorageError: the text cannot be read.
        """
        hasher = blake3()
        try:
            with open_regular(self.text) as file:
                while data := file.read(1 << 20):
                    hasher.update(data)
        except OSError as error:
            raise storage_error("cannot read", self.text, error) from error
        return hasher.hexdigest()

    def describe(self) -> dict[str, str]:
        """Return everything that the moments of a fine-tune depend on, as text by name.

        Raises:
            StorageError: the text cannot be read.
        """
        return {
            "device": self.device or "",
            "length": str(self.length),
            "sequential": "yes" if self.sequential else "no",
            "suffix": Path(self.text).suffix,
            "text": self.digest(),
            "tokenizer": "" if self.tokenizer is None else os.path.abspath(self.tokenizer),
            "tokens": str(self.tokens),
        }


def check_calibration(methods: Iterable[Method], calibration: Calibration | None) -> None:
    """Refuse methods that need a calibration if there is none.

    Raises:
        UsageError: names the first such method.
    """
    for method in methods:
        if calibration is None and method.calibration == "required":
            raise UsageError(f"method {method.name} needs a calibration text", Remedy("calibration", None))


def calibrated_names(plans: Sequence[Plan], calibration: Calibration | None) -> dict[str, int]:
    """Return the number of columns of every matrix whose method uses second moments, by the matrix's name.

    Raises:
        UsageError: there is no calibration and a method needs it, or there is one and no method uses it.
    """
    check_calibration((plan.method for plan in plans if plan.method is not None), calibration)
    found = {plan.tensor.name: plan.tensor.columns for plan in plans if plan.uses_moments}
    if calibration is not None and not found:
        raise UsageError(f"no tensor's method reads a calibration text, so {os.fspath(calibration.text)} has no effect")
    return found
