"""The names of a model's parameters where transformers is not at hand: a table of what it renames and joins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from deltafmt.checkpoint.folder import natural_key


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a checkpoint, as a part of a parameter.

    Attributes:
        tensor: the tensor's name.
        expert: its place in the parameter's first dimension; None if the parameter has no such dimension.
        start: the parameter's row in which it begins.
    """

    tensor: str
    expert: int | None = None
    start: int = 0


# In checkpoints of some families the model's parts stand in other places: what the name begins with, and the place.
_MOVED: Final = (
    (re.compile(r"language_model\.model\."), "model.language_model."),
    (re.compile(r"language_model\.lm_head\."), "lm_head."),
    (re.compile(r"(vision_tower|vision_model|multi_modal_projector|audio_tower|visual)\."), r"model.\1."),
    (re.compile(r"embed_out\."), "lm_head."),
)
# A multimodal model whose text part has the name of a whole text model.
_VISUAL: Final = re.compile(r"(?:model\.)?visual\.")
_TEXT: Final = re.compile(r"model\.(?=(?:layers|norm|embed_tokens)\.)")
_BLOCK: Final = ".block_sparse_moe."
_EXPERT: Final = re.compile(r"(.+\.experts)\.([0-9]+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_JOINED: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def table_pieces(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """Return the tensors that each parameter is made of, by all names that the parameter may have.

    Args:
        config: the checkpoint's ``config.json``.
        tensors: the shapes of the checkpoint's tensors, by name.
    """
    pieces: dict[str, tuple[Piece, ...]] = {}
    experts: dict[str, dict[str, list[str]]] = {}
    multimodal = any(_VISUAL.match(name) for name in tensors) or "text_config" in config
    for name in sorted(tensors, key=natural_key):
        for renamed in _names(name, multimodal):
            pieces.setdefault(renamed, (Piece(name),))
            if (found := _EXPERT.fullmatch(renamed)) is not None:
                experts.setdefault(found[1], {}).setdefault(found[3], []).append(name)
    for block, kinds in experts.items():
        for joined, forms in _JOINED.items():
            groups = next(([kinds[kind] for kind in form] for form in forms if all(kind in kinds for kind in form)), [])
            if groups and len({len(group) for group in groups}) == 1:
                pieces.setdefault(f"{block}.{joined}", _stacked(groups, tensors))
    return pieces


def _names(name: str, multimodal: bool) -> list[str]:
    """Return the names that a tensor's parameter may have: its own, and those that the table gives."""
    found = [name]
    for pattern, place in _MOVED:
        if pattern.match(name):
            found.append(pattern.sub(place, name, count=1))
    if multimodal and _TEXT.match(name):
        found.append(_TEXT.sub("model.language_model.", name, count=1))
    if _BLOCK in name:
        found.append(name.replace(_BLOCK, ".mlp."))
    return found


def _stacked(groups: list[list[str]], tensors: Mapping[str, tuple[int, ...]]) -> tuple[Piece, ...]:
    found, start = [], 0
    for group in groups:
        found += [Piece(name, expert, start) for expert, name in enumerate(group)]
        start += tensors[group[0]][0]
    return tuple(found)
