"""Writing a checkpoint folder that loads: shards, an index and small files; the folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltafmt.checkpoint.components import loader_folders
from deltafmt.checkpoint.exchange import exchange
from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.in_place import WHOLE, PatchedFolder, lock_of, partial_of, replaced_of
from deltafmt.checkpoint.safetensors_file import STEP
from deltafmt.checkpoint.weight_choice import read_json
from deltafmt.checkpoint.weight_names import USUAL_NAMES, WeightNames, index_name, shard_name
from deltafmt.errors import InvalidFileError, Remedy, StorageError, UsageError
from deltafmt.format import constants as c
from deltafmt.output import OutputLock, check_path, storage_error, sync_folder

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return c.byte_count(self.dtype, self.shape)


class CheckpointWriter:
    """Write a checkpoint folder under a temporary name beside its final place, and rename it when it is whole.

    The bytes of the tensors may be written in any order and from several threads.

    Args:
        path: the folder to make.
        specs: every tensor that will be written.
        metadata: the metadata of the safetensors files; ``format`` is always ``pt``, as transformers requires.
        max_shard_bytes: the bytes of tensors in a shard; a larger tensor has a shard of its own.
        names: the names of the weight files; the tensors of a component have its folder in front of their names.
        force: replace ``path`` if it is a folder that exists.
        patched: the folder that ``path`` is, whose other files stay.

    Attributes:
        path: the folder to make.
        weights: the paths in it of the weight files.

    Raises:
        UsageError: the output exists.
        StorageError: the parent folder is missing, or writing failed.
    """

    def __init__(
        self,
        path: Path,
        specs: list[TensorSpec],
        *,
        metadata: dict[str, str] | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        names: WeightNames = USUAL_NAMES,
        force: bool = False,
        patched: PatchedFolder | None = None,
    ) -> None:
        self.path = path
        self.weights: list[str] = []
        self._names = names
        self._force = force
        self._patched = patched
        self._check_output()
        self._partial = partial_of(path)
        self._files: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._metadata = {**(metadata or {}), "format": "pt"}
        try:
            self._lock = OutputLock(lock_of(path), path)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage_error("cannot write", path, error) from error
        try:
            self._check_output()  # again: another process may have finished meanwhile
            self._lock.file.truncate(0)
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
            self._make_shards(specs, max_shard_bytes)
        except OSError as error:
            self.abandon()
            raise storage_error("cannot write", path, error) from error

    def _check_output(self) -> None:
        if self._patched is None:
            check_output_folder(self.path, force=self._force)

    def _make_shards(self, specs: list[TensorSpec], max_shard_bytes: int) -> None:
        components: dict[str, list[TensorSpec]] = {}
        for spec in sorted(specs, key=lambda spec: natural_key(spec.name)):
            components.setdefault(self._names.split(spec.name)[0], []).append(spec)
        for component, members in components.items() if components else [("", [])]:
            self._make_component(component, members, max_shard_bytes)

    def _make_component(self, component: str, specs: list[TensorSpec], max_shard_bytes: int) -> None:
        shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in specs:
            if filled and filled + spec.nbytes > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(spec)
            filled += spec.nbytes
        weight_map = {}
        whole, folder = self._names.of_component(component), f"{component}/" if component else ""
        for number, members in enumerate(shards, 1):
            name = whole if len(shards) == 1 else shard_name(whole, number, len(shards))
            self._make_shard(folder + name, members)
            weight_map.update(dict.fromkeys((self._names.split(spec.name)[1] for spec in members), name))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            self.add_file(folder + index_name(whole), (json.dumps(index, indent=2) + "\n").encode())

    def _make_shard(self, name: str, specs: list[TensorSpec]) -> None:
        # Tensors with wide elements come first, as the safetensors library writes them: every tensor is then aligned.
        ordered = sorted(specs, key=lambda spec: -c.DTYPE_BITS[spec.dtype])
        header: dict[str, object] = {"__metadata__": self._metadata}
        position = 0
        for spec in ordered:
            header[self._names.split(spec.name)[1]] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            self._places[spec.name] = (len(self._files), position)
            position += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for spec in ordered:
            file, offset = self._places[spec.name]
            self._places[spec.name] = (file, start + offset)
        self._make_file(name, len(text).to_bytes(8, "little") + text, start + position)

    def _make_file(self, name: str, head: bytes, size: int) -> None:
        """Make a weight file of its final size, which begins with a head."""
        path = self._partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(descriptor)
        self.weights.append(name)
        _write_at(descriptor, head, 0)
        os.ftruncate(descriptor, size)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write some bytes of a tensor at an offset in it; several threads may call this at the same time.

        Raises:
            StorageError: writing failed.
        """
        file, start = self._places[name]
        try:
            _write_at(self._files[file], data, start + offset)
        except OSError as error:
            raise storage_error("cannot write", self.path, error) from error

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """Give the bytes of a tensor of ``size`` bytes as they are written now.

        Raises:
            StorageError: reading failed.
        """
        file, start = self._places[name]
        try:
            for offset in range(0, size, STEP):
                yield os.pread(self._files[file], min(STEP, size - offset), start + offset)
        except OSError as error:
            raise storage_error("cannot read", self.path, error) from error

    def add_file(self, name: str, data: bytes | memoryview) -> None:
        """Write a small file into the folder; the checkpoint's own files are never overwritten.

        Raises:
            InvalidFileError: the folder has a file of that name already.
            StorageError: writing failed.
        """
        place = self._partial / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as error:
            raise InvalidFileError(f'attachments["{name}"]: a file of that name is written already') from error
        except OSError as error:
            raise storage_error("cannot write", self.path, error) from error

    def keep_others(self) -> Path | None:
        """Bring the other files of a folder that is patched to the new ones; return where all lie until ``commit``.

        Raises:
            StorageError: linking or copying failed, or the folder changed meanwhile.
        """
        if self._patched is None:
            return None
        try:
            self._patched.fill(self._partial)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage_error("cannot write", self.path, error) from error
        return self._partial

    def commit(self) -> None:
        """Sync all files to disk and rename the folder to its final name."""
        try:
            while self._files:
                descriptor = self._files.pop()
                os.fsync(descriptor)
                os.close(descriptor)
            for folder, _, _ in os.walk(self._partial):
                sync_folder(Path(folder))
            if self._patched is not None:
                self._patched.check()
                self._replace()
            elif self._force and self.path.exists():
                self._replace()
            else:
                self._partial.rename(self.path)
            sync_folder(self.path.parent)
            self._lock.remove()
        except OSError as error:
            self.abandon()
            if isinstance(error, StorageError):
                raise
            raise storage_error("cannot write", self.path, error) from error

    def _replace(self) -> None:
        """Give the folder the name of the old one, and remove the old one only after that."""
        if exchange(self._partial, self.path):
            sync_folder(self.path.parent)
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        # For a moment no folder has the name. The lock file says that the new one is whole, so that the next run can
        # finish what a run that is killed then has left.
        old = replaced_of(self.path)
        shutil.rmtree(old, ignore_errors=True)
        self._lock.note(WHOLE)
        self.path.rename(old)
        try:
            self._partial.rename(self.path)
        except BaseException:
            old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        """Remove the temporary folder."""
        while self._files:
            os.close(self._files.pop())
        shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.remove()


