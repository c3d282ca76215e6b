"""What was chosen for a target: a plan for every tensor, with its predicted size and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deltafmt.pipeline.plan import Plan


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for one tensor.

    Attributes:
        plan: how the tensor is packed.
        size: about how many bytes it takes in the file; 0 for a tensor that equals its base.
        loss: the predicted loss of packing it so.
    """

    plan: Plan
    size: int
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan for a whole file.

    Attributes:
        tensors: what was chosen for each tensor, in order.
        size: bytes of the file. For a ``cold`` file this is an upper bound.
        target: bytes that the file may have.
        finetuned_bytes: bytes of the fine-tune's weight files.
    """

    tensors: list[Chosen]
    size: int
    target: int
    finetuned_bytes: int

    @property
    def plans(self) -> list[Plan]:
        """How every tensor is packed."""
        return [chosen.plan for chosen in self.tensors]

    @property
    def loss(self) -> float:
        """The sum of the predicted losses of all tensors."""
        return math.fsum(chosen.loss for chosen in self.tensors)

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tune's weight files over bytes of the file."""
        return self.finetuned_bytes / self.size
