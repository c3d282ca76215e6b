"""The configuration of a PEFT adapter: the part of ``adapter_config.json`` that decides its LoRA delta."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from deltafmt.checkpoint.patterns import PatternTable
from deltafmt.errors import InvalidFileError, UnsupportedError
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular

CONFIG_FILE: Final = "adapter_config.json"
DEFAULT_RANK: Final = 8
DEFAULT_ALPHA: Final = 8
MAX_RANK: Final = 2**20
MAX_ALPHA: Final = 1e30
MAX_TOKEN: Final = 2**32

# Keys without influence on the delta: they say how an adapter was trained, or repeat what its tensors' names say.
_HARMLESS: Final = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version"),
        *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
    )
)
# Initializations that move a part of the base's weights into the factors; the factors then fit another base.
_MOVING: Final = ("pissa", "olora", "loftq", "corda", "lora_ga")
_READ: Final = frozenset(
    (
        *("alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r"),
        *("rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
    )
)
_MERGE: Final = "merge the adapter with PEFT (merge_and_unload), save the model and use pack"
# What is set, and why no delta is made of it, with a way out.
_REFUSED: Final = {
    "alora_invocation_tokens": "aLoRA changes the model for a part of the tokens, which no weights can say; "
    "serve the adapter with PEFT",
    "arrow_config": "Arrow chooses among adapters for each token, which no weights can say; "
    "import those adapters one by one",
    "kasa_config": f"KaSA changed the base's weights; {_MERGE}",
    "layer_replication": "the model has more layers than its base, which no delta of the base can say; "
    "save the model with its replicated layers, and import the adapter against that",
    "monteclora_config": f"MonteCLoRA has more than two factors; {_MERGE}",
    "use_bdlora": f"BD-LoRA's factors are block-diagonal; {_MERGE}",
    "use_qalora": f"QALoRA's factors belong to a quantized base; {_MERGE}",
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of an adapter's configuration that decides its delta.

    Attributes:
        rank, alpha: the rank and alpha of modules that no pattern matches.
        rank_pattern, alpha_pattern: ranks and alphas by regular expression.
        rslora: True if the scaling is alpha / sqrt(rank); False if it is alpha / rank.
        transposed: True if the weights have rows and columns exchanged, as GPT-2's have (``fan_in_fan_out``).
        saved: the names of modules that are stored whole (``modules_to_save``).
        parameters: the names of parameters that have factors of their own (``target_parameters``).
        dora: True if each output's weights have a learned length (``use_dora``).
        biased: True if B has a bias (``lora_bias``).
        tokens: the rows of embeddings that are replaced (``trainable_token_indices``), by the name of the embedding's
            module; an empty name stands for the model's input embedding.
        base_name, task_type: the base's name and the task type, as the file gives them; empty if it gives none.
    """

    rank: int
    alpha: float
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    rslora: bool
    transposed: bool
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    dora: bool
    biased: bool
    tokens: dict[str, tuple[int, ...]]
    base_name: str
    task_type: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an ``adapter_config.json``.

        Raises:
            StorageError: the file cannot be read.
            InvalidFileError: the file is not a configuration as PEFT writes it.
            UnsupportedError: the adapter is of a kind that no delta is made of.
        """
        try:
            obj = json.loads(read_regular(path))
        except OSError as error:
            raise storage_error("cannot read", path, error) from error
        except (ValueError, RecursionError) as error:
            raise InvalidFileError(f"{path}: not valid JSON") from error
        if type(obj) is not dict:
            raise InvalidFileError(f"{path}: not a map")
        try:
            return cls._parse(obj)
        except InvalidFileError as error:
            raise error.located(path) from error

    @classmethod
    def _parse(cls, obj: dict[str, Any]) -> Self:
        peft_type = obj.get("peft_type", "LORA")
        if peft_type != "LORA":
            raise UnsupportedError(f"peft_type {peft_type!r} is not supported, only LORA is; {_MERGE}")
        start = obj.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVING):
            raise UnsupportedError(
                f"init_lora_weights {start!r} changed the base's weights; PEFT converts it to plain LoRA when it saves "
                "with path_initial_model_for_weight_conversion"
            )
        for key, value in obj.items():
            if value and key in _REFUSED:
                raise UnsupportedError(f"{key} is set: {_REFUSED[key]}")
            if value and key not in _READ and key not in _HARMLESS:
                raise UnsupportedError(f"{key} is set, which is not supported; {_MERGE}")
        ranks = {key: _rank(f"rank_pattern {key!r}", value) for key, value in _pattern(obj, "rank_pattern")}
        alphas = {key: _alpha(f"alpha_pattern {key!r}", value) for key, value in _pattern(obj, "alpha_pattern")}
        return cls(
            rank=_rank("r", obj.get("r", DEFAULT_RANK)),
            alpha=_alpha("lora_alpha", obj.get("lora_alpha", DEFAULT_ALPHA)),
            rank_pattern=PatternTable("rank_pattern", ranks),
            alpha_pattern=PatternTable("alpha_pattern", alphas),
            rslora=bool(obj.get("use_rslora")),
            transposed=bool(obj.get("fan_in_fan_out")),
            saved=_names(obj, "modules_to_save"),
            parameters=_names(obj, "target_parameters"),
            dora=bool(obj.get("use_dora")),
            biased=bool(obj.get("lora_bias")),
            tokens=_tokens(obj.get("trainable_token_indices")),
            base_name=_text(obj.get("base_model_name_or_path")),
            task_type=_text(obj.get("task_type")),
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return self.rank_pattern.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the scaling: the number that the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_pattern.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, module: str) -> bool:
        """Tell whether a module is stored whole, by itself or as a part of another module."""
        return any(f".{name}." in f".{module}." for name in self.saved)

    def parameter_of(self, module: str) -> tuple[str, ...]:
        """Return the last names of a module's parameters that ``target_parameters`` may name, in its order."""
        found: dict[str, None] = {}
        for name in self.parameters:
            owner, _, last = name.rpartition(".")
            if not owner or f".{module}".endswith(f".{owner}"):
                found[last] = None
        return tuple(found)

    def rows_of(self, module: str) -> tuple[int, ...] | None:
        """Return the rows of an embedding that the adapter replaces, or None if it names none for this module."""
        for name, rows in self.tokens.items():
            if not name or module.endswith(name):
                return rows
        return None


def _pattern(obj: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = obj.get(name) or {}
    if type(pattern) is not dict:
        raise InvalidFileError(f"{name} {pattern!r} is not a map")
    return list(pattern.items())


def _rank(where: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise InvalidFileError(f"{where} is {value!r}, not a rank of 1 to {MAX_RANK}")
    return value


def _alpha(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise InvalidFileError(f"{where} is {value!r}, not a number of at most {MAX_ALPHA:g}")
    return float(value)


def _names(obj: dict[str, Any], key: str) -> tuple[str, ...]:
    names = obj.get(key) or []
    if type(names) is not list or not all(type(name) is str for name in names):
        raise InvalidFileError(f"{key} {names!r} is not a list of names")
    return tuple(names)


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    found: dict[str, Any] = value if type(value) is dict else {"": value}
    for rows in found.values():
        if type(rows) is not list or not all(type(row) is int and 0 <= row < MAX_TOKEN for row in rows):
            raise InvalidFileError("trainable_token_indices is not a list of token numbers")
    return {name: tuple(rows) for name, rows in found.items()}


def _text(value: Any) -> str:
    return value if type(value) is str else ""
