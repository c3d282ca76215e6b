"""Weight files that are restored byte for byte: what lies before their tensors, and where each tensor lies."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from deltafmt.checkpoint.folder import Checkpoint, read_file
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.checkpoint.in_place import PatchedFolder
from deltafmt.checkpoint.safetensors_file import unique_keys
from deltafmt.errors import InvalidFileError
from deltafmt.index.exact import is_index, is_restored
from deltafmt.output import Bytes, storage_error

# Bytes of a file that are read at once for its digest.
_DIGEST_STEP = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileHead:
    """A file of a checkpoint that can be restored.

    Attributes:
        path: the file.
        head: of a weight file the bytes before its tensors, of an index the whole file.
    """

    path: Path
    head: bytes

    def digest(self) -> bytes:
        """Return the BLAKE3 of the file."""
        return file_digest(self.path)


def file_digest(path: Path) -> bytes:
    """Return the BLAKE3 of a file."""
    digest = blake3(max_threads=blake3.AUTO)
    # Read, not mapped: pages of a map would count as memory of this process. One buffer stays in the cache.
    buffer = memoryview(bytearray(_DIGEST_STEP))
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.digest()


def read_heads(checkpoint: Checkpoint) -> dict[str, FileHead]:
    """Return the weight files of a checkpoint and the indexes of its shards, by their paths in its folder.

    Raises:
        InvalidFileError: a file has bytes that belong to no tensor, so that its tensors do not give it.
    """
    found = {}
    for name, shard in checkpoint.weight_files():
        position = start = 8 + int.from_bytes(shard.view[:8], "little")
        for tensor in sorted(shard.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != position:
                raise _not_covered(shard.path, position, tensor.offset)
            position += tensor.nbytes
        if position != shard.size:
            raise _not_covered(shard.path, position, shard.size)
        head = bytes(shard.view[:start])
        try:
            _rows_of(head)
        except ValueError as error:
            raise InvalidFileError(
                f"{shard.path}: its header cannot be restored byte for byte: {error}; save it again with safetensors"
            ) from error
        found[name] = FileHead(shard.path, head)
    for name in checkpoint.indexes:
        found[name] = FileHead(checkpoint.path / name, read_file(checkpoint.path / name))
    for name, file in found.items():
        if not is_restored(name):
            raise InvalidFileError(f"{file.path}: a weight file of this name cannot be restored; name it *.safetensors")
    return found


def _not_covered(path: Path, start: int, end: int) -> InvalidFileError:
    return InvalidFileError(
        f"{path}: bytes {start} to {end} belong to no tensor, so the file cannot be restored byte for byte; save it "
        "again with safetensors"
    )


class WrittenDigest:
    """The BLAKE3 of a file that several threads write: whoever writes what comes next in the file also hashes it.

    What was written before its turn is read back, most often from the processor's cache. No thread waits for another.

    Args:
        descriptor: the file.
        head: the bytes at its beginning, which are written already.
        step: bytes that are read at once.
    """

    def __init__(self, descriptor: int, head: bytes, step: int = _DIGEST_STEP) -> None:
        self._descriptor = descriptor
        self._step = step
        self._digest = blake3(head)
        self._position = self._start = len(head)
        self._ends: dict[int, int] = {}  # of what was written before its turn, by its beginning
        self._is_busy = False
        self._lock = threading.Lock()

    @property
    def has_begun(self) -> bool:
        """True if anything behind the head is hashed."""
        return self._position > self._start

    def written(self, offset: int, data: Bytes) -> None:
        """Say that some bytes were written, each byte of the file once.

        Raises:
            OSError: reading failed.
        """
        view = memoryview(data).cast("B")
        if not len(view):
            return
        with self._lock:
            if self._is_busy or offset != self._position:
                self._ends[offset] = offset + len(view)
                return
            self._is_busy = True
        end: int | None = offset + len(view)
        self._digest.update(view)
        while end is not None:
            with self._lock:
                self._position = end
                end = self._ends.pop(end, None)
                self._is_busy = end is not None
            if end is not None:
                self._read(end)

    def digest(self, size: int) -> bytes:
        """Return the digest of the file's first bytes, once all are written."""
        self._read(size)
        self._position = max(self._position, size)
        return self._digest.digest()

    def _read(self, end: int) -> None:
        """Hash what lies between what is hashed and a place."""
        for offset in range(self._position, end, self._step):
            length = min(self._step, end - offset)
            piece = os.pread(self._descriptor, length, offset)
            if len(piece) != length:
                raise OSError(f"it has fewer than {end} bytes")
            self._digest.update(piece)


