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
_FACTOR: Final = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.([^.]+))?(?<!\.weight)(?<!\.bias)(?:\.(weight|bias))?")
_MAGNITUDE: Final = re.compile(r"(.+)\.lora_magnitude_vector(?:\.([^.]+))?(?<!\.weight)(?:\.weight)?")
_TOKENS: Final = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?")
_SAVED: Final = re.compile(r"(.+)\.modules_to_save\.(?:default\.)?(.+)")
# Parts that wrappers of a model add to names: anywhere, and in front.
_WRAPPERS: Final = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_FRONT: Final = ("module.", "_forward_module.")
_LAYER: Final = ".base_layer"

# Some models keep the weights of some modules with rows and columns exchanged (transformers' Conv1D).
_CONV1D_MODELS: Final = frozenset(("decision_transformer", "gpt2", "imagegpt", "openai-gpt"))
_CONV1D_MODULES: Final = frozenset(("c_attn", "c_fc", "c_proj", "q_attn"))
_EMBEDDING: Final = re.compile(r"embed(_tokens|_positions|_in)?|(\w+_)?embeddings?|wte|wpe|shared")


@dataclass(slots=True)
class Factors:
    """The two factors of one module or parameter, on disk, and what belongs to them.

    Attributes:
        module: the module's name in the model.
        depth: how many other factors lie around these: a module with several parameters that have factors
            (``target_parameters``) has them one inside the other, the last parameter's outside.
        embedding: True if the module is an embedding.
        a: the factor A, shape (rank, in_features, ...); for an embedding (rank, rows).
        b: the factor B, shape (out_features, rank, ...); for an embedding (columns, rank).
        bias: the bias of B (``lora_bias``), or None.
        magnitude: DoRA's length of each output's weights, or None.
    """

    module: str
    depth: int
    embedding: bool
    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None


