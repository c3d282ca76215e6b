"""A LoRA adapter as PEFT saves it: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from deltafmt.checkpoint.adapter_config import CONFIG_FILE, AdapterConfig
from deltafmt.checkpoint.components import LoaderFolders
from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.checkpoint.travel import find_travelling
from deltafmt.errors import InvalidFileError, StorageError, UnsupportedError
from deltafmt.format.constants import DELTA_DTYPES

WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_FACTOR: Final = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")

# Some models keep the weights of some modules with rows and columns exchanged (transformers' Conv1D).
_CONV1D_MODELS: Final = frozenset(("decision_transformer", "gpt2", "imagegpt", "openai-gpt"))
_CONV1D_MODULES: Final = frozenset(("c_attn", "c_fc", "c_proj", "q_attn"))
_EMBEDDING: Final = re.compile(r"embed(_tokens|_positions|_in)?|(\w+_)?embeddings?|wte|wpe|shared")


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of one module, on disk.

    Attributes:
        module: the module's name in the model.
        a: the factor A, shape (rank, in_features); for an embedding (rank, rows).
        b: the factor B, shape (out_features, rank); for an embedding (columns, rank).
        embedding: True if the module is an embedding.
    """

    module: str
    a: Tensor
    b: Tensor
    embedding: bool

    @property
    def rank(self) -> int:
        """The rank: the number of rows of A and of columns of B."""
        return self.a.shape[0]


class Adapter:
    """An open adapter; use as a context manager.

    Attributes:
        path: the adapter's folder.
        config: the adapter's configuration.
        factors: the factors by module name, in natural order.
        whole: the tensors that are stored whole, by their names in the model.
        files: the small files beside the weights, by name, without the configuration.
        left_out: why other files and folders do not travel, by name.

    Raises:
        StorageError: the folder is missing or unreadable.
        InvalidFileError: the folder is not an adapter as PEFT writes it.
        UnsupportedError: the adapter is not plain LoRA on matrices, or not in safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise StorageError(f"no such folder: {self.path}")
        if not self.path.is_dir():
            raise InvalidFileError(
                f"{self.path}: not a folder; an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        weights = self.path / WEIGHTS_FILE
        if not weights.exists():
            pickled = (self.path / "adapter_model.bin").exists()
            hint = "adapter_model.bin cannot be read; save it as safetensors" if pickled else "not an adapter"
            raise (UnsupportedError if pickled else InvalidFileError)(f"{self.path}: no {WEIGHTS_FILE}: {hint}")
        self.config = AdapterConfig.read(self.path / CONFIG_FILE)
        self._file = SafetensorsFile(weights)
        beside = find_travelling(self.path, LoaderFolders(), {WEIGHTS_FILE, CONFIG_FILE}, refuse_links=False)
        self.files, self.left_out = beside.files, beside.left_out
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, Tensor] = {}
        self._sort()

    def _sort(self) -> None:
        pairs: dict[str, dict[tuple[bool, str], Tensor]] = {}
        for name in sorted(self._file.tensors, key=natural_key):
            tensor, inner = self._file.tensors[name], name.removeprefix(PREFIX)
            found = _FACTOR.fullmatch(inner)
            if found:
                pairs.setdefault(found[1], {})[found[2] is not None, found[3]] = tensor
            elif "lora_" in inner:
                raise UnsupportedError(f'{self._file.path}: tensor "{name}" is not a factor of plain LoRA')
            else:
                plain = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                if plain in self.whole:
                    raise InvalidFileError(f'{self._file.path}: tensor "{name}" stands twice')
                self.whole[plain] = tensor
        if not pairs and not self.whole:
            raise InvalidFileError(f"{self._file.path}: it holds no tensor")
        for module, pair in pairs.items():
            self.factors[module] = self._pair(module, pair)

    def _pair(self, module: str, pair: dict[tuple[bool, str], Tensor]) -> Factors:
        embedding = any(of_embedding for of_embedding, _ in pair)
        a, b = pair.get((embedding, "A")), pair.get((embedding, "B"))
        if a is None or b is None or len(pair) > 2:
            names = ", ".join(f'"{tensor.name}"' for tensor in pair.values())
            raise InvalidFileError(f"{self._file.path}: {names} are not one A and one B")
        for tensor in (a, b):
            where = f'{self._file.path}: tensor "{tensor.name}"'
            if tensor.dtype not in DELTA_DTYPES:
                raise UnsupportedError(f"{where}: dtype {tensor.dtype} is not one of {', '.join(DELTA_DTYPES)}")
            if len(tensor.shape) != 2:
                raise UnsupportedError(f"{where}: shape {list(tensor.shape)} is not that of a matrix's factor")
        rank = self.config.rank_of(module)
        if (a.shape[0], b.shape[1]) != (rank, rank) or 0 in (*a.shape, *b.shape):
            raise InvalidFileError(
                f'{self._file.path}: tensors "{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} '
                f"are not factors of rank {rank}"
            )
        return Factors(module, a, b, embedding)

    @property
    def nbytes(self) -> int:
        """The bytes of the weight file."""
        return self._file.size

    def check_unchanged(self) -> None:
        """Check that the weight file was not replaced or written to since it was opened.

        Raises:
            StorageError: the file has changed.
        """
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def is_embedding(module: str) -> bool:
    """Tell from its name whether a module is an embedding."""
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def may_be_conv1d(module: str) -> bool:
    """Tell from its name whether some model may keep a module's weight with rows and columns exchanged."""
    return module.rpartition(".")[2] in _CONV1D_MODULES


def is_conv1d(module: str, config: Mapping[str, object]) -> bool:
    """Tell whether a model of this configuration keeps a module's weight with rows and columns exchanged."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in _CONV1D_MODELS and may_be_conv1d(module)
