"""The fingerprint of a tensor, taken of the chunks that worker threads read for other work: each is read once."""

from __future__ import annotations

import threading

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import StorageError
from deltafmt.output import Bytes


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
        self._turn = threading.Condition()
        self._next = self._hashed = 0
        self._failed: int | None = None  # the first chunk that will not be hashed

    @property
    def failed(self) -> bool:
        """True if a chunk could not be hashed, so that there is no fingerprint."""
        return self._failed is not None

    def take(self, number: int, data: Bytes) -> None:
        """Hash the bytes of a chunk once those of all chunks before it are hashed; there may be none.

        Raises:
            StorageError: an earlier chunk could not be read.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._next == number or self._is_lost(number))
            if self._next != number:
                raise StorageError(f'tensor "{self._tensor.name}": an earlier part of it could not be read')
        # Nobody else has a turn now.
        self._hasher.update(data)
        with self._turn:
            self._hashed += len(data)
            self._next = number + 1
            self._turn.notify_all()

    def fail(self, number: int) -> None:
        """Say that the work on a chunk has failed: unless it is hashed already, it will not be."""
        with self._turn:
            if self._next <= number and (self._failed is None or number < self._failed):
                self._failed = number
                self._turn.notify_all()

    def _is_lost(self, number: int) -> bool:
        """Tell whether a chunk before this one will not be hashed."""
        return self._failed is not None and self._failed < number

    def digest(self) -> bytes:
        """Return the fingerprint, once all chunks are hashed; the tensor may have bytes behind them."""
        if self._hashed < self._tensor.nbytes:
            for piece in self._tensor.pieces(self._hashed):
                self._hasher.update(piece)
        return self._hasher.digest()
