"""The configuration of a PEFT adapter: the part of ``adapter_config.json`` that decides its LoRA delta."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from deltafmt.errors import InvalidFileError, UnsupportedError
from deltafmt.output import storage_error

Number = TypeVar("Number", int, float)

CONFIG_FILE: Final = "adapter_config.json"
DEFAULT_RANK: Final = 8
DEFAULT_ALPHA: Final = 8
MAX_RANK: Final = 2**20
MAX_ALPHA: Final = 1e30

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
        *("alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "modules_to_save", "peft_type", "r"),
        *("rank_pattern", "use_rslora"),
    )
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of an adapter's configuration that decides its delta.

    Attributes:
        rank, alpha: the rank and alpha of modules that no pattern matches.
        rank_pattern, alpha_pattern: ranks and alphas by regular expression; the first one that matches decides.
        rslora: True if the scaling is alpha / sqrt(rank); False if it is alpha / rank.
        transposed: True if the weights have rows and columns exchanged, as GPT-2's have (``fan_in_fan_out``).
        saved: the names of modules that are stored whole (``modules_to_save``).
        base_name, task_type: the base's name and the task type, as the file gives them; empty if it gives none.
    """

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    transposed: bool
    saved: tuple[str, ...]
    base_name: str
    task_type: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an ``adapter_config.json``.

        Raises:
            StorageError: the file cannot be read.
            InvalidFileError: the file is not a configuration as PEFT writes it.
            UnsupportedError: the adapter is not plain LoRA.
        """
        try:
            obj = json.loads(path.read_bytes())
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
            raise UnsupportedError(f"peft_type {peft_type!r} is not supported; only LORA is")
        if obj.get("use_dora"):
            raise UnsupportedError("use_dora is set, and DoRA is not a sum of a base and a low-rank delta")
        start = obj.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVING):
            raise UnsupportedError(
                f"init_lora_weights {start!r} changed the base's weights; PEFT converts it to plain LoRA when it saves "
                "with path_initial_model_for_weight_conversion"
            )
        for key, value in obj.items():
            if value and key not in _READ and key not in _HARMLESS:
                raise UnsupportedError(f"{key} is set, which is not supported")
        saved = obj.get("modules_to_save") or []
        if type(saved) is not list or not all(type(name) is str for name in saved):
            raise InvalidFileError(f"modules_to_save {saved!r} is not a list of names")
        return cls(
            rank=_rank("r", obj.get("r", DEFAULT_RANK)),
            alpha=_alpha("lora_alpha", obj.get("lora_alpha", DEFAULT_ALPHA)),
            rank_pattern={key: _rank(f"rank_pattern {key!r}", value) for key, value in _pattern(obj, "rank_pattern")},
            alpha_pattern={
                key: _alpha(f"alpha_pattern {key!r}", value) for key, value in _pattern(obj, "alpha_pattern")
            },
            rslora=bool(obj.get("use_rslora")),
            transposed=bool(obj.get("fan_in_fan_out")),
            saved=tuple(saved),
            base_name=_text(obj.get("base_model_name_or_path")),
            task_type=_text(obj.get("task_type")),
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return _matching(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the scaling: the number that the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, module: str) -> bool:
        """Tell whether a module is stored whole, by itself or as a part of another module."""
        return any(f".{name}." in f".{module}." for name in self.saved)


def _matching(pattern: dict[str, Number], module: str, default: Number) -> Number:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _pattern(obj: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = obj.get(name) or {}
    if type(pattern) is not dict:
        raise InvalidFileError(f"{name} {pattern!r} is not a map")
    for key in pattern:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidFileError(f"{name} {key!r} is not a regular expression") from error
    return list(pattern.items())


def _rank(where: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise InvalidFileError(f"{where} is {value!r}, not a rank of 1 to {MAX_RANK}")
    return value


def _alpha(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise InvalidFileError(f"{where} is {value!r}, not a number of at most {MAX_ALPHA:g}")
    return float(value)


def _text(value: Any) -> str:
    return value if type(value) is str else ""
