"""The compressed parameters that a sequential calibration shows to later blocks.

In sequential calibration, each block is calibrated on the outputs of the compressed blocks before it. The matrices of a
finished block are packed into a file of their own, with the moments and seeds that the real file will use, and decoded
as ``unpack`` decodes them. Whatever packing decides is therefore decided in the same way, for example that a matrix is
stored whole because its delta would be no smaller. The file is removed at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltafmt.delta import DeltaFile, RunDecoder
from deltafmt.pipeline.plan import Plan
from deltafmt.terms.floats import widen


@dataclass(frozen=True, slots=True)
class Stages:
    """A ``deltafmt.calibration.callbacks.OnStage`` that gives the parameters of a stage as they will be stored.

    Attributes:
        plans: the plans of all tensors, by name.
        pack: packs some tensors into a file.
        path: that file.
    """

    plans: dict[str, Plan]
    pack: Callable[[Sequence[Plan], Path], None]
    path: Path

    def __call__(self, names: Sequence[str], awaited: frozenset[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Give names and values of the parameters that the file will not hold exactly.

        Args:
            names: the stage's parameters.
            awaited: names of weights whose moments are still to come. A tied copy of such a weight is left as it is.
        """
        sources = {name: plan for name in names if (plan := self._source(name, awaited)) is not None}
        needed = {plan.tensor.name: plan for plan in sources.values()}
        if not needed:
            return
        try:
            self.pack(list(needed.values()), self.path)
            with DeltaFile(self.path, verify=False) as opened:
                for name, plan in sources.items():
                    if opened[plan.tensor.name].action == "add":
                        yield name, stored(plan, opened)
        finally:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _source(self, name: str, awaited: frozenset[str]) -> Plan | None:
        """Return the plan of the tensor that a parameter is decoded from; None if the tensor is exact or awaited."""
        plan = self.plans.get(name)
        if plan is not None and plan.alias is not None:
            plan = self.plans[plan.alias]
        if plan is None or plan.method is None:
            return None
        waits = plan.method.calibration != "none" and plan.tensor.name in awaited
        return None if waits else plan


def stored(plan: Plan, opened: DeltaFile) -> NDArray[np.float32]:
    """Return a tensor as it will be unpacked, in float32; the open delta has terms for it."""
    tensor, base = plan.tensor, plan.base
    assert base is not None
    entry = opened[tensor.name]
    decoder = RunDecoder(opened, entry)
    found = np.empty((tensor.rows, tensor.columns), np.float32)
    for start, stop in decoder.ranges():
        with base.row_range(start, stop) as rows:
            found[start:stop] = widen(decoder.add(start, stop, rows, base.dtype, tensor.dtype), tensor.dtype)
    if tensor.rows > entry.delta_rows:
        with tensor.row_range(entry.delta_rows, tensor.rows) as rows:
            found[entry.delta_rows :] = widen(rows, tensor.dtype)
    return found.reshape(tensor.shape)
