"""Cuts of tensors: the rows or columns of a parameter that one of several processes has.

An example: of a weight with 4096 columns, the second of two processes has the columns 2048 to 4095.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from deltafmt.errors import UsageError

WAY_OUT: Final = "load the model whole in each process, without tp_plan, or unpack the delta and load that"


@dataclass(frozen=True, slots=True)
class Cut:
    """The cut of a tensor that a process has: a run of elements in each dimension."""

    runs: tuple[range, ...]

    def __str__(self) -> str:
        return f"[{', '.join(f'{run.start}:{run.stop}' for run in self.runs)}]"

    @property
    def rows(self) -> range:
        """The rows of the tensor's matrix; a vector has one."""
        return self.runs[0] if len(self.runs) > 1 else range(1)

    @property
    def columns(self) -> range:
        """The columns of the tensor's matrix."""
        return self.runs[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the cut."""
        return tuple(len(run) for run in self.runs)


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A cut of a tensor of a delta.

    Attributes:
        tensor: the tensor's name.
        cut: the cut; None for the whole tensor.
    """

    tensor: str
    cut: Cut | None

    @property
    def key(self) -> str:
        """The name of the cut among the tensors on the device."""
        return self.tensor if self.cut is None else f"{self.tensor}{self.cut}"


def cut_of(name: str, parameter: Any) -> Cut:
    """Return the cut of a DTensor that this process has.

    Args:
        name: the parameter's name, for the message.
        parameter: the DTensor.

    Raises:
        UsageError: it is cut in a way that is not a run of rows or columns.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    runs = [range(size) for size in parameter.shape]
    kinds = [type(placement).__name__ for placement in placements]
    if mesh.ndim == 1 and len(runs) <= 2 and kinds[0] in ("Shard", "Replicate"):
        if kinds[0] == "Shard":
            at = placements[0].dim
            # As torch.chunk cuts: the last processes may have less, or nothing.
            length, step = len(runs[at]), -(-len(runs[at]) // mesh.size())
            rank = mesh.get_local_rank()
            runs[at] = range(min(rank * step, length), min((rank + 1) * step, length))
        cut = Cut(tuple(runs))
        if cut.shape == tuple(parameter.to_local().shape) and all(cut.shape):
            return cut
    raise UsageError(f'parameter "{name}" is cut over processes as {placements}, which deltas cannot follow; {WAY_OUT}')


def settled(output: Any) -> Any:
    """Return an output that has arrived: torch may give a tensor that still waits for other processes."""
    wait = getattr(output, "trigger_wait", None)
    return output if wait is None else wait()
