"""A checkpoint: a Hugging Face folder (one file, or shards with an index) or a single ``.safetensors`` file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.errors import InvalidFileError, StorageError
from deltafmt.index.sections import is_safe_path, is_weight_file
from deltafmt.output import storage_error

MAX_ATTACHMENT_BYTES = 64 * 1024 * 1024


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key in which ``layers.2`` comes before ``layers.10``."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", name))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, name


class Checkpoint:
    """A checkpoint's tensors by name, in whichever files they lie, and the small files beside them.

    Attributes:
        path: the folder or file.
        tensors: every tensor, in natural order of the names.
        files: the small files of the folder (configuration, tokenizer, ...), by name.
        skipped: the names of folders and files that cannot be attached: other weights, files over 64 MiB, and names
            that some systems do not allow.

    Raises:
        StorageError: the checkpoint is missing or unreadable.
        InvalidFileError: it has no weights, or a weight file or an index is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise StorageError(f"no such file or folder: {self.path}")
        self.files: dict[str, Path] = {}
        self.skipped: list[str] = []
        self._shards: list[SafetensorsFile] = []
        if self.path.is_dir():
            found = self._open_folder()
            self.files, self.skipped = small_files(self.path, {shard.path.name for shard in self._shards})
        else:
            self._shards = [SafetensorsFile(self.path)]
            found = dict(self._shards[0].tensors)
        if not found:
            raise InvalidFileError(f"{self.path}: it holds no tensor")
        self.tensors: dict[str, Tensor] = {name: found[name] for name in sorted(found, key=natural_key)}

    def _open_folder(self) -> dict[str, Tensor]:
        try:
            names = sorted(entry.name for entry in os.scandir(self.path) if entry.is_file())
        except OSError as error:
            raise storage_error("cannot read", self.path, error) from error
        indexes = [name for name in names if name.endswith(".safetensors.index.json")]
        shards = [name for name in names if name.endswith(".safetensors")]
        if "model.safetensors.index.json" in indexes:
            indexes = ["model.safetensors.index.json"]
        elif "model.safetensors" in shards:
            indexes, shards = [], ["model.safetensors"]
        if len(indexes) > 1:
            raise InvalidFileError(f"{self.path}: several indexes, {', '.join(indexes)}; keep one")
        if indexes:
            return self._open_sharded(indexes[0])
        if not shards:
            others = [name for name in names if re.search(r"\.(bin|pt|pth|gguf)$", name)]
            hint = f"; {others[0]} cannot be read, convert it to safetensors" if others else ""
            raise InvalidFileError(f"{self.path}: no .safetensors weights in this folder{hint}")
        return self._open_shards(shards)

    def _open_sharded(self, index: str) -> dict[str, Tensor]:
        where = self.path / index
        try:
            text = where.read_text("utf-8")
        except OSError as error:
            raise storage_error("cannot read", where, error) from error
        except ValueError as error:
            raise InvalidFileError(f"{where}: not UTF-8") from error
        try:
            weight_map: Any = json.loads(text)["weight_map"]
            wanted = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidFileError(f"{where}: no valid weight_map") from error
        for file in set(wanted.values()):
            if file != os.path.basename(file) or file in ("", ".", ".."):
                raise InvalidFileError(f"{where}: {file!r} is not a file beside the index")
        found = self._open_shards(sorted(set(wanted.values())))
        for name, file in wanted.items():
            if name not in found or found[name].file.path.name != file:
                raise InvalidFileError(f'{where}: tensor "{name}" is not in {file}')
        return {name: found[name] for name in wanted}

    def _open_shards(self, names: list[str]) -> dict[str, Tensor]:
        self._shards = [SafetensorsFile(self.path / name) for name in names]
        found: dict[str, Tensor] = {}
        for shard in self._shards:
            for name, tensor in shard.tensors.items():
                if name in found:
                    raise InvalidFileError(
                        f'{self.path}: tensor "{name}" is in {found[name].file.path.name} and {shard.path.name}'
                    )
                found[name] = tensor
        return found

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the weight files, without ``format`` and without the keys that unpack adds."""
        merged: dict[str, str] = {}
        for shard in self._shards:
            merged.update(shard.metadata)
        return {
            key: value for key, value in sorted(merged.items()) if key != "format" and not key.startswith("deltafmt.")
        }

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """The bytes of the weight files, including their headers."""
        return sum(shard.size for shard in self._shards)

    def config(self) -> dict[str, Any]:
        """Return the folder's ``config.json``, or an empty map."""
        try:
            config = json.loads(self.files["config.json"].read_text("utf-8"))
        except (KeyError, OSError, ValueError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def check_unchanged(self) -> None:
        """Check that no weight file was replaced or written to since it was opened.

        Raises:
            StorageError: a file has changed; the message names it.
        """
        for shard in self._shards:
            shard.check_unchanged()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return path, size and modification time of each weight file: equal as long as the files are the same."""
        return [shard.identity() for shard in self._shards]


def read_file(path: Path) -> bytes:
    """Return the bytes of a small file that will be attached.

    Raises:
        StorageError: reading failed.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise storage_error("cannot read", path, error) from error


def small_files(folder: Path, read: Collection[str]) -> tuple[dict[str, Path], list[str]]:
    """Return the files of a folder that can be attached, by name, and the names of files and folders that cannot.

    Hidden files, indexes of weights, and the files named in ``read`` (which are read otherwise) are in neither.
    """
    files: dict[str, Path] = {}
    skipped: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name in read or entry.name.endswith(".safetensors.index.json"):
            continue
        if (
            entry.is_file()
            and not is_weight_file(entry.name)
            and entry.stat().st_size <= MAX_ATTACHMENT_BYTES
            and is_safe_path(entry.name)
        ):
            files[entry.name] = Path(entry.path)
        else:
            skipped.append(entry.name + "/" * entry.is_dir())
    return files, skipped
