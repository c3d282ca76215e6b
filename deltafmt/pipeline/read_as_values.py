"""What a delta file says of sides whose 8-bit floats were read as the values that they mean; needs the index alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from deltafmt.index.scaled import ScaledRef

# The key of a file's metadata that says how many of the fine-tune's tensors were read as values.
METADATA_DEQUANTIZED: Final = "dequantized"


@dataclass(frozen=True, slots=True)
class Dequantized:
    """How many tensors of either side were 8-bit floats, and were read as the BF16 values that they mean."""

    base: int = 0
    finetuned: int = 0

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return {"base": self.base, "finetuned": self.finetuned}

    def __str__(self) -> str:
        sides = [
            f"{number:,} FP8 tensor{'' if number == 1 else 's'} of the {side}"
            for number, side in ((self.base, "base"), (self.finetuned, "fine-tune"))
            if number
        ]
        restored = ", and what unpack writes is BF16" if self.finetuned else ""
        return f"{' and '.join(sides)} read as the values they mean in BF16{restored}" if sides else ""


def dequantized(scaled: Mapping[str, ScaledRef], metadata: Mapping[str, str]) -> Dequantized:
    """Return what a delta file says of both sides.

    Args:
        scaled: the base's tensors that the file describes.
        metadata: the file's metadata.
    """
    said = metadata.get(METADATA_DEQUANTIZED, "")
    return Dequantized(len(scaled), int(said) if said.isdecimal() and len(said) < 8 else 0)
