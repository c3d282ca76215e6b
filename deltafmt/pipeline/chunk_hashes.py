"""The fingerprint of a tensor, taken of the chunks that worker threads read for other work: each is read once."""

from __future__ import annotations

import threading

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import StorageError
from deltafmt.output import Bytes


class Turns:
    """The turns of threads that hash parts of one whole: each waits for those with earlier parts."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._next = 0
        self._failed: int | None = None

    @property
    def next(self) -> int:
        """The place up to which all is hashed."""
        return self._next

    @property
    def failed(self) -> bool:
        """True if a part will not be hashed."""
        return self._failed is not None

    def wait(self, begin: int, part: int) -> bool:
        """Wait until all up to a place is hashed; return False if a part before this one will not be.

        Until :meth:`end`, nobody else has a turn.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._next == begin or (self._failed is not None and self._failed < part))
            return self._next == begin

    def end(self, place: int) -> None:
        """End a turn: all up to a place is hashed."""
        with self._turn:
            self._next = place
            self._turn.notify_all()

    def fail(self, part: int) -> None:
        """Say that the work on a part has failed: unless it is hashed already, it will not be."""
        with self._turn:
            if self._next <= part and (self._failed is None or part < self._failed):
                self._failed = part
                self._turn.notify_all()


class ChunkHashes:
    """The fingerprint of a tensor whose chunks are hashed by several threads, each in its turn.

    A thread waits for those with earlier chunks. So the work on chunks has to begin in their order. Whoever cannot hash
    its chunk says :meth:`fail`, so that the others do not wait for it.

    Args:
        tensor: the tensor.

    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._hasher = hasher(tensor.dtype, tensor.shape)
        self._turns = Turns()
        self._hashed = 0

    @property
    def failed(self) -> bool:
        """True if a chunk could not be hashed, so that there is no fingerprint."""
        return self._turns.failed

    def take(self, number: int, data: Bytes) -> None:
        """Hash the bytes of a chunk once those of all chunks before it are hashed; there may be none.

        Raises:
            StorageError: an earlier chunk could not be read.
        """
        if not self._turns.wait(number, number):
            raise StorageError(f'tensor "{self._tensor.name}": an earlier part of it could not be read')
        self._hasher.update(data)
        self._hashed += len(data)
        self._turns.end(number + 1)

    def fail(self, number: int) -> None:
        """Say that the work on a chunk has failed: unless it is hashed already, it will not be."""
        self._turns.fail(number)

    def digest(self) -> bytes:
        """Return the fingerprint, once all chunks are hashed; the tensor may have bytes behind them."""
        if self._hashed < self._tensor.nbytes:
            for piece in self._tensor.pieces(self._hashed):
                self._hasher.update(piece)
        return self._hasher.digest()
