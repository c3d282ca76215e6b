"""Reading a version folder: a checkpoint-shaped folder whose shards hold compressed differences.

slime, Miles, SGLang's ``/pull_weights`` and ModelExpress write and read it. Its index says so by the key
``delta_encoding``. Every tensor of a shard is one zstd frame, a one-dimensional U8 tensor; the shard's metadata have
the checksum of the tensor's new bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor, unique_keys
from deltafmt.checkpoint.weight_choice import WeightChoice, check_shards, parse_weight_map
from deltafmt.errors import InvalidFileError, StorageError, UnsupportedError, WrongBaseError
from deltafmt.foreign.checksums import CHECKSUMS, checksum_hasher, is_checksum
from deltafmt.foreign.frames import Frame
from deltafmt.foreign.patch import VERSION_FOLDER, Tensors, find_base, named_tensor, whole
from deltafmt.foreign.places import check_ascending, put
from deltafmt.foreign.versions import Versions, read_versions
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular

INDEX: Final = "model.safetensors.index.json"
ENCODING: Final = "delta_encoding"
COMPRESSION: Final = "compression_format"
CHECKSUM: Final = "checksum_format"
VERSION: Final = "version"
BASE_VERSION: Final = "base_version"

XOR: Final = "xor"
OVERWRITE: Final = "overwrite"
ENCODINGS: Final = (XOR, OVERWRITE)
ZSTD: Final = "zstd"

# Positions of bytes in an overwrite have 4 bytes, and so has their number.
POSITION: Final = np.dtype("<u4")

_KEYS = (VERSION, BASE_VERSION, ENCODING, COMPRESSION, CHECKSUM)
_MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class FolderIndex:
    """What the index of a version folder says.

    Attributes:
        versions: the version, and the one that it was made on.
        encoding: one of :data:`ENCODINGS`.
        checksum: one of :data:`deltafmt.foreign.checksums.CHECKSUMS`.
    """

    versions: Versions
    encoding: str
    checksum: str


def read_folder_index(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    """Return the bytes of a folder's index of shards and its metadata; None if there is no such index, or it has none.

    Raises:
        InvalidFileError: the index is not valid.
        StorageError: it cannot be read.
    """
    where = path / INDEX
    try:
        data = read_regular(where)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("cannot read", where, error) from error
    try:
        index = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{where}: the index is not valid: {error}") from error
    metadata = index.get("metadata") if isinstance(index, dict) else None
    return (data, metadata) if isinstance(metadata, dict) else None


def parse_index(where: Path, metadata: dict[str, Any]) -> FolderIndex:
    """Return what the metadata of an index say.

    Raises:
        InvalidFileError: a key is missing, or its value is none that it can have.
        UnsupportedError: a key or a value is not known, so that the folder may mean something else.
    """
    for key in _KEYS:
        if key not in metadata:
            raise InvalidFileError(f"{where}: its metadata have no {key}")
    for key, value in metadata.items():
        if key not in (*_KEYS, "total_size"):
            raise UnsupportedError(f"{where}: the key {key!r} of its metadata is not known, and may change its meaning")
        if key in _KEYS and (not isinstance(value, str) or not 1 <= len(value) <= _MAX_TEXT):
            raise InvalidFileError(f"{where}: {key} is {value!r:.220}, not a short text")
    for key, known in ((ENCODING, ENCODINGS), (COMPRESSION, (ZSTD,)), (CHECKSUM, tuple(CHECKSUMS))):
        if metadata[key] not in known:
            raise UnsupportedError(f"{where}: {key} is {metadata[key]!r}, and only {', '.join(known)} can be read")
    versions = read_versions(where, metadata[VERSION], metadata[BASE_VERSION])
    return FolderIndex(versions, metadata[ENCODING], metadata[CHECKSUM])


class VersionFolder:
    """An open version folder; :class:`deltafmt.foreign.patch.Patch` says what it offers.

    Raises:
        InvalidFileError: the index or a shard is not valid, or they do not belong together.
        UnsupportedError: the index says what is not known.
        StorageError: a file cannot be read, or a shard is missing.
    """

    format = VERSION_FOLDER
    tells_base = True

    def __init__(self, path: Path) -> None:
        self.path = path
        where = path / INDEX
        found = read_folder_index(path)
        if found is None or ENCODING not in found[1]:
            raise InvalidFileError(f"{where}: not the index of a version folder: its metadata have no {ENCODING}")
        self._data, metadata = found
        self.index = parse_index(where, metadata)
        self.versions = self.index.versions
        wanted = parse_weight_map(where, self._data)
        files = tuple(sorted(set(wanted.values())))
        check_shards(path, WeightChoice(INDEX.removesuffix(".index.json"), files, INDEX))
        # Those who apply such a folder read every weight file in it, whatever its index says.
        spare = sorted(file.name for file in path.glob("*.safetensors") if file.name not in files)
        if spare:
            raise InvalidFileError(f"{where}: it does not name {spare[0]}, which lies beside it")
        self._shards: list[SafetensorsFile] = []
        self._tensors: dict[str, Tensor] = {}
        try:
            for name in files:
                self._open(path / name, wanted)
            missing = next((name for name in wanted if name not in self._tensors), None)
            if missing is not None:
                raise InvalidFileError(f'{where}: tensor "{missing}" is not in {wanted[missing]}')
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, wanted: dict[str, str]) -> None:
        shard = SafetensorsFile(path)
        self._shards.append(shard)
        for name, tensor in shard.tensors.items():
            where = named_tensor(path, name)
            if name in self._tensors:
                other = self._tensors[name].file.path.name
                raise InvalidFileError(f"{where}: it is in {other}, too; applied twice it would be wrong")
            if wanted.get(name) != path.name:
                raise InvalidFileError(f"{where}: {INDEX} does not say that it is here")
            if tensor.dtype != "U8" or len(tensor.shape) != 1:
                raise InvalidFileError(f"{where}: {tensor.dtype} {list(tensor.shape)} is not a row of compressed bytes")
            checksum = shard.metadata.get(name)
            if checksum is None:
                raise InvalidFileError(f"{where}: it has no checksum")
            if not is_checksum(self.index.checksum, checksum):
                raise InvalidFileError(f"{where}: {checksum[:80]!r} is not a checksum of {self.index.checksum}")
            self._tensors[name] = tensor

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that change."""
        return self._tensors.keys()

    def check(self, base: Tensors, where: Path) -> None:
        """Check that the base has the tensors, and that no frame declares another size than a tensor has."""
        for name, tensor in self._tensors.items():
            found = find_base(self.path, name, base, where)
            with tensor.pages(0, tensor.nbytes) as view:
                frame = self._frame(found, view)
            if self.index.encoding == XOR:
                try:
                    frame.expect(found.nbytes)
                except InvalidFileError as error:
                    raise WrongBaseError(f"wrong base {where}: {named_tensor(self.path, name)}: {error}") from error
            elif frame.size is not None and not POSITION.itemsize <= frame.size <= _longest_overwrite(found.nbytes):
                raise InvalidFileError(
                    f"{named_tensor(self.path, name)}: {frame.size:,} bytes change more than the {found.nbytes:,} of "
                    "the tensor"
                )

    def new_bytes(self, base: Tensor) -> NDArray[np.uint8]:
        """Return the new bytes of a tensor, whose checksum is then right."""
        tensor = self._tensors[base.name]
        where = named_tensor(self.path, base.name)
        out = whole(base)
        with tensor.pages(0, tensor.nbytes) as view:
            frame = self._frame(base, view)
            try:
                if self.index.encoding == XOR:
                    _apply_xor(frame, out)
                else:
                    _apply_overwrite(frame, out)
            except InvalidFileError as error:
                raise error.located(where) from error
        hasher = checksum_hasher(self.index.checksum)
        hasher.update(out.data)
        if hasher.hexdigest() != tensor.file.metadata[base.name]:
            raise WrongBaseError(
                f"{where}: its new bytes have another checksum: the base is not version {self.versions.base}, or the "
                "folder is damaged"
            )
        return out

    def _frame(self, base: Tensor, view: memoryview) -> Frame:
        most = base.nbytes if self.index.encoding == XOR else _longest_overwrite(base.nbytes)
        try:
            return Frame(view, most)
        except InvalidFileError as error:
            raise error.located(named_tensor(self.path, base.name)) from error

    def check_unchanged(self) -> None:
        """Check that neither the index nor a shard was replaced or written to since it was opened."""
        where = self.path / INDEX
        try:
            same = read_regular(where) == self._data
        except OSError as error:
            raise storage_error("cannot read", where, error) from error
        if not same:
            raise StorageError(f"{where} changed while it was being read")
        for shard in self._shards:
            shard.check_unchanged()

    def close(self) -> None:
        """Close the shards."""
        self._tensors = {}
        for shard in self._shards:
            shard.close()