class Adapter:
    """An open adapter; use as a context manager.

    Names are those of the model: without PEFT's prefix, the parts that wrappers add (FSDP, DeepSpeed, torch.compile,
    activation checkpointing), and the adapter's own name.

    Attributes:
        path: the adapter's folder.
        config: the adapter's configuration.
        factors: the factors, in natural order of their names.
        whole: the tensors that are stored whole, by name.
        layers: the base's own tensors of modules with factors or trained rows, as the adapter's model had them.
        tokens: the trained rows of embeddings, by the embedding's module.
        files: the small files beside the weights, by name, without the configuration.
        left_out: why other files and folders do not travel, by name.

    Raises:
        StorageError: the folder is missing or unreadable.
        InvalidFileError: the folder is not an adapter as PEFT writes it.
        UnsupportedError: the adapter is of a kind that no delta is made of, or not in safetensors.
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
            raise _no_weights(self.path)
        self.config = AdapterConfig.read(self.path / CONFIG_FILE)
        self._file = SafetensorsFile(weights)
        beside = find_travelling(self.path, LoaderFolders(), {WEIGHTS_FILE, CONFIG_FILE}, refuse_links=False)
        self.files, self.left_out = beside.files, beside.left_out
        self.factors: list[Factors] = []
        self.whole: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self._adapters: dict[str, str] = {}
        self._sort()

    def _sort(self) -> None:
        """Tell from each tensor's name what it is."""
        found: dict[tuple[str, int], dict[str, Tensor]] = {}
        saved: dict[str, Tensor] = {}
        for name in sorted(self._file.tensors, key=natural_key):
            tensor, inner = self._file.tensors[name], model_name(name)
            if tensor.nbytes == 0:
                raise InvalidFileError(
                    f'{self._file.path}: tensor "{name}" {list(tensor.shape)} is empty, as DeepSpeed ZeRO-3 saves '
                    "what it has not gathered; gather the parameters and save the adapter again"
                )
            if (part := _FACTOR.fullmatch(inner)) is not None:
                self._one_adapter(part[4], name)
                side = f"{part[2] or ''}{part[3]}{'' if part[5] != 'bias' else '.bias'}"
                self._put(found.setdefault(_depth(part[1]), {}), side, tensor)
            elif (part := _MAGNITUDE.fullmatch(inner)) is not None:
                self._one_adapter(part[2], name)
                self._put(found.setdefault(_depth(part[1]), {}), "magnitude", tensor)
            elif (part := _TOKENS.fullmatch(inner)) is not None:
                self._one_adapter(part[2], name)
                self._put(self.tokens, part[1].replace(_LAYER, ""), tensor)
            elif ".lora_velora_" in inner or ".original_module." in inner:
                continue  # of the training alone, and the base's own
            elif "lora_" in inner:
                raise UnsupportedError(f'{self._file.path}: tensor "{name}" is not a factor of LoRA')
            elif (part := _SAVED.fullmatch(inner)) is not None:
                self._put(saved, f"{part[1]}.{part[2]}".replace(_LAYER, ""), tensor)
            elif f"{_LAYER}." in inner:
                self._put(self.layers, inner.replace(".token_adapter.", ".").replace(_LAYER, ""), tensor)
            else:
                self._put(self.whole, inner, tensor)
        # After a resize, PEFT stores a saved module twice; it loads the one under the module's own name.
        self.whole = {**saved, **self.whole}
        if not found and not self.whole and not self.tokens:
            raise InvalidFileError(f"{self._file.path}: it holds no tensor")
        self.factors = [self._pair(module, depth, parts) for (module, depth), parts in found.items()]

    def _put(self, found: dict[str, Tensor], key: str, tensor: Tensor) -> None:
        if key in found and not found[key].equals(tensor):
            raise InvalidFileError(
                f'{self._file.path}: tensors "{found[key].name}" and "{tensor.name}" are the same tensor of the model '
                "and differ"
            )
        found[key] = tensor

    def _one_adapter(self, adapter: str | None, name: str) -> None:
        """Refuse a file with the factors of several adapters."""
        self._adapters.setdefault(adapter or "", name)
        if len(self._adapters) > 1:
            names = " and ".join(f'"{tensor}"' for tensor in list(self._adapters.values())[:2])
            raise UnsupportedError(
                f"{self._file.path}: it holds several adapters ({names}); save each with save_pretrained"
            )

    def _pair(self, module: str, depth: int, parts: dict[str, Tensor]) -> Factors:
        embedding = any(side.startswith("embedding_") for side in parts)
        start = "embedding_" if embedding else ""
        a, b = parts.pop(f"{start}A", None), parts.pop(f"{start}B", None)
        bias, magnitude = parts.pop("B.bias", None), parts.pop("magnitude", None)
        if a is None or b is None or parts:
            known = [tensor for tensor in (a, b, *parts.values()) if tensor is not None]
            names = ", ".join(f'"{tensor.name}"' for tensor in known or [t for t in (bias, magnitude) if t is not None])
            raise InvalidFileError(f"{self._file.path}: {names} are not one A and one B")
        for tensor in (a, b, bias, magnitude):
            if tensor is not None and tensor.dtype not in DELTA_DTYPES:
                where = f'{self._file.path}: tensor "{tensor.name}"'
                raise UnsupportedError(f"{where}: dtype {tensor.dtype} is not one of {', '.join(DELTA_DTYPES)}")
        if not 2 <= len(a.shape) <= 5 or len(a.shape) != len(b.shape) or not all(size == 1 for size in b.shape[2:]):
            raise UnsupportedError(
                f'{self._file.path}: tensors "{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} are not the '
                "factors of a matrix or a convolution"
            )
        if self.config.dora and magnitude is None:
            raise InvalidFileError(f'{self._file.path}: use_dora is set, and "{module}" has no lora_magnitude_vector')
        for tensor, key, isset in ((magnitude, "use_dora", self.config.dora), (bias, "lora_bias", self.config.biased)):
            if tensor is not None and not isset:
                raise InvalidFileError(
                    f'{self._file.path}: tensor "{tensor.name}" is there, and {key} is not set in {CONFIG_FILE}'
                )
        return Factors(module, depth, embedding, a, b, bias, magnitude)

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


def model_name(name: str) -> str:
    """Return the name of an adapter's tensor without PEFT's prefix and the parts that wrappers add.

    For example, ``module.base_model.model.model._orig_mod.layers.0.q.lora_A.weight`` gives
    ``model.layers.0.q.lora_A.weight``.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    shorter = ""
    # A model that was wrapped twice has the prefix twice.
    while shorter != name:
        shorter = name
        for prefix in (*_FRONT, PREFIX):
            name = name.removeprefix(prefix)
    return name


def _depth(module: str) -> tuple[str, int]:
    """Return a module's name without the layers that PEFT puts into it, and how many there are at its end."""
    depth = 0
    while module.endswith(_LAYER):
        module, depth = module.removesuffix(_LAYER), depth + 1
    return module.replace(f"{_LAYER}.", "."), depth


def _no_weights(path: Path) -> InvalidFileError:
    """Return the error for a folder without the weights of an adapter."""
    inner = sorted(
        entry.name for entry in os.scandir(path) if entry.is_dir() and (Path(entry.path) / WEIGHTS_FILE).exists()
    )
    if inner:
        others = f" (there are {len(inner)}: {', '.join(inner[:5])})" if len(inner) > 1 else ""
        return InvalidFileError(
            f"{path}: no {WEIGHTS_FILE}: its subfolder {inner[0]} holds an adapter{others}; give {path / inner[0]}"
        )
    if (path / "adapter_model.bin").exists():
        return UnsupportedError(
            f"{path}: no {WEIGHTS_FILE}: adapter_model.bin cannot be read, it is a pickle, which may run code; load "
            "the adapter with PEFT and save it with save_pretrained, which writes safetensors"
        )
    return InvalidFileError(f"{path}: no {WEIGHTS_FILE}: not an adapter")


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
