"""Whether a fine-tune is whole: compared with its base, with its ``config.json``, and with what its save should hold.

A fine-tune may lack tensors because its save is broken, because it holds only what was trained, or because its model
has none. Only the last is silently right. For the others, the caller says what is done: ``same`` takes the tensors
from the base, ``removed`` leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from deltafmt.checkpoint.folder import ADAPTER_TENSOR, Checkpoint
from deltafmt.checkpoint.quantizers import parts_of_codes, quantizer_of
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.weight_names import bounded
from deltafmt.errors import InvalidFileError, Remedy
from deltafmt.format.constants import DELTA_DTYPES, element_count
from deltafmt.pipeline.pairing import Pairing

# The base tensor of every tensor of the fine-tune that has one, by the name that it has in the fine-tune.
Bases = Mapping[str, Tensor]

SAME: Final = "same"
REMOVED: Final = "removed"
MISSING: Final = (SAME, REMOVED)

# Buffers that older checkpoints hold and that models compute by themselves.
_COMPUTED: Final = re.compile(
    r"rot\w*\.(inv_freq|cos_cached|sin_cached)$|(^|\.)rope\.freqs$|\.masked_bias$"
    r"|(^|\.)(position_ids|token_type_ids|relative_position_index|relative_coords_table)$"
)
_CAUSAL_MASK: Final = re.compile(r"attn(\.attention)?\.bias$")
_HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
# Matrices of the vocabulary, and biases of heads, are what models tie.
_VOCABULARY: Final = re.compile(
    r"embed|wte|(^|\.)shared\.|head|decoder\.(weight|bias)$|proj_out|output(_projection)?\.(weight|bias)$|predictions\.bias$"
)
_LAYER: Final = re.compile(r"^(.*?\.)([0-9]{1,6})\.")
# A model has few tied matrices. Where more tensors are absent, they are not compared with all others.
_MAX_TIED: Final = 16
# Numbers of a configuration on which the shapes of layers do not depend.
_NO_SIZE: Final = re.compile(r"vocab|token_id|position|layers?$|seed|dropout|version|window|labels|beam")
_DELTAS: Final = frozenset(DELTA_DTYPES)
_LAYERS_KEYS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(slots=True)
class Completeness:
    """What a fine-tune lacks.

    Attributes:
        lacking: names of base tensors that the fine-tune should have and has not, or has without elements.
        empty: names of tensors that the fine-tune has without elements, where the base has elements or no tensor.
        spared: names of base tensors that the fine-tune's model does not need.
        taken: names of tensors that are taken from the base.
    """

    lacking: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)


def find_empty(bases: Bases, finetuned: Checkpoint, whole: Collection[str]) -> list[str]:
    """Return the names of tensors that a save without gathering has emptied, as ZeRO-3 does.

    A tensor without elements counts if the base's has some, or if the base has none of that name and the shape is
    ``[0]``, which is what a partitioned parameter looks like. Those in ``whole`` do not count: the user has them stored
    whole, as they are.
    """
    empty = []
    for name, tensor in finetuned.tensors.items():
        if tensor.nbytes or name in whole:
            continue
        other = bases.get(name)
        if (other is None and tensor.shape == (0,)) or (other is not None and other.nbytes):
            empty.append(name)
    return empty


def check_flattened(bases: Bases, finetuned: Checkpoint, whole: Collection[str]) -> None:
    """Refuse matrices that the fine-tune has as vectors, as the shards of FSDP and DeepSpeed are.

    Args:
        bases: the base tensors.
        finetuned: the fine-tune.
        whole: names of tensors that the user has stored whole.

    Raises:
        InvalidFileError: names the first one.
    """
    found = [
        tensor
        for name, tensor in finetuned.tensors.items()
        if len(tensor.shape) == 1 and tensor.dtype in DELTA_DTYPES and name not in whole
        if (other := bases.get(name)) is not None and len(other.shape) >= 2 and other.dtype in DELTA_DTYPES
    ]
    if found:
        first = found[0]
        shape = list(bases[first.name].shape)
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        raise InvalidFileError(
            f'{finetuned.path}: tensor "{first.name}"{more} is flat, {list(first.shape)}, and {shape} in the base: '
            "it is a part of a sharded save; save the whole model",
            Remedy("exclude", first.name),
        )


def check_partial(base: Checkpoint, bases: Bases, finetuned: Checkpoint, whole: Collection[str]) -> None:
    """Refuse matrices of layers that have other shapes than the base's, where both configurations say the same sizes.

    Such matrices are a part of the model, as the save of one process of a tensor-parallel run.

    Raises:
        InvalidFileError: names the first one.
    """
    sizes, sizes_of_base = _sizes(finetuned.config()), _sizes(base.config())
    if not sizes or sizes != sizes_of_base:
        return
    for name, tensor in finetuned.tensors.items():
        other = bases.get(name)
        if other is None or name in whole or not _LAYER.match(name) or not {tensor.dtype, other.dtype} <= _DELTAS:
            continue
        if len(tensor.shape) == len(other.shape) > 1 and tensor.shape != other.shape:
            raise InvalidFileError(
                f'{finetuned.path}: tensor "{name}" has shape {list(tensor.shape)}, and {list(other.shape)} '
                "in the base, though both configurations say the same sizes: it is a part of a sharded save; "
                "save the whole model",
                Remedy("exclude", name),
            )


def check_merged(bases: Bases, finetuned: Checkpoint, whole: Collection[str]) -> None:
    """Refuse tensors of an adapter that lie among the fine-tune's weights, and that the base has not.

    What was trained is in them: the weights beside them are the base's, or nearly so, and no loader adds the two.

    Raises:
        InvalidFileError: names the first one.
    """
    found = [n for n in finetuned.tensors if ADAPTER_TENSOR.search(n) and n not in bases and n not in whole]
    if found:
        raise InvalidFileError(
            f"{finetuned.path}: {_counted(found)} of its weights {'is' if len(found) == 1 else 'are'} a LoRA adapter "
            f'that is not merged, such as "{found[0]}": merge it first',
            Remedy("exclude", "*lora[_.]*"),
        )


def find_lacking(base: Checkpoint, finetuned: Checkpoint, pairing: Pairing) -> Completeness:
    """Return which of the base's tensors the fine-tune lacks, and which of those its model does not need.

    Args:
        base, finetuned: the checkpoints.
        pairing: which of their tensors belong together.
    """
    found = Completeness()
    used = pairing.taken() | pairing.unlike | finetuned.tensors.keys()
    used |= _elsewhere(base, finetuned, pairing)
    absent = [name for name in base.tensors if name not in used]
    if not absent:
        return found
    spare = _Spare(base, finetuned, pairing, used, compare=len(absent) <= _MAX_TIED)
    for name in absent:
        (found.spared if spare.has(name) else found.lacking).append(name)
    return found


def _elsewhere(base: Checkpoint, finetuned: Checkpoint, pairing: Pairing) -> set[str]:
    """Return the base's tensors that nothing took, if the fine-tune's that are left have exactly as many elements.

    They are the same weights in a layout that is not known, such as experts with rows and columns exchanged.
    """
    left = sum(element_count(finetuned.tensors[name].shape) for name in pairing.left if name in finetuned.tensors)
    free = sum(element_count(base.tensors[name].shape) for name in pairing.free)
    return set(pairing.free) if left == free else set()


def refuse_lacking(base: Checkpoint, finetuned: Checkpoint, found: Completeness) -> None:
    """Refuse a fine-tune that is not whole.

    Raises:
        InvalidFileError: names the tensors, the likely cause and the way out.
    """
    path = finetuned.path
    if found.empty:
        verb = "has" if len(found.empty) == 1 else "have"
        raise InvalidFileError(
            f"{path}: {_counted(found.empty)} {verb} no elements (shape [0]), as after a ZeRO-3 save without "
            f"gathering: {bounded(found.empty)}; save the gathered model",
            Remedy("missing", None),
        )
    if found.lacking:
        raise InvalidFileError(
            f"{path}: it lacks {_counted(found.lacking)} of the base's {len(base.tensors):,}: "
            f"{bounded(found.lacking)}{_cause(finetuned)}",
            Remedy("missing", None),
        )


def check_layers(base: Checkpoint, finetuned: Checkpoint) -> None:
    """Refuse a fine-tune whose ``config.json`` says more layers than its weights have.

    Only where the base's weights have as many layers as its own ``config.json`` says: some models share layers.

    Raises:
        InvalidFileError: names both numbers.
    """
    said, said_of_base = _layers_said(finetuned.config()), _layers_said(base.config())
    if said is None or said_of_base is None or max(_stacks(base.tensors).values(), default=0) != said_of_base:
        return
    have = max(_stacks(finetuned.tensors).values(), default=0)
    if have < said:
        raise InvalidFileError(
            f"{finetuned.path}: config.json says {said} layers, and the weights have {have}; the save is incomplete, "
            "or the configuration is another model's"
        )


def _counted(names: list[str]) -> str:
    return f"{len(names):,} tensor{'' if len(names) == 1 else 's'}"


def _cause(finetuned: Checkpoint) -> str:
    """Return what may have led to an incomplete fine-tune, if its tensors tell."""
    if any(".lora_" in name for name in finetuned.tensors):
        return "; its LoRA adapter is not merged (it has lora_ tensors): merge it first"
    return f"; {finetuned.notes[0]}" if finetuned.notes else ""


def _stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers of every stack: 4 for ``model.layers.`` if there is ``model.layers.3.x``."""
    stacks: dict[str, int] = {}
    for name in names:
        found = _LAYER.match(name)
        if found:
            stacks[found[1]] = max(stacks.get(found[1], 0), int(found[2]) + 1)
    return stacks


