"""The digests of a fine-tune's weight files, taken of the chunks that worker threads read for other work."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltafmt.checkpoint.restored import FileHead
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.errors import StorageError
from deltafmt.methods.exact import Exact
from deltafmt.output import Bytes
from deltafmt.pipeline.chunk_hashes import Turns
from deltafmt.pipeline.job import PackJob
from deltafmt.pipeline.plan import Plan


class FileHash:
    """The digest of a weight file, of which several threads hash the chunks of tensors, each in its turn.

    A tensor that is expected has all of its chunks hashed, in order. Whatever lies between such tensors is read when it
    is its turn. A thread waits for those with earlier chunks, in tensors before too. So the work on chunks has to begin
    in the order in which tensors were expected. Whoever cannot hash its chunk says :meth:`fail`.

    Args:
        file: the weight file.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self._hasher = blake3()
        self._turns = Turns()
        self._expected = 0
        self._before: dict[int, int] = {}  # of each tensor's first byte, where the one expected before it ends

    def expect(self, tensor: Tensor) -> bool:
        """Expect the chunks of a tensor; return False if it has none, or a tensor behind it is expected already."""
        if not tensor.nbytes or tensor.offset < self._expected:
            return False
        self._before[tensor.offset] = self._expected
        self._expected = tensor.offset + tensor.nbytes
        return True

    def take(self, offset: int, data: Bytes) -> None:
        """Hash the bytes of a chunk once all bytes before it are hashed.

        Args:
            offset: of the chunk in the file.
            data: its bytes.

        Raises:
            StorageError: an earlier chunk could not be read.
        """
        begin = self._before.get(offset, offset)
        if not self._turns.wait(begin, offset):
            raise StorageError(f"{self._file.path}: an earlier part of it could not be read")
        self._read(begin, offset)
        self._hasher.update(data)
        self._turns.end(offset + len(data))

    def fail(self, offset: int) -> None:
        """Say that the work on a chunk has failed: unless it is hashed already, it will not be."""
        self._turns.fail(offset)

    def _read(self, first: int, end: int) -> None:
        """Hash bytes of the file that no chunk has."""
        if first < end:
            for piece in Tensor("", "U8", (end - first,), self._file, first, end - first).pieces():
                self._hasher.update(piece)

    def digest(self) -> bytes | None:
        """Return the digest, once all chunks are hashed; None if most of the file would have to be read for it."""
        if 2 * self._turns.next < self._file.size:
            return None
        self._read(self._turns.next, self._file.size)
        return self._hasher.digest()


def ascending(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of a file's tensors that ascend in the file and together have the most bytes, in their order."""
    # Of what a choice may end with: the offsets, the bytes of the best choice, and its last tensor with those before.
    # A choice that ends behind another one has more bytes.
    offsets: list[int] = []
    totals: list[int] = []
    chains: list[tuple[Tensor, Any] | None] = []
    for tensor in tensors:
        at = bisect_left(offsets, tensor.offset)
        total, before = (totals[at - 1], chains[at - 1]) if at else (0, None)
        total += tensor.nbytes
        end = at
        while end < len(totals) and totals[end] <= total:
            end += 1
        if tensor.nbytes:
            offsets[at:end], totals[at:end], chains[at:end] = [tensor.offset], [total], [(tensor, before)]
    found, chain = [], chains[-1] if chains else None
    while chain is not None:
        found.append(chain[0])
        chain = chain[1]
    return found[::-1]


class FileHashes:
    """The digests of all weight files of a job that restores them.

    Layers are packed in the order of their numbers, and most files have them in that of their letters: 0, 1, 10, 11, 2.
    What is out of order is read again, so those tensors are expected that ascend and have the most bytes. Of a file
    that would mostly be read again none are expected: it is read as a whole, behind the last tensor.

    Args:
        job: what is packed.
        plans: of the tensors that are still to be packed, in the order in which work on them begins.
    """

    def __init__(self, job: PackJob, plans: Sequence[Plan]) -> None:
        shards = [shard for _, shard in job.finetuned.weight_files()] if job.restores else []
        tensors: dict[Path, list[Tensor]] = {shard.path: [] for shard in shards}
        for plan in plans:
            tensor = plan.tensor
            # Tensors of other types do not lie in their file as they are.
            if type(tensor) is Tensor and isinstance(plan.method, Exact) and tensor.file.path in tensors:
                tensors[tensor.file.path].append(tensor)
        self._hashes: dict[Path, FileHash] = {}
        self._names: set[str] = set()
        for shard in shards:
            chosen = ascending(tensors[shard.path])
            if 2 * sum(tensor.nbytes for tensor in chosen) >= shard.size:
                self._hashes[shard.path] = FileHash(shard)
                self._names.update(tensor.name for tensor in chosen)

    def expect(self, tensor: Tensor) -> FileHash | None:
        """Return what takes the chunks of a tensor, all of them, in order; None if nothing does."""
        found = self._hashes.get(tensor.file.path) if tensor.name in self._names else None
        return found if found is not None and found.expect(tensor) else None

    def digest(self, head: FileHead) -> bytes:
        """Return the digest of a file, whose chunks are all hashed."""
        found = self._hashes.get(head.path)
        digest = None if found is None else found.digest()
        return head.digest() if digest is None else digest
