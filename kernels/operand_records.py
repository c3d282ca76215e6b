"""The records of operands that lie in one allocation, for every delta of a layout: sums of arrays.

Deltas of one layout have the same operands at the same distances from the beginning of their allocations. Their records
are the same but for that address, and for the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.registry import kernels_of


class OperandRecords:
    """The records of some operands of a layout.

    Args:
        operands: those of one delta, whose allocation begins at ``address``.
        address: in bytes.
        seeds: for each operand, where its seed stands among those of a delta.

    Raises:
        UsageError: kernels cannot read an operand.
    """

    def __init__(self, operands: Sequence[Operand], address: int, seeds: Sequence[int]) -> None:
        values: list[int] = []
        is_address: list[bool] = []
        self._seeded: list[int] = []
        self._seeds: list[int] = []
        for operand, seed in zip(operands, seeds, strict=True):
            kernels = kernels_of(operand.layout)
            addresses = operand.addresses()
            known = {**addresses, **kernels.numbers(operand), "seed": 0}
            for source in kernels.record.sources(known):
                if source == "seed":
                    self._seeded.append(len(values))
                    self._seeds.append(seed)
                is_address.append(source in addresses)
                values.append(0 if source is None else known[source])
        self._is_address = np.array(is_address, np.int64)
        self._offsets = np.array(values, np.int64) - self._is_address * address

    def of(self, address: int, seeds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the records of another delta of the layout, int64, one behind the other.

        Args:
            address: where its allocation begins.
            seeds: of all its terms.
        """
        values: NDArray[np.int64] = self._offsets + self._is_address * address
        values[self._seeded] = seeds[self._seeds]
        return values
