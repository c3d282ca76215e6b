"""Equal files and equal tensors of several checkpoints.

Little is read that need not be: files of a size that no other has, and tensors of a dtype and shape that no other has,
or whose first bytes are like no other's, cannot be copies. What is left is hashed with BLAKE3. Only digests are kept.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from blake3 import blake3

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.restored import file_digest, read_heads
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.errors import InvalidFileError
from deltafmt.output import storage_error

# Tensors that differ usually do so within so many bytes.
HEAD: Final = 64 * 1024

Item = TypeVar("Item")

# What identifies a tensor among those of several checkpoints: the checkpoint's number, and the tensor's name.
Place = tuple[int, str]


@dataclass(frozen=True, slots=True)
class EqualFiles:
    """Files with the same bytes.

    Attributes:
        size: bytes of each.
        paths: the files. Those that are links to one file on disk count once.
    """

    size: int
    paths: tuple[Path, ...]

    @property
    def redundant(self) -> int:
        """Bytes of all but one."""
        return self.size * (len(self.paths) - 1)


@dataclass(frozen=True, slots=True)
class EqualTensors:
    """Tensors of the same dtype, shape and bytes.

    Attributes:
        dtype, shape, nbytes: of each.
        places: the number of the checkpoint, and the name of the tensor in it.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    places: tuple[Place, ...]

    @property
    def redundant(self) -> int:
        """Bytes of all but one."""
        return self.nbytes * (len(self.places) - 1)


class TensorDigests:
    """The fingerprints of the tensors that may have copies, by checkpoint and name.

    Args:
        checkpoints: the checkpoints, open.
        pool: worker threads.
        step: called with the number of tensors that are done, and of all that are looked at.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], pool: ThreadPoolExecutor, step: Callable[[int, int], None]
    ) -> None:
        every = [(number, tensor) for number, each in enumerate(checkpoints) for tensor in each.tensors.values()]
        alike = list(_shared(every, lambda item: (item[1].dtype, item[1].shape)))
        heads = pool.map(_head, (tensor for _, tensor in alike))
        keyed = [(head, *item) for head, item in zip(heads, alike, strict=True)]
        candidates = list(_shared(keyed, lambda item: item[0]))
        # A small tensor has been hashed whole.
        long = [(number, tensor) for _, number, tensor in candidates if tensor.nbytes > HEAD]
        self._found = {(number, tensor.name): head for head, number, tensor in candidates if tensor.nbytes <= HEAD}
        digests = pool.map(Tensor.fingerprint, (tensor for _, tensor in long))
        for done, ((number, tensor), digest) in enumerate(zip(long, digests, strict=True), 1):
            self._found[number, tensor.name] = digest
            step(done, len(long))
        self._tensors = {(number, tensor.name): tensor for number, tensor in every}

    def get(self, number: int, name: str) -> bytes | None:
        """Return the fingerprint of a tensor; None if no other is like it."""
        return self._found.get((number, name))

    def equal(self, one: Place, other: Place) -> bool:
        """Tell whether two tensors have the same dtype, shape and bytes."""
        digest = self._found.get(one)
        return digest is not None and digest == self._found.get(other)

    def groups(self) -> list[EqualTensors]:
        """Return the tensors that have copies, those that take most first."""
        by_digest: dict[bytes, list[Place]] = defaultdict(list)
        for place, digest in self._found.items():
            by_digest[digest].append(place)
        found = []
        for places in by_digest.values():
            tensor = self._tensors[places[0]]
            if len(places) > 1 and tensor.nbytes:
                found.append(EqualTensors(tensor.dtype, tensor.shape, tensor.nbytes, tuple(sorted(places))))
        return sorted(found, key=lambda group: (-group.redundant, group.places))


def _head(tensor: Tensor) -> bytes:
    """Return the BLAKE3 of dtype, shape and first bytes: the fingerprint, if these are all."""
    digest = hasher(tensor.dtype, tensor.shape)
    digest.update(tensor.head(HEAD))
    return digest.digest()


def _shared(items: Sequence[Item], key: Callable[[Item], Hashable]) -> Iterator[Item]:
    """Give the items whose key another item has, too."""
    count: dict[Hashable, int] = defaultdict(int)
    for item in items:
        count[key(item)] += 1
    return (item for item in items if count[key(item)] > 1)


def equal_files(
    checkpoints: Sequence[Checkpoint], digests: TensorDigests, pool: ThreadPoolExecutor
) -> list[EqualFiles]:
    """Return the files of checkpoints' folders that have copies, those that take most first.

    Hidden files, and folders behind links, are not looked at.

    Raises:
        StorageError: a file cannot be read.
    """
    weights: dict[Path, tuple[int, SafetensorsFile]] = {}
    places: dict[tuple[int, int], tuple[int, Path]] = {}
    for number, checkpoint in enumerate(checkpoints):
        weights |= {shard.path: (number, shard) for _, shard in checkpoint.weight_files()}
        for path in _files(checkpoint.path):
            try:
                stat = path.stat()
            except OSError as error:
                raise storage_error("cannot read", path, error) from error
            if stat.st_size:
                places.setdefault((stat.st_dev, stat.st_ino), (stat.st_size, path))
    same_size = list(_shared(list(places.values()), lambda item: item[0]))
    heads = {number: _covered(checkpoint) for number, checkpoint in enumerate(checkpoints)}

    def signature(path: Path) -> Any:
        """Return what files of one size and equal bytes have in common; None for a file that has no copy."""
        if path not in weights:
            return _file_digest(path)
        number, shard = weights[path]
        head = heads[number].get(path)
        if head is None:
            return _file_digest(path)
        digest = blake3(head)
        prefix = _prefix(checkpoints[number], path)
        for tensor in sorted(shard.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            own = digests.get(number, prefix + tensor.name)
            if own is None:
                return None
            digest.update(own)
        return "weights", digest.digest()

    groups: dict[Any, list[Path]] = defaultdict(list)
    sizes = {path: size for size, path in same_size}
    for path, found in zip(sizes, pool.map(signature, sizes), strict=True):
        if found is not None:
            groups[sizes[path], found].append(path)
    equal = [EqualFiles(size, tuple(paths)) for (size, _), paths in groups.items() if len(paths) > 1]
    return sorted(equal, key=lambda group: (-group.redundant, group.paths))


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, names, files in os.walk(path):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            found = Path(folder) / name
            if not name.startswith(".") and found.is_file():
                yield found


def _covered(checkpoint: Checkpoint) -> Mapping[Path, bytes]:
    """Return the heads of the weight files that consist of a head and tensors alone."""
    try:
        return {found.path: found.head for found in read_heads(checkpoint).values()}
    except InvalidFileError:
        return {}


def _prefix(checkpoint: Checkpoint, path: Path) -> str:
    """Return what stands before the names of a weight file's tensors: its folder, in a checkpoint of several."""
    if not checkpoint.path.is_dir():
        return ""
    folder = str(path.parent.relative_to(checkpoint.path))
    return "" if folder == "." else f"{folder}/"


def _file_digest(path: Path) -> bytes:
    try:
        return file_digest(path)
    except OSError as error:
        raise storage_error("cannot read", path, error) from error


def redundant(groups: Iterable[EqualFiles] | Iterable[EqualTensors]) -> int:
    """Return the bytes of all copies but one of each."""
    return sum(group.redundant for group in groups)
