"""A tensor whose bytes are kept in memory, for several readers: the checkpoint is read once for all of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from deltafmt.checkpoint.safetensors_file import PagedTensor, Tensor
from deltafmt.index.entries import BasePart


class Held:
    """The bytes of a tensor, and its fingerprint once somebody has asked for it.

    Args:
        source: the tensor, which is read whole.
    """

    def __init__(self, source: Tensor) -> None:
        data, end = bytearray(source.nbytes), 0
        for piece in source.pieces():
            data[end : end + len(piece)] = piece
            end += len(piece)
        self.source = source
        self.view = memoryview(data).toreadonly()
        self._digest: bytes | None = None
        self._lock = threading.Lock()

    def fingerprint(self, tensor: Tensor) -> bytes:
        """Return the fingerprint; threads that ask while it is taken wait for it."""
        with self._lock:
            if self._digest is None:
                self._digest = Tensor.fingerprint(tensor)
            return self._digest


@dataclass(frozen=True, slots=True)
class HeldTensor(PagedTensor):
    """A tensor that is read from memory.

    Attributes:
        held: its bytes.
    """

    held: Held | None = None

    @classmethod
    def of(cls, source: Tensor) -> HeldTensor:
        """Read a tensor, and return it as one in memory."""
        return cls(
            source.name,
            source.dtype,
            source.shape,
            source.file,
            source.offset,
            source.nbytes,
            source.leading,
            Held(source),
        )

    def parts(self) -> tuple[BasePart, ...]:
        """Return the tensors of the checkpoint whose elements follow each other in this one."""
        return self._held().source.parts()

    def will_need(self) -> None:
        """Do nothing: the bytes are there."""

    @contextlib.contextmanager
    def pages(self, start: int, length: int) -> Iterator[memoryview]:
        """Give a view of some bytes."""
        yield self._held().view[start : start + length]

    def fingerprint(self) -> bytes:
        """Return the BLAKE3 of dtype, shape and bytes."""
        return self._held().fingerprint(self)

    def _held(self) -> Held:
        assert self.held is not None
        return self.held
