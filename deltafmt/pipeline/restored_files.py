"""The check of what a base and a delta file restore bit for bit: exact tensors, and whole weight files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from blake3 import blake3

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import is_index
from deltafmt.output import Bytes
from deltafmt.pipeline.bases import BaseTensors
from deltafmt.pipeline.exact_tensors import ExactTensor
from deltafmt.pipeline.workers import drain
from deltafmt.terms.buffers import raw_bytes

# Chunks that are restored ahead of the one that is digested, for each worker thread.
_AHEAD = 2


def check_restored(
    delta: DeltaFile, base: BaseTensors, entries: Sequence[TensorEntry], threads: int
) -> tuple[str, ...]:
    """Restore every exact tensor and every file of a delta in memory, piece by piece, and compare their digests.

    Args:
        delta: the delta file.
        base: its base, whose tensors are known to be those that were packed against.
        entries: the delta's entries.
        threads: worker threads.

    Returns:
        The names of the files.

    Raises:
        InvalidFileError: names the tensor, or the file, that is not what was packed.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="deltafmt-restore")
    check = _Check(delta, base, pool, threads)
    try:
        for name, file in delta.container.files.items():
            check.file(name, file.digest, bytes(delta.container.buffer(file.head)))
        for entry in entries:
            if entry.exact is not None and entry.name not in check.tensors:
                for _ in check.pieces(entry):
                    pass
    finally:
        drain(pool)
    return tuple(delta.container.files)


class _Check:
    """One run of the check.

    Attributes:
        tensors: the names of the exact tensors that were found right.
    """

    def __init__(self, delta: DeltaFile, base: BaseTensors, pool: ThreadPoolExecutor, threads: int) -> None:
        self.tensors: set[str] = set()
        self._delta = delta
        self._base = base
        self._pool = pool
        self._ahead = _AHEAD * threads

    def file(self, name: str, expected: bytes, head: bytes) -> None:
        """Digest a file as it would be restored."""
        digest = blake3(head)
        where = f'{self._delta.container.name}: files["{name}"]'
        for tensor in [] if is_index(name) else _order(head, where):
            named = f"{name.rpartition('/')[0]}/{tensor}" if "/" in name else tensor
            if named not in self._delta:
                raise InvalidFileError(f'{where}: the delta has no tensor "{named}"')
            for piece in self.pieces(self._delta.resolve(named)):
                digest.update(piece)
        if digest.digest() != expected:
            raise InvalidFileError(f"{where}: what is restored is not what was packed")

    def pieces(self, entry: TensorEntry) -> Iterator[Bytes]:
        """Give the bytes of a tensor; the fingerprint of an exact one is compared at its end."""
        base = self._base.find(entry)
        if entry.exact is None:
            if base is not None:
                yield from base.pieces()
            elif entry.data is not None:
                yield from self._delta.container.pieces(entry.data)
            return
        digest = hasher(entry.dtype, entry.shape)
        for piece in self._chunks(ExactTensor(self._delta, entry, base)):
            digest.update(piece)
            yield piece
        if digest.digest() != entry.exact.digest:
            where = f'{self._delta.container.name}: tensors["{entry.name}"]'
            raise InvalidFileError(f"{where}: what is restored is not what was packed")
        self.tensors.add(entry.name)

    def _chunks(self, exact: ExactTensor) -> Iterator[Bytes]:
        """Give the bytes of an exact tensor; some chunks are restored ahead."""
        waiting: list[Future[Bytes]] = []
        for number in range(len(exact)):
            waiting.append(self._pool.submit(_restored, exact, number))
            if len(waiting) > self._ahead:
                yield waiting.pop(0).result()
        for chunk in waiting:
            yield chunk.result()


def _restored(exact: ExactTensor, number: int) -> Bytes:
    return raw_bytes(exact.restore(number)[1])


def _order(head: bytes, where: str) -> list[str]:
    """Return the names of a weight file's tensors in the order in which they lie in it."""
    try:
        header = json.loads(head[8:])
        header.pop("__metadata__", None)
        places = {name: tuple(info["data_offsets"]) for name, info in header.items()}
        return sorted(places, key=places.__getitem__)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise InvalidFileError(f"{where}: the header is not valid: {error}") from error
