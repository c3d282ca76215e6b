"""The options of a calibration run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError

BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Device, batches and state of a calibration run.

    Attributes:
        device: the device on which the blocks run; a GPU if there is one.
        batch_tokens: the number of tokens in a batch.
        state: a folder for the state with which a killed run is resumed; None keeps no state.
        key: text that identifies the job further, such as the method's options; another key refuses an old state.
    """

    device: torch.device | str | None = None
    batch_tokens: int = BATCH_TOKENS
    state: str | os.PathLike[str] | None = None
    key: str = ""

    def where(self) -> torch.device:
        """Return the device.

        Raises:
            UsageError: torch does not find that GPU.
        """
        return find_device(self.device, "calibration")


def find_device(name: torch.device | str | None, what: str) -> torch.device:
    """Return a device by its name; without a name, a GPU if there is one.

    Args:
        name: the device.
        what: what runs on it, for the message.

    Raises:
        UsageError: torch does not find that GPU.
    """
    found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{what} device '{found}': torch finds {torch.cuda.device_count()} GPUs")
    return found
