"""Parameters that the base ties, and an adapter that changes one of them: what PEFT computes is the truth.

PEFT wraps modules. A module that is wrapped computes with its own change, and one that is tied to it does not. So an
adapter of the embedding alone unties it from the head, unless ``ensure_weight_tying`` gave the head the same change.
The unpacked checkpoint then has a head of its own, and its ``config.json`` says ``tie_word_embeddings: false``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import UnsupportedError
from deltafmt.pipeline.lora_merge import Change, same_change
from deltafmt.pipeline.lora_names import Names
from deltafmt.pipeline.model_layout import model_layout

TIES: Final = "tie_word_embeddings"


@dataclass(slots=True)
class Untied:
    """What becomes of ties.

    Attributes:
        sources: the base tensor that each parameter without a tensor of its own begins with, by the parameter's name.
        copies: tensors of the base that stay copies of another one: by their names, the other's name.
        config: keys of ``config.json`` with other values.
        warnings: what the user has to know.
    """

    sources: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def heed_ties(names: Names, base: Checkpoint, changes: dict[str, Change]) -> Untied:
    """Tell which parameters stay tied, and give those that do not a change of their own.

    Args:
        names: finds parameters.
        base: the base.
        changes: the changes by parameter. Changes of parameters that stay tied to another changed one are taken out.

    Raises:
        UnsupportedError: the model cannot be loaded as PEFT computes it.
    """
    result = Untied()
    seen: set[str] = set()
    for parameter in list(changes):
        group = names.tied(parameter)
        if len(group) > 1 and not seen.intersection(group):
            seen.update(group)
            _heed(names, base, changes, group, result)
    if result.config and names.layout.known:
        _keep_others(names, base, changes, result)
    return result


def _keep_others(names: Names, base: Checkpoint, changes: dict[str, Change], result: Untied) -> None:
    """Give tensors of their own to the other parameters that a model without ties does not tie: BERT's bias, say."""
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    after = model_layout(without_ties(names.config), shapes)
    for name in sorted(names.layout.borrowed):
        group = names.layout.ties[name]
        keeper = next((other for other in group if other not in names.layout.borrowed), None)
        if keeper is None or name in result.sources or keeper in after.ties.get(name, (name,)):
            continue
        result.sources[name] = base.tensors[names.pieces(keeper)[0].tensor]
        changes.setdefault(name, changes.get(keeper, Change()))


def _heed(names: Names, base: Checkpoint, changes: dict[str, Change], group: tuple[str, ...], result: Untied) -> None:
    changed = [name for name in group if name in changes]
    first = changes[changed[0]]
    rows_only = first.rows is not None
    stored = {name: names.pieces(name) for name in group}
    source = next((base.tensors[pieces[0].tensor] for pieces in stored.values() if pieces), None)
    if source is None:
        return
    # PEFT trains rows of the head along with those of the embedding that it is tied to.
    alike = all(same_change(first, changes[name]) for name in changed[1:]) and (
        len(changed) == len(group) or (rows_only and len(changed) == 1)
    )
    own = [pieces[0].tensor for pieces in stored.values() if pieces]
    if alike:
        keeper = next(name for name in group if stored[name])
        for name in changed:
            del changes[name]
        changes[keeper] = first
        target = stored[keeper][0].tensor
        result.copies |= {name: target for name in own if name != target}
        return
    if all(changes[name].whole is not None and changes[name].whole.equals(source) for name in changed):  # type: ignore[union-attr]
        for name in changed:
            del changes[name]
        return
    config = names.config
    result.config[TIES] = False
    _check_untied(names, base, group, changes)
    for name in group:
        if names.is_borrowed(name):
            result.sources[name] = source
            changes.setdefault(name, Change())
    others = [name for name in group if name not in changed or changes[name] is not first]
    if not config:
        result.warnings.append(
            f"{base.path} has no config.json, which would say that {' and '.join(group)} are no longer tied"
        )
    if any(changes[name].products for name in changed):
        result.warnings.append(
            f"{changed[0].rpartition('.')[0]} changes and {others[0].rpartition('.')[0]}, which the base ties to it, "
            "does not change alike: they are untied, as PEFT computes; its merge_and_unload makes another model"
        )


def _check_untied(names: Names, base: Checkpoint, group: tuple[str, ...], changes: Mapping[str, Change]) -> None:
    """Check that a model whose configuration does not tie its embeddings has these parameters apart."""
    if len(group) == 2 and not names.layout.known:
        return
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    layout = model_layout(without_ties(names.config), shapes)
    still = [name for name in group if len(set(layout.ties.get(name, (name,))) & set(group)) > 1]
    if len(group) > 2 or not layout.known or still or layout.asks_for_ties:
        raise UnsupportedError(
            f"{base.path}: the base ties {', '.join(group)}, and the adapter changes "
            f"{', '.join(name for name in group if name in changes)} alone, which a checkpoint of this model cannot "
            "say; serve this adapter with PEFT"
        )


def without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose embeddings are not tied, at its top and in every part that says they are."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found[key] = without_ties(value) if isinstance(value, dict) else (False if key == TIES else value)
    return found | {TIES: False} if "model_type" in config else found
