"""How a calibration runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError

BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Device, batches and state.

    Attributes:
        device: where the blocks run; a GPU if there is one.
        batch_tokens: tokens of a batch.
        minimum: fewest tokens that the texts must have; None for the widest module's number of columns, below which its
            moments are certain to be singular.
        double: add the moments up in float64.
        state: folder in which a killed run leaves what it needs to go on; None for none.
        key: what else identifies the job, such as the method's options, for a state to be used again.
    """

    device: torch.device | str | None = None
    batch_tokens: int = BATCH_TOKENS
    minimum: int | None = None
    double: bool = False
    state: str | os.PathLike[str] | None = None
    key: str = ""

    def where(self) -> torch.device:
        """Return the device.

        Raises:
            UsageError: there is no such GPU.
        """
        found = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"calibration device '{found}': torch finds {torch.cuda.device_count()} GPUs")
        return found