class FolderRestorer(CheckpointWriter):
    """Write a checkpoint folder whose weight files are those that were packed.

    Args:
        path: the folder to make.
        specs: every tensor that will be written.
        heads: the bytes before the tensors of each weight file, and whole indexes, by their paths in the folder.
        force: replace ``path`` if it is a folder that exists.
        patched: the folder that ``path`` is, whose other files stay.

    Raises:
        UsageError: the output exists.
        InvalidFileError: the heads do not fit the tensors.
        StorageError: the parent folder is missing, or writing failed.
    """

    def __init__(
        self,
        path: Path,
        specs: list[TensorSpec],
        heads: Mapping[str, bytes],
        *,
        force: bool = False,
        patched: PatchedFolder | None = None,
    ) -> None:
        self._heads = heads
        self._digests: dict[str, WrittenDigest] = {}
        super().__init__(path, specs, force=force, patched=patched)

    def _make_shards(self, specs: list[TensorSpec], max_shard_bytes: int) -> None:  # noqa: ARG002
        try:
            for name, places in check_heads(self._heads, specs).items():
                self._place(name, places)
            for name, head in self._heads.items():
                if is_index(name):
                    self.add_file(name, head)
        except BaseException:
            self.abandon()
            raise

    def _place(self, name: str, places: Mapping[str, tuple[int, int]]) -> None:
        """Make a weight file, and note the places of its tensors."""
        head = self._heads[name]
        for tensor, (start, _) in places.items():
            self._places[tensor] = (len(self._files), len(head) + start)
        size = len(head) + max((end for _, end in places.values()), default=0)
        self._make_file(name, head, size)
        self._digests[name] = WrittenDigest(self._files[-1], head)

    def order(self, name: str) -> tuple[int, int]:
        """Return by what tensors are sorted as they lie in the files."""
        return self._places[name]

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write some bytes of a tensor, each once, as :meth:`CheckpointWriter.write` does.

        Raises:
            StorageError: writing, or reading what was written, failed.
        """
        super().write(name, offset, data)
        file, start = self._places[name]
        try:
            self._digests[self.weights[file]].written(start + offset, data)
        except OSError as error:
            raise storage_error("cannot read", self.path, error) from error

    def restored_digest(self, name: str) -> bytes:
        """Return the BLAKE3 of a file, once all is written.

        Raises:
            StorageError: reading failed.
        """
        path, digest = self._partial / name, self._digests.get(name)
        try:
            if digest is None or not digest.has_begun:
                return file_digest(path)
            return digest.digest(path.stat().st_size)
        except OSError as error:
            raise storage_error("cannot read", path, error) from error


def check_heads(heads: Mapping[str, bytes], specs: Iterable[TensorSpec]) -> dict[str, dict[str, tuple[int, int]]]:
    """Return where each tensor lies behind the head of its weight file, as (start, end), by file and tensor.

    Args:
        heads: the bytes before the tensors of each weight file, and whole indexes, by their paths in the folder.
        specs: every tensor.

    Raises:
        InvalidFileError: a head is not valid, or the tensors in the files are not those.
    """
    left = {spec.name: spec for spec in specs}
    found = {}
    for name, head in heads.items():
        if not is_index(name):
            found[name] = _read_head(f'files["{name}"]', name.rpartition("/")[0], head, left)
    if left:
        raise InvalidFileError(f'tensor "{next(iter(left))}" lies in no weight file')
    return found


def _read_head(where: str, folder: str, head: bytes, left: dict[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Return the places of a file's tensors in their order, and take their specs from those that are left."""
    try:
        rows = _rows_of(head)
    except ValueError as error:
        raise InvalidFileError(f"{where}: the header is not valid: {error}") from error
    places, position = {}, 0
    for start, end, name, dtype, shape in rows:
        tensor = f"{folder}/{name}" if folder else name
        if tensor not in left:
            raise InvalidFileError(f'{where}: the delta lacks tensor "{tensor}", or another file has it')
        spec = left.pop(tensor)
        if (dtype, shape) != (spec.dtype, spec.shape):
            raise InvalidFileError(f'{where}: tensor "{tensor}" has another dtype or shape')
        if (start, end) != (position, position + spec.nbytes):
            raise InvalidFileError(f'{where}: tensor "{tensor}" lies at {start} to {end}, where {position} is next')
        places[tensor] = (position, position := end)
    return places


def _rows_of(head: bytes) -> list[tuple[int, int, str, str, tuple[int, ...]]]:
    """Return start, end, name, dtype and shape of the tensors that a head names, in the order of their places.

    Raises:
        ValueError: it is not the head of a weight file (section 7.10).
    """
    if int.from_bytes(head[:8], "little") != len(head) - 8:
        raise ValueError("it has another length")
    try:
        header = json.loads(
            str(head[8:], "utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_natural,
            parse_float=_natural,
            parse_constant=_natural,
        )
        json.dumps(header, ensure_ascii=False).encode()  # refuses half a pair of surrogates
    except RecursionError as error:
        raise ValueError("its maps or lists are nested too deeply") from error
    if type(header) is not dict:
        raise ValueError("it is not a map")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("__metadata__ is not a map from string to string")
    return sorted((_row_of(name, info) for name, info in header.items()), key=lambda row: row[:2])


def _row_of(name: str, info: object) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Return what a header says of a tensor."""
    if type(info) is not dict or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected the keys dtype, shape and data_offsets")
    dtype, shape, places = info["dtype"], info["shape"], info["data_offsets"]
    for numbers in (shape, places):
        if type(numbers) is not list or not all(type(number) is int for number in numbers):
            raise ValueError(f"{name}: {numbers!r} is not a list of integers")
    if type(dtype) is not str or len(places) != 2:
        raise ValueError(f"{name}: no valid dtype and data_offsets")
    return places[0], places[1], name, dtype, tuple(shape)


def _natural(text: str) -> int:
    """Return a number of a header: an integer from 0 on."""
    if not text.isdecimal():
        raise ValueError(f"{text} is not an integer from 0 on")
    return int(text)
