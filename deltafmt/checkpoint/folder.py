"""A checkpoint: a Hugging Face folder (one file, or shards with an index) or a single ``.safetensors`` file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from deltafmt.checkpoint.components import LoaderFolders, loader_folders
from deltafmt.checkpoint.folder_errors import IS_ADAPTER, has_other_weights, no_weights
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.checkpoint.travel import NO_RULES, AttachRules, Travelling, find_travelling
from deltafmt.checkpoint.weight_choice import (
    WeightChoice,
    check_shards,
    choose_weights,
    read_index,
    read_json,
)
from deltafmt.checkpoint.weight_names import DEFAULT, WeightNames, bounded
from deltafmt.errors import InvalidFileError, Remedy, StorageError
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key in which ``layers.2`` comes before ``layers.10``."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", name))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, name


class Checkpoint:
    """A checkpoint's tensors by name, in whichever files they lie, and the small files beside them.

    The weights of a folder that the loader of a checkpoint reads, such as ``unet/`` of a pipeline, are a *component*:
    their tensors are called ``unet/NAME``.

    Args:
        path: a folder or a ``.safetensors`` file.
        variant: read the weights of this variant, such as ``fp16`` in ``model.fp16.safetensors``.
        rules: which files beside the weights travel.
        lenient: True for a base: a variant that it lacks is not missed, and neither are components that cannot be read.

    Attributes:
        path: the folder or file.
        tensors: every tensor, in natural order of the names.
        loader: the folders that the checkpoint's loader reads.
        names: the names of the weight files, by component.
        unlisted: names of tensors that lie in a shard although the index does not name them, with the shard.
        notes: remarks about which files were read, in words.
        dropped: the components that the user's patterns leave out.
        dequantized: how many of the tensors are 8-bit floats that are read as values.
        kept: names of tensors that are stored whole, because they are codes or belong to codes.
        indexes: the paths of the indexes of shards that were read, in the folder.
        rewritten: the bytes of small files that travel in another form than they have in the folder.

    Raises:
        StorageError: the checkpoint is missing or unreadable.
        InvalidFileError: it has no weights, or a weight file or an index is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        rules: AttachRules = NO_RULES,
        lenient: bool = False,
    ) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise StorageError(f"no such file or folder: {self.path}")
        self.loader = LoaderFolders()
        self.names = WeightNames()
        self.unlisted: dict[str, str] = {}
        self.notes: list[str] = []
        self.dropped: list[str] = []
        self.dequantized: int = 0
        self.kept: frozenset[str] = frozenset()
        self.indexes: list[str] = []
        self.rewritten: dict[str, bytes] = {}
        self._rules = rules
        self._lenient = lenient
        self._shards: list[SafetensorsFile] = []
        self._top_shards: list[SafetensorsFile] = []
        self._read: set[str] = set()
        self._beside: Travelling | None = None
        if self.path.is_dir():
            found = self._open_folder(variant)
        else:
            self._shards = self._top_shards = [SafetensorsFile(self.path)]
            found = dict(self._shards[0].tensors)
            self.names = WeightNames({"": self.path.name if self.path.suffix == ".safetensors" else DEFAULT})
        if not found:
            raise InvalidFileError(f"{self.path}: it holds no tensor")
        for shard in self._shards:
            if shard.spare:
                self.notes.append(
                    f"{shard.spare:,} bytes of {shard.path.name} belong to no tensor; safetensors itself refuses the "
                    "file, whose save or download may have gone wrong"
                )
        if all(ADAPTER_TENSOR.search(name) for name in found):
            raise InvalidFileError(f"{self.path}: {IS_ADAPTER}")
        self.tensors: dict[str, Tensor] = {name: found[name] for name in sorted(found, key=natural_key)}

    def _open_folder(self, variant: str | None) -> dict[str, Tensor]:
        lenient = self._lenient
        self.loader = loader_folders(self.path)
        self.dropped = [component for component in self.loader.declared if self._rules.refuses_component(component)]
        if (self.path / "config.json").is_file() and read_json(self.path / "config.json") is None:
            self.notes.append("config.json could not be read as a configuration, so nothing that it says was compared")
        present = tuple(component for component in self.loader.present if component not in self.dropped)
        self.loader = replace(self.loader, present=present)
        chosen: dict[str, WeightChoice] = {}
        components = [
            *([""] if self.loader.reads_top else []),
            *(component for component in present if component in self.loader.declared),
        ]
        lacking = []
        for component in components:
            folder = self.path / component
            choice = choose_weights(folder, variant) if not (lenient or component) else _any_variant(folder, variant)
            if choice is not None:
                chosen[component] = choice
            elif component and not lenient:
                lacking.append(component)
        if not chosen:
            raise no_weights(self.path, self.loader)
        for component in lacking:
            self._check_without_weights(component)
        if variant is not None and not lenient and not any(f".{variant}." in choice.name for choice in chosen.values()):
            raise InvalidFileError(f"{self.path}: no component has weights of the variant {variant!r}")
        found: dict[str, Tensor] = {}
        for component, choice in chosen.items():
            tensors = self._open_choice(self.path / component, choice)
            if not component:
                self._top_shards = list(self._shards)
                found.update(tensors)
                continue
            odd = next((name for name in found if name.startswith(f"{component}/")), None)
            if odd is not None:
                raise InvalidFileError(
                    f'{self.path}: tensor "{odd}" has a name that the folder {component} gives its own'
                )
            found.update(
                (f"{component}/{name}", replace(tensor, name=f"{component}/{name}")) for name, tensor in tensors.items()
            )
        self.names = WeightNames({component: choice.name for component, choice in chosen.items()})
        for component, choice in chosen.items():
            of_component = f"{component}/" if component else ""
            self.indexes += [of_component + choice.index] if choice.index else []
            self._read |= {of_component + name for name in (*choice.files, choice.index) if name}
            indexes = [name for name in choice.unread if name.endswith(".json")]
            if choice.unread and (indexes or choice.index):
                kept = choice.index or choice.name
                self.notes.append(
                    f"{of_component}{kept} is the model; not read: {bounded(of_component + n for n in choice.unread)}"
                )
            self._read |= {of_component + name for name in indexes}
        return found

    def _check_without_weights(self, component: str) -> None:
        """Refuse a component whose weights are there in a form that cannot be read.

        Raises:
            InvalidFileError: names the file.
        """
        folder = self.path / component
        if has_other_weights(folder):
            remedy = None if self._rules is NO_RULES else Remedy("no_attach", f"{component}/*")
            raise InvalidFileError(str(no_weights(folder, LoaderFolders())), remedy)

    def _open_choice(self, folder: Path, choice: WeightChoice) -> dict[str, Tensor]:
        check_shards(folder, choice)
        shards = [SafetensorsFile(folder / name) for name in choice.files]
        self._shards += shards
        found: dict[str, Tensor] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                if name in found:
                    raise InvalidFileError(
                        f'{folder}: tensor "{name}" is in {found[name].file.path.name} and {shard.path.name}'
                    )
                found[name] = tensor
        if choice.index:
            wanted = read_index(folder / choice.index)
            if not wanted:
                raise InvalidFileError(f"{folder / choice.index}: it names no tensor")
            for name, file in wanted.items():
                if name not in found or found[name].file.path.name != file:
                    raise InvalidFileError(f'{folder / choice.index}: tensor "{name}" is not in {file}')
            # Loaders read such tensors all the same, because they read whole shards.
            self.unlisted.update({name: tensor.file.path.name for name, tensor in found.items() if name not in wanted})
        return found

    def weight_files(self) -> Iterator[tuple[str, SafetensorsFile]]:
        """Give the weight files that were read, by their paths in the folder."""
        for shard in self._shards:
            yield str(shard.path.relative_to(self.path)) if self.path.is_dir() else shard.path.name, shard

    def decide_travelling(self) -> Travelling:
        """Decide which files beside the weights travel with a delta, and why others do not.

        Raises:
            InvalidFileError, UsageError, StorageError: as :func:`deltafmt.checkpoint.travel.find_travelling` raises.
        """
        if self._beside is None:
            self._beside = (
                find_travelling(self.path, self.loader, self._read, self._rules, refuse_links=not self._lenient)
                if self.path.is_dir()
                else Travelling()
            )
        return self._beside

    @property
    def files(self) -> dict[str, Path]:
        """The small files that travel with a delta, by their paths in the folder."""
        return self.decide_travelling().files

    def attachment(self, name: str) -> bytes:
        """Return the bytes of a small file that travels.

        Raises:
            StorageError: reading failed.
        """
        rewritten = self.rewritten.get(name)
        return read_file(self.files[name]) if rewritten is None else rewritten

    @property
    def left_out(self) -> dict[str, str]:
        """Why other files and folders do not travel, by their paths."""
        return self.decide_travelling().left_out

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the weight files at the top, without ``format`` and the keys that unpack adds."""
        merged: dict[str, str] = {}
        for shard in self._top_shards:
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
        config = read_json(self.path / "config.json") if self.path.is_dir() else None
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


# The names of an adapter's tensors, in PEFT and in programs for diffusion models.
ADAPTER_TENSOR = re.compile(r"\blora[_.](embedding_)?([AB]|up|down|magnitude_vector)\b")


def _any_variant(folder: Path, variant: str | None) -> WeightChoice | None:
    """Choose the weights of a variant, or those without one where the variant is not there."""
    if variant is None:
        return choose_weights(folder)
    try:
        found = choose_weights(folder, variant)
    except InvalidFileError:
        found = None
    return found or choose_weights(folder)


def read_file(path: Path) -> bytes:
    """Return the bytes of a small file that will be attached.

    Raises:
        StorageError: reading failed.
    """
    try:
        return read_regular(path)
    except OSError as error:
        raise storage_error("cannot read", path, error) from error
