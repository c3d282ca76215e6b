"""The check of what is restored bit for bit: exact tensors, and whole weight files (spec, sections 7.10 and 17.6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from blake3 import blake3

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.checkpoint.restored import check_heads
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import DeltaFile, RunDecoder
from deltafmt.errors import InvalidFileError
from deltafmt.index.entries import TensorEntry
from deltafmt.output import Bytes
from deltafmt.pipeline.bases import BaseTensors
from deltafmt.pipeline.exact_tensors import ExactTensor
from deltafmt.pipeline.workers import worker_pool
from deltafmt.terms.buffers import raw_bytes

# Chunks that are restored ahead of the one that is digested, for each worker thread.
_AHEAD = 1


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
        InvalidFileError: names the tensor, or the file, that is not what was packed; or the terms of what is restored
            take more than the file's limits.
    """
    files = read_files(delta, entries)
    # A file's tensor need not be exact: what terms give is the same everywhere (10.4).
    inside = [delta.resolve(name) for _, tensors in files.values() for name in tensors]
    known = {entry.name for entry in inside}
    alone = [entry for entry in entries if entry.exact is not None and entry.name not in known]
    delta.check_work((entry for entry in (*inside, *alone) if entry.terms), base.checkpoint.nbytes, restores=True)
    with worker_pool(threads, "restore") as pool:
        check = _Check(delta, base, pool, threads)
        for name, (head, tensors) in files.items():
            check.file(name, head, tensors)
        for entry in alone:
            for _ in check.pieces(entry):
                pass
    return tuple(delta.container.files)


def read_files(delta: DeltaFile, entries: Sequence[TensorEntry]) -> dict[str, tuple[bytes, list[str]]]:
    """Return the head and the tensors, in order, of every file that a delta restores.

    Raises:
        InvalidFileError: a head is not valid, or the tensors in the files are not the delta's.
    """
    container = delta.container
    if not container.files:
        return {}
    heads = {name: bytes(container.buffer(file.head)) for name, file in container.files.items()}
    try:
        places = check_heads(heads, [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries])
    except InvalidFileError as error:
        raise error.located(container.name) from error
    return {name: (head, list(places.get(name, ()))) for name, head in heads.items()}


class _Check:
    """One run of the check."""

    def __init__(self, delta: DeltaFile, base: BaseTensors, pool: ThreadPoolExecutor, threads: int) -> None:
        self._delta = delta
        self._base = base
        self._pool = pool
        self._ahead = _AHEAD * threads

    def file(self, name: str, head: bytes, tensors: Sequence[str]) -> None:
        """Digest a file as it would be restored."""
        digest = blake3(head)
        for tensor in tensors:
            for piece in self.pieces(self._delta.resolve(tensor)):
                digest.update(piece)
        container = self._delta.container
        if digest.digest() != container.files[name].digest:
            raise InvalidFileError(f'{container.name}: files["{name}"]: what is restored is not what was packed')

    def pieces(self, entry: TensorEntry) -> Iterator[Bytes]:
        """Give the bytes of a tensor; the fingerprint of an exact one is compared at its end."""
        base = self._base.find(entry)
        if entry.exact is None:
            if entry.terms and base is not None:
                yield from _summed(self._delta, entry, base)
            elif base is not None:
                yield from base.pieces()
            if entry.data is not None:
                yield from self._delta.container.pieces(entry.data)
            self._forget(entry, base)
            return
        digest = hasher(entry.dtype, entry.shape)
        for piece in self._chunks(ExactTensor(self._delta, entry, base)):
            digest.update(piece)
            yield piece
        self._forget(entry, base)
        if digest.digest() != entry.exact.digest:
            where = f'{self._delta.container.name}: tensors["{entry.name}"]'
            raise InvalidFileError(f"{where}: what is restored is not what was packed")

    def _forget(self, entry: TensorEntry, base: Tensor | None) -> None:
        """Give back the memory of what a tensor was restored from."""
        if base is not None:
            base.forget()
        self._delta.container.release(entry)

    def _chunks(self, exact: ExactTensor) -> Iterator[Bytes]:
        """Give the bytes of an exact tensor; some chunks are restored ahead."""
        waiting: list[Future[Bytes]] = []
        for number in range(len(exact)):
            waiting.append(self._pool.submit(_restored, exact, number))
            if len(waiting) > self._ahead:
                yield waiting.pop(0).result()
        for chunk in waiting:
            yield chunk.result()


def _summed(delta: DeltaFile, entry: TensorEntry, base: Tensor) -> Iterator[Bytes]:
    """Give the bytes of the rows of a tensor that is its base plus terms."""
    decoder = RunDecoder(delta, entry)
    for start, stop in decoder.ranges():
        with base.row_range(start, stop) as rows:
            yield raw_bytes(decoder.add(start, stop, rows, base.dtype, entry.dtype))


def _restored(exact: ExactTensor, number: int) -> Bytes:
    return raw_bytes(exact.restore(number)[1])