def _longest_overwrite(nbytes: int) -> int:
    """Return the bytes of an overwrite that changes all bytes of a tensor: their number, positions and new values."""
    return POSITION.itemsize + nbytes * (POSITION.itemsize + 1)


def _apply_xor(frame: Frame, out: NDArray[np.uint8]) -> None:
    """Change bytes by those of a frame, which has one for each."""
    frame.expect(out.size)
    position = 0
    for piece in frame.pieces(out.size):
        out[position : position + len(piece)] ^= np.frombuffer(piece, np.uint8)
        position += len(piece)
    frame.finish()


def _apply_overwrite(frame: Frame, out: NDArray[np.uint8]) -> None:
    """Replace the bytes at some positions: their number, the positions and the new bytes follow each other."""
    count = int.from_bytes(frame.read(POSITION.itemsize), "little")
    if count > out.size:
        raise InvalidFileError(f"{count:,} positions are more than the {out.size:,} bytes of the tensor")
    frame.expect(POSITION.itemsize * (1 + count) + count)
    positions = np.frombuffer(frame.read(POSITION.itemsize * count), POSITION)
    check_ascending(positions, out.size, "position")
    first = 0
    for piece in frame.pieces(count):
        put(out, positions[first : first + len(piece)], np.frombuffer(piece, np.uint8))
        first += len(piece)
    frame.finish()
