"""Weight files that are restored byte for byte: what lies before their tensors, and where each tensor lies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from deltafmt.checkpoint.folder import Checkpoint, read_file
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec, write_at
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.errors import InvalidFileError
from deltafmt.index.exact import is_index, is_restored


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
    digest.update_mmap(path)
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
        found[name] = FileHead(shard.path, bytes(shard.view[:start]))
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


class FolderRestorer(CheckpointWriter):
    """Write a checkpoint folder whose weight files are those that were packed.

    Args:
        path: the folder to make.
        specs: every tensor that will be written.
        heads: the bytes before the tensors of each weight file, and whole indexes, by their paths in the folder.
        force: replace ``path`` if it is a folder that exists.

    Raises:
        UsageError: the output exists.
        InvalidFileError: the heads do not fit the tensors.
        StorageError: the parent folder is missing, or writing failed.
    """

    def __init__(self, path: Path, specs: list[TensorSpec], heads: Mapping[str, bytes], *, force: bool = False) -> None:
        self._heads = heads
        super().__init__(path, specs, force=force)

    def _make_shards(self, specs: list[TensorSpec], max_shard_bytes: int) -> None:  # noqa: ARG002
        left = {spec.name: spec for spec in specs}
        try:
            for name, head in self._heads.items():
                if is_index(name):
                    self.add_file(name, head)
                else:
                    self._place(name, head, left)
            if left:
                raise InvalidFileError(f'tensor "{next(iter(left))}" lies in no weight file')
        except BaseException:
            self.abandon()
            raise

    def _place(self, name: str, head: bytes, left: dict[str, TensorSpec]) -> None:
        """Make a weight file of its final size, and find the places of its tensors."""
        where, folder = f'files["{name}"]', f"{name.rpartition('/')[0]}/" if "/" in name else ""
        if int.from_bytes(head[:8], "little") != len(head) - 8:
            raise InvalidFileError(f"{where}: the header is not valid: it has another length")
        try:
            names = [folder + key for key in json.loads(head[8:]) if key != "__metadata__"]
        except (ValueError, RecursionError, TypeError) as error:
            raise InvalidFileError(f"{where}: the header is not valid: {error}") from error
        mine = [left.pop(each) for each in names if each in left]
        if len(mine) != len(names):
            raise InvalidFileError(f"{where}: it has a tensor that the delta lacks, or that another file has")
        place = self._partial / name
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(descriptor)
        write_at(descriptor, head, 0)
        os.ftruncate(descriptor, len(head) + sum(spec.nbytes for spec in mine))
        try:
            tensors = placed_tensors(place, folder)
        except InvalidFileError as error:
            raise InvalidFileError(f"{where}: {str(error).removeprefix(f'{place}: ')}") from error
        for spec in mine:
            tensor = tensors[spec.name]
            if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape) or tensor.offset < len(head):
                raise InvalidFileError(f'{where}: tensor "{spec.name}" has another dtype or shape')
            self._places[spec.name] = (len(self._files) - 1, tensor.offset)

    def restored_digest(self, name: str) -> bytes:
        """Return the BLAKE3 of a file as it is now."""
        return file_digest(self._partial / name)


def placed_tensors(path: Path, folder: str) -> dict[str, Tensor]:
    """Return the tensors of a weight file by their names, with the folder in front.

    Raises:
        InvalidFileError: the file's header is wrong.
    """
    file = SafetensorsFile(path)
    try:
        return {folder + name: tensor for name, tensor in file.tensors.items()}
    finally:
        file.close()