def _setting(config: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first value that a configuration, or that of its text model, has for one of several keys."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in keys:
            if key in place:
                return place[key]
    return None


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of a configuration that shapes of layers may follow from."""
    return {key: value for key, value in config.items() if type(value) is int and not _NO_SIZE.search(key)}


def _layers_said(config: Mapping[str, Any]) -> int | None:
    found = _setting(config, _LAYERS_KEYS)
    return found if type(found) is int and found > 0 else None


def _module_alone(pairing: Pairing) -> str:
    """Return how the names of one module of the base begin, if the fine-tune is that module, saved alone.

    Its names are then the base's without that beginning: ``layers.0.w`` for the base's ``model.layers.0.w``.
    """
    heads = set()
    for name, tensor in pairing.tensors.items():
        if name not in pairing.tied:
            parts = tensor.parts()
            other = parts[0].name
            if len(parts) > 1:
                continue
            if not other.endswith(f".{name}"):
                return ""
            heads.add(other.removesuffix(name))
    return heads.pop() if len(heads) == 1 else ""


class _Spare:
    """Tells of a base tensor that the fine-tune lacks whether the fine-tune's model does without it."""

    def __init__(
        self, base: Checkpoint, finetuned: Checkpoint, pairing: Pairing, used: Collection[str], *, compare: bool
    ) -> None:
        self._compare = compare
        self._used = used
        self._base = base
        self._finetuned = finetuned
        config, of_base = finetuned.config(), base.config()
        self._tied = _setting(config, ("tie_word_embeddings",))
        kinds = config.get("architectures"), of_base.get("architectures")
        self._other_head = all(isinstance(kind, list) and kind for kind in kinds) and kinds[0] != kinds[1]
        said, said_of_base = _layers_said(config), _layers_said(of_base)
        self._cut_to = said if said is not None and said_of_base is not None and said < said_of_base else None
        self._stacks = _stacks(used)
        coded = quantizer_of(base) is not None and quantizer_of(finetuned) is None
        floats = (name for name in parts_of_codes(base) if base.tensors[name].dtype in DELTA_DTYPES)
        self._scales = frozenset(floats) if coded else frozenset()
        self._modules = {name.split(".")[0] for name in used}
        self._saved_alone = _module_alone(pairing)
        layers = {stack.rstrip(".").rpartition(".")[0] for stack in _stacks(pairing.taken())}
        self._inner = tuple(f"{module}." for module in layers if module) if pairing.inner and all(layers) else ()

    def has(self, name: str) -> bool:
        """Tell whether the model does without a tensor of the base."""
        tensor = self._base.tensors[name]
        component = self._base.names.split(name)[0]
        if (component and component not in self._finetuned.loader.declared) or component in self._finetuned.dropped:
            return True
        if not name.startswith(self._saved_alone):
            return True
        if self._inner and not name.startswith(self._inner) and not _HEAD.search(name):
            return True
        if _COMPUTED.search(name) or (_CAUSAL_MASK.search(name) and len(tensor.shape) == 4):
            return True
        if name in self._scales:
            return True
        layer = _LAYER.match(name)
        if layer:
            # A stack that was cut: config.json says so, and the fine-tune has exactly the layers before.
            cut = self._cut_to is not None and self._stacks.get(layer[1]) == self._cut_to
            return cut and int(layer[2]) >= self._stacks[layer[1]]
        if self._other_head and (name.split(".", maxsplit=1)[0] not in self._modules or ".pooler." in f".{name}"):
            return True
        return self._is_tied(name, tensor)

    def _is_tied(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor is a tied copy of one that the fine-tune has, which loaders tie again."""
        if self._tied is False or not _VOCABULARY.search(name):
            return False
        if self._tied is True and _HEAD.search(name):
            return True
        return self._compare and any(
            other.shape == tensor.shape and other.equals(tensor)
            for other in self._base.tensors.values()
            if other.name != name and other.name in self._used and _VOCABULARY.search(other.name)
        )
