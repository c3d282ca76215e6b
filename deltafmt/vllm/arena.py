"""Memory of a GPU for deltas, taken before the engine sizes its cache of keys and values.

There is one block for each slot. A delta is copied into the block of its slot from host memory, so filling a slot
takes no memory and opens no file.
"""

from __future__ import annotations

import torch

from deltafmt.errors import UsageError


class Arena:
    """Blocks of one size.

    Args:
        device: where they lie.
        slots: the number of blocks.
        size: bytes of a block.
    """

    def __init__(self, device: torch.device, slots: int, size: int) -> None:
        self.size = size // 256 * 256
        with torch.inference_mode(mode=False):
            self._memory = torch.empty(slots * self.size, dtype=torch.uint8, device=device)

    def check(self, name: str, nbytes: int) -> None:
        """Refuse a delta that has no room in a block.

        Raises:
            UsageError: it is larger.
        """
        if nbytes > self.size:
            raise UsageError(
                f"{name} takes {nbytes} bytes on the device where a slot has {self.size}; start the engine with "
                f'the additional config {{"deltafmt": {{"largest": {nbytes}}}}}'
            )

    def take(self, slot: int, nbytes: int) -> torch.Tensor:
        """Return the first bytes of a slot's block, uint8."""
        if nbytes > self.size:
            raise AssertionError(f"{nbytes} bytes do not fit a block of {self.size}")
        return self._memory[slot * self.size : slot * self.size + nbytes]
