"""PEFT's rules: which modules of a model a configuration selects, and the configuration that selects given ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from deltafmt.checkpoint.folder import natural_key
from deltafmt.pipeline.model_layout import ModelLayout

DEFAULT_TASK: Final = "CAUSAL_LM"

# With these tasks, PEFT stores the model's head whole, whatever the configuration says.
_HEADS_OF_TASKS: Final = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# PEFT gives these modules of these models no factors.
_REFUSED: Final = frozenset(("conv1d", "out_proj"))
_REFUSING: Final = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
# Where the experts of a block are one parameter, PEFT takes targets of these names for the experts' older names.
_OLD_EXPERTS: Final = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))


def saved_modules(names: Iterable[str], task: str | None, modules: Collection[str]) -> set[str]:
    """Return the modules that PEFT stores whole if it is told to store ``names``: those whose names end so.

    Args:
        names: the names in ``modules_to_save``.
        task: the task's name.
        modules: all modules of the model.
    """
    ends = (*names, *_HEADS_OF_TASKS.get(task or "", ()))
    return {module for module in modules if module.endswith(ends)} if ends else set()


def is_left_out(module: str, saved: Iterable[str]) -> bool:
    """Tell whether PEFT gives a module no factors, because it or a module around it is stored whole."""
    return any(f".{name}." in f".{module}." for name in saved)


def also_selected(targets: Collection[str], modules: Iterable[str]) -> list[str]:
    """Return the modules that PEFT selects beside the targets: those whose names end in a target's name."""
    ends = tuple(f".{name}" for name in targets)
    return [module for module in modules if module not in targets and module.endswith(ends)]


def can_keep_tied(modules: Iterable[str]) -> bool:
    """Tell whether PEFT heeds ``ensure_weight_tying`` for modules: it knows an embedding and a head by these names."""
    return any(module.rpartition(".")[2] in ("embed_tokens", "lm_head") for module in modules)


def is_refused(module: str, config: Mapping[str, Any]) -> bool:
    """Tell whether PEFT refuses a module as a target."""
    return config.get("model_type") in _REFUSING and module.rpartition(".")[2] in _REFUSED


def is_old_expert(module: str, layout: ModelLayout) -> bool:
    """Tell whether PEFT would take a target for the older name of a block's experts."""
    if module.rpartition(".")[2] not in _OLD_EXPERTS:
        return False
    return any(name.endswith(".experts.gate_up_proj") for name in layout.pieces)


def default_task(layout: ModelLayout) -> str | None:
    """Return PEFT's name of the task of a model; None if it has none that leaves the model as it is."""
    if not layout.known:
        return DEFAULT_TASK
    if not layout.generates:
        return None
    return "SEQ_2_SEQ_LM" if layout.encoder_decoder else DEFAULT_TASK


def rank_patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks that ``rank_pattern`` has to name, where ``r`` is the largest: those that differ from it.

    PEFT takes the first key that a module's name ends with. So a name that ends in another's is there too, before it.
    """
    largest = max(ranks.values())
    named = {name for name, rank in ranks.items() if rank < largest}
    for name in ranks:
        start = name.find(".")
        while start >= 0:
            if name[start + 1 :] in named:
                named.add(name)
                break
            start = name.find(".", start + 1)
    return {name: ranks[name] for name in sorted(named, key=lambda name: (-len(name), natural_key(name)))}
