"""A delta whose packed buffers lie on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.operand import Operand


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTensor:
    """One tensor of a delta on a device.

    Attributes:
        entry: its entry in the file; for an alias, that of its target.
        terms: the packed terms of an ``add``.
        data: the values of a ``replace`` (with the tensor's dtype and shape), or the new rows of an ``add`` that grew
            (shape (new rows, columns)); otherwise None.
    """

    entry: TensorEntry
    terms: tuple[Operand, ...] = ()
    data: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DeviceDelta(Mapping[str, DeviceTensor]):
    """The tensors of a delta by name, on one device; what :func:`deltafmt.torch.load` returns.

    Attributes:
        device: where the buffers lie.
        content_id: of the file, in hexadecimal, as the file claims it: a load compares checksums, and no digests.
        metadata: of the file.
        nbytes: bytes of the device allocation that holds every buffer.
        tensors: by name; made when they are first asked for, which can raise InvalidFileError.
    """

    device: torch.device
    content_id: str
    metadata: Mapping[str, str]
    nbytes: int
    tensors: Mapping[str, DeviceTensor] = field(repr=False)

    def __getitem__(self, name: str) -> DeviceTensor:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