def check_output_folder(path: Path, *, force: bool) -> None:
    """Refuse an output folder that exists already, that is named like a file of weights, or that has no parent folder.

    Args:
        path: the folder to make.
        force: allow an existing folder, if it is a checkpoint or a version folder.

    Raises:
        UsageError: the folder exists, or its name is not one for a folder.
        StorageError: the parent folder is missing.
    """
    check_path(path)
    if path.name in ("", ".", ".."):
        raise UsageError(f"{str(path)!r} is not a name for an output folder")
    if path.suffix in (".safetensors", ".deltafmt", ".bin"):
        raise UsageError(
            f"the output {path} would be a folder, but its name is that of a file; "
            f"name a folder such as {path.with_suffix('')}"
        )
    if not path.parent.is_dir():
        raise StorageError(f"no such folder: {path.parent}")
    if path.exists() or path.is_symlink():
        if not force:
            raise UsageError(f"{path} exists", Remedy("force"))
        if path.is_symlink() or not path.is_dir():
            raise UsageError(f"{path} is not a folder and is not replaced by one; remove it first")
        # ``force`` replaces the output of an earlier run, not whatever folder is named by mistake.
        found = sorted(path.iterdir())
        read = loader_folders(path)
        own = {component.split("/")[0] for component in read.present}
        folder = next((entry.name for entry in found if entry.is_dir() and entry.name not in own), None)
        if folder is not None:
            raise UsageError(f"{path} holds the folder {folder} and is not replaced; remove it first")
        places = (path, *(path / component for component in read.present))
        weights = any(entry.suffix == ".safetensors" for place in places for entry in place.iterdir())
        if found and not weights and not _is_unchanged_version(found):
            raise UsageError(f"{path} is not a checkpoint and is not replaced; remove it first")


def _is_unchanged_version(files: list[Path]) -> bool:
    """Tell whether all that a folder has is the index of a version in which no tensor changes (deltafmt.foreign)."""
    index = read_json(files[0]) if [file.name for file in files] == [index_name(USUAL_NAMES.of_component(""))] else None
    metadata = index.get("metadata") if isinstance(index, dict) else None
    return isinstance(metadata, dict) and "delta_encoding" in metadata


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
