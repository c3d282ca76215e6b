"""The parameters of a model, by the names that PEFT sees, and the tensors of a checkpoint that they are made of.

transformers 5 renames and joins tensors while it loads a checkpoint: ``embed_out`` becomes ``lm_head``, and the experts
of a block become one parameter. Where transformers is installed and knows the model, it says so itself: the model is
made without memory (on torch's ``meta`` device), and its conversion mapping is asked for every tensor. Elsewhere a
small table stands in for it (:mod:`deltafmt.checkpoint.parameter_names`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.parameter_names import Piece, table_pieces

Shapes = Mapping[str, tuple[int, ...]]

LINEAR = "linear"
EMBEDDING = "embedding"
TRANSPOSED = "transposed linear"
OTHER = "other"
# Code that reads a module's weight; its dtype and its device are no weight.
_READ = re.compile(
    r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|requires_grad|data_ptr)\b|\s*=[^=])"
)
# The greatest numbers of a configuration that a model is made of.
_NUMBER = 2**25
_LAYERS = 256
_COUNTED = re.compile(r"(layer|block|stage|expert)s?$|^depths?$")
# A module that PEFT cannot wrap, such as the projection of torch.nn.MultiheadAttention, which reads it without a call.
UNCALLED = "uncalled"


@dataclass(slots=True)
class ModelLayout:
    """What is known of a model.

    Attributes:
        pieces: the tensors that each parameter is made of, by the parameter's name.
        shapes: the parameters' shapes; empty if only the table is known.
        kinds: what each module is, by its name; empty if only the table is known.
        ties: all names of each parameter that has several, by each of them.
        embedding: the module of the input embedding; empty if it is not known.
        crossed: the modules whose stacked experts have rows and columns exchanged.
        borrowed: the tied parameters without a tensor of their own.
        state: the shapes of all tensors that the model stores: its parameters, and buffers such as running means.
        generates: True if the model writes text from tokens.
        encoder_decoder: True if it has an encoder and a decoder.
        asks_for_ties: True if the model computes otherwise where its configuration ties no embeddings.
        known: True if transformers said all this.
    """

    pieces: dict[str, tuple[Piece, ...]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    embedding: str = ""
    crossed: frozenset[str] = frozenset()
    borrowed: frozenset[str] = frozenset()
    state: dict[str, tuple[int, ...]] = field(default_factory=dict)
    generates: bool = False
    encoder_decoder: bool = False
    asks_for_ties: bool = False
    known: bool = False


def model_layout(config: Mapping[str, Any], tensors: Shapes) -> ModelLayout:
    """Return the layout of the model that a checkpoint is loaded as.

    Args:
        config: the checkpoint's ``config.json``.
        tensors: the shapes of its tensors, by name.
    """
    return _known_layout(config, tensors) or ModelLayout(table_pieces(config, tensors))


def _known_layout(config: Mapping[str, Any], tensors: Shapes) -> ModelLayout | None:
    """Return the layout as transformers has it, or None if it cannot say."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or any(not _installed(name) for name in ("torch", "transformers")):
        return None
    if not _is_bounded(config, max(len(tensors), _LAYERS)):
        return None
    model = meta_model(config)
    # A transformers of another version may lack what is asked of it here.
    with contextlib.suppress(Exception):
        return None if model is None else _layout(model, tensors)
    return None


def _is_bounded(config: Mapping[str, Any], layers: int) -> bool:
    """Tell whether a configuration's numbers are those of a model that the checkpoint can be of.

    A model has no more layers and experts than tensors. Whoever made the file may say otherwise, and making the model
    would then take endless time.
    """
    for key, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        most = layers if _COUNTED.search(key) else _NUMBER
        if any(isinstance(number, int) and abs(number) > most for number in numbers) or len(numbers) > _NUMBER:
            return False
        if any(isinstance(part, dict) and not _is_bounded(part, layers) for part in numbers):
            return False
    return True


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def meta_model(config: Mapping[str, Any]) -> Any:
    """Return the model that a configuration names, without memory for its weights; None if it cannot be made."""
    import torch
    import transformers
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, name = config.get("model_type"), config["architectures"][0]
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or cls is None:
        return None
    plain = {key: _plain(value) for key, value in config.items() if key != "quantization_config"}
    quiet = _quietly(), torch.random.fork_rng(devices=[]), torch.device("meta")
    # Code of a model that does not expect to be made without memory may fail in any way.
    with quiet[0], quiet[1], quiet[2], contextlib.suppress(Exception):
        loaded: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(plain)
        model = cls(loaded)
        model.tie_weights()
        return model
    return None


