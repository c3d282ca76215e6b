"""Writing a version folder, as :mod:`deltafmt.foreign.version_folder` reads it. It appears whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.folder_writer import DEFAULT_SHARD_BYTES, CheckpointWriter, TensorSpec
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import Remedy, UsageError
from deltafmt.foreign import version_folder as f
from deltafmt.foreign.checksums import checksum_hasher
from deltafmt.foreign.frames import compressor
from deltafmt.foreign.places import Places
from deltafmt.foreign.spill import Spill, file_pieces
from deltafmt.foreign.versions import Versions
from deltafmt.output import storage_error


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """What a version folder has of a changed tensor.

    Attributes:
        data: one zstd frame, in pieces.
        checksum: of the tensor's new bytes.
    """

    data: list[bytes]
    checksum: str


class VersionFolderWriter(CheckpointWriter):
    """Write a version folder. Call :meth:`add` for every tensor that changes, and :meth:`finish` once.

    Args:
        path: the folder to make.
        versions: its version and that of its base.
        encoding: one of :data:`deltafmt.foreign.version_folder.ENCODINGS`.
        checksum: one of :data:`deltafmt.foreign.checksums.CHECKSUMS`.
        force: replace ``path`` if it is a checkpoint or a version folder.
        shard_bytes: a shard ends once it has so many bytes.

    Raises:
        UsageError: the output exists.
        StorageError: the parent folder is missing, or writing failed.
    """

    def __init__(
        self,
        path: Path,
        versions: Versions,
        encoding: str,
        checksum: str,
        *,
        force: bool = False,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self._about = f.FolderIndex(versions, encoding, checksum)
        self._shard_bytes = shard_bytes
        self._spill: Spill | None = None
        self._checksums: dict[str, str] = {}
        self._shards: list[list[str]] = []
        super().__init__(path, [], force=force)

    def _make_shards(self, specs: list[TensorSpec], max_shard_bytes: int) -> None:
        """Do nothing: shards are made as tensors come."""

    def encode(self, base: Tensor, new: NDArray[np.uint8]) -> EncodedTensor | None:
        """Return what the folder has of a tensor; None if it does not change. Several threads may call this.

        Args:
            base: the base's tensor.
            new: its new bytes.

        Raises:
            UsageError: a position is too far for an overwrite.
        """
        if self._about.encoding == f.XOR:
            data = _xor(base, new)
        else:
            data = _overwrite(base, new)
        if data is None:
            return None
        hasher = checksum_hasher(self._about.checksum)
        hasher.update(np.ascontiguousarray(new).data)
        return EncodedTensor(data, hasher.hexdigest())

    def add(self, base: Tensor, encoded: EncodedTensor) -> None:
        """Write a changed tensor.

        Raises:
            StorageError: writing failed.
        """
        if self._spill is None:
            self._spill = Spill(self._partial)
        self._spill.add(base.name, "U8", sum(map(len, encoded.data)), *encoded.data)
        self._checksums[base.name] = encoded.checksum
        if self._spill.size >= self._shard_bytes:
            self._end_shard()

    def finish(self) -> None:
        """Write the last shard and the index, and give the folder its name.

        Raises:
            StorageError: writing failed.
        """
        self._end_shard()
        weight_map, count = {}, len(self._shards)
        try:
            for number, names in enumerate(self._shards):
                name = f"model-{number:05d}-of-{count:05d}.safetensors"
                os.rename(self._partial / _unfinished(number), self._partial / name)
                weight_map.update(dict.fromkeys(names, name))
        except OSError as error:
            raise storage_error("cannot write", self.path, error) from error
        versions = self._about.versions
        index = {
            "metadata": {
                f.VERSION: versions.version,
                f.BASE_VERSION: versions.base,
                f.ENCODING: self._about.encoding,
                f.COMPRESSION: f.ZSTD,
                f.CHECKSUM: self._about.checksum,
            },
            "weight_map": weight_map,
        }
        self.add_file(f.INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        self.commit()

    def abandon(self) -> None:
        """Remove what was written."""
        if self._spill is not None:
            self._spill.close()
        super().abandon()

    def _end_shard(self) -> None:
        spill, self._spill = self._spill, None
        if spill is None:
            return
        names = spill.names
        place = self._partial / _unfinished(len(self._shards))
        try:
            with open(place, "xb") as file:
                file.writelines(file_pieces([spill], {name: self._checksums.pop(name) for name in names}))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error("cannot write", self.path, error) from error
        finally:
            spill.close()
        self._shards.append(names)


def _unfinished(number: int) -> str:
    """Return the name of a shard before it is known how many there are."""
    return f"{number}.part"


def _xor(base: Tensor, new: NDArray[np.uint8]) -> list[bytes] | None:
    """Return one frame of the differences of all bytes; None if there are none."""
    frame, parts, changed, position = compressor(base.nbytes), [], False, 0
    for piece in base.pieces():
        old = np.frombuffer(piece, np.uint8)
        difference = old ^ new[position : position + old.size]
        changed = changed or bool(difference.any())
        parts.append(frame.compress(difference.data))
        position += old.size
    return [*parts, frame.flush()] if changed else None


def _overwrite(base: Tensor, new: NDArray[np.uint8]) -> list[bytes] | None:
    """Return one frame of the number of changed bytes, their positions and their new values; None if there are none."""
    found = Places(base, new, 1)
    if not found.count:
        return None
    if found.last > np.iinfo(f.POSITION).max:
        raise UsageError(
            f'tensor "{base.name}" changes behind its byte 2**32, which an overwrite cannot say',
            Remedy("encoding", f.XOR),
        )
    frame = compressor(f.POSITION.itemsize * (1 + found.count) + found.count)
    head = np.array([found.count], f.POSITION)
    parts = [frame.compress(piece.data) for piece in chain([head], found.places(f.POSITION), found.values())]
    return [*parts, frame.flush()]