def _plain(value: Any) -> Any:
    """Return a value of a configuration with the numbers that JSON lacks, which transformers writes as maps."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what transformers has to say about a configuration from the user."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _layout(model: Any, tensors: Shapes) -> ModelLayout:
    pieces = _converted(model, tensors)
    spots: dict[int, list[str]] = {}
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        spots.setdefault(id(parameter), []).append(name)
        shapes[name] = tuple(parameter.shape)
    ties = {name: tuple(names) for names in spots.values() if len(names) > 1 for name in names}
    # A tied parameter that the checkpoint lacks is made of what its other name is made of; stored copies stay apart.
    borrowed = frozenset(name for name in ties if name not in pieces)
    for name in borrowed:
        source = next((other for other in ties[name] if other in pieces), None)
        if source is not None:
            pieces[name] = pieces[source]
    kinds = {name: _kind(module) for name, module in model.named_modules(remove_duplicate=False)}
    kinds |= dict.fromkeys(_read_only(model), UNCALLED)
    embedding = ""
    with contextlib.suppress(NotImplementedError, AttributeError):
        table = model.get_input_embeddings()
        embedding = next((name for name, module in model.named_modules() if module is table), "")
    crossed = frozenset(
        name for name, module in model.named_modules() if getattr(module, "is_transposed", False) is True
    )
    # Parameters in the order in which the modules have them, and then what the model does not know.
    ordered = {name: pieces[name] for name in shapes if name in pieces}
    return ModelLayout(
        {**ordered, **pieces},
        shapes,
        kinds,
        ties,
        embedding,
        crossed,
        borrowed,
        state={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        generates=model.main_input_name == "input_ids" and model.can_generate(),
        encoder_decoder=bool(model.config.is_encoder_decoder),
        asks_for_ties=_asks_for_ties(model),
        known=True,
    )


def _read_only(model: Any) -> Iterator[str]:
    """Give the modules whose weights the code of the module around them reads, as Mamba's ``dt_proj``."""
    known: dict[type, frozenset[str]] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in known:
            source = ""
            with contextlib.suppress(OSError, TypeError):
                source = inspect.getsource(cls)
            if "slow_but_exact" in source and not model.config.slow_but_exact:
                source = ""  # Bloom reads weights in a mode that nobody is in
            known[cls] = frozenset(_READ.findall(source))
        for child in known[cls] & {child for child, _ in module.named_children()}:
            yield f"{name}.{child}" if name else child


def _asks_for_ties(model: Any) -> bool:
    """Tell whether the model's own forward pass reads ``tie_word_embeddings``, as some of T5's relatives do."""
    with contextlib.suppress(OSError, TypeError):
        return "tie_word_embeddings" in inspect.getsource(type(model).forward)
    return False


def _kind(module: Any) -> str:
    import torch

    if isinstance(module, torch.nn.MultiheadAttention) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return UNCALLED
    if not inspect.signature(module.forward).parameters:
        return UNCALLED  # PEFT wraps what is called with a tensor
    if isinstance(module, torch.nn.Embedding):
        # PEFT looks rows up itself, and knows one other kind of embedding: one that multiplies them.
        plain = type(module).forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
        return EMBEDDING if plain else OTHER
    if isinstance(module, torch.nn.Linear):
        return LINEAR if type(module).forward is torch.nn.Linear.forward else OTHER
    return TRANSPOSED if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else OTHER


def _converted(model: Any, tensors: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Return the tensors that each parameter is made of, as transformers' conversion mapping says."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    pieces: dict[str, tuple[Piece, ...]] = {}
    joined: dict[str, dict[str, list[str]]] = {}
    for name in sorted(tensors, key=natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            pieces[renamed] = (Piece(name),)
        else:
            joined.setdefault(renamed, {}).setdefault(pattern, []).append(name)
    for parameter, by_pattern in joined.items():
        pattern = next(iter(by_pattern))
        converter = next(transform for transform in converters if pattern in transform.source_patterns)
        operations = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        groups = [by_pattern[source] for source in converter.source_patterns if source in by_pattern]
        pieces[parameter] = _joined(operations, groups, tensors)
    return pieces


def _joined(operations: list[tuple[str, Any]], groups: list[list[str]], tensors: Shapes) -> tuple[Piece, ...]:
    """Return the pieces of a parameter that tensors are joined into; none if they are joined in a way not known."""
    found = []
    if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        start = 0
        for group in groups:
            found += [Piece(name, expert, start) for expert, name in enumerate(group)]
            start += tensors[group[0]][0]
    elif operations == [("Concatenate", 0)] and all(len(group) == 1 for group in groups):
        start = 0
        for (name,) in groups:
            found.append(Piece(name, None, start))
            start += tensors[name][0]
    return tuple(found)
