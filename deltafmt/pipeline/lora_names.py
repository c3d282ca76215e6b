"""The parameter, and the base tensors, that each module of an adapter belongs to.

Most names of an adapter are names of the base's tensors, or have one part in front more or less. For the others, and
where the model itself decides, the layout of the model is asked (:mod:`deltafmt.pipeline.model_layout`). What it does
not know is compared by its spelling and by the beginnings of names, as the names of two checkpoints are.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Final

from deltafmt.checkpoint.adapter import Adapter, Factors, is_conv1d, is_embedding
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.heads import match_heads
from deltafmt.checkpoint.matching import unique
from deltafmt.checkpoint.name_changes import NameChange, name_changes
from deltafmt.checkpoint.parameter_names import Piece
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.spellings import plain_name
from deltafmt.errors import Remedy, UnsupportedError, UsageError, WrongBaseError
from deltafmt.pipeline.model_layout import TRANSPOSED, ModelLayout, model_layout

_HEADS: Final = ("lm_head", "embed_out", "proj_out", "output")
_HEADED: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_INPUT: Final = ("embed_tokens", "embed_in", "wte", "shared", "tok_embeddings", "word_embeddings")
# Where transformers is missing: models whose stacked experts have rows and columns exchanged.
_CROSSED_MODELS: Final = frozenset(("aria", "aria_text", "gpt_oss", "openai_privacy_filter"))


class Names:
    """Find the parameters of a base's model by the names that an adapter uses.

    :meth:`canonical` gives the name by which all other methods know a parameter.

    Args:
        base: the base.
        adapter: the adapter.
        renames: what the user says of the adapter's names.

    Raises:
        UsageError: a rule of the user's matches no name of the adapter.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, renames: Renames | None = None) -> None:
        self._base = base
        self._adapter = adapter
        self._rules = renames or Renames()
        self.config: Mapping[str, Any] = base.config()
        self._layout: ModelLayout | None = None
        self._inner = _without_first(base.tensors)
        self._stripped = self._rules.stripped(base.tensors)
        self._inner_stripped = _without_first(self._stripped)
        self._canonical: dict[str, str] = {}
        self._alike: dict[str, str] | None = None
        unused = self._rules.unused(self._asked())
        if unused is not None:
            raise UsageError(f"rename {unused!r} matches no tensor of {adapter.path}")

    def canonical(self, parameter: str) -> str:
        """Return the name that a parameter of the adapter has in the base's model; its own if the base has none."""
        if parameter not in self._canonical:
            self._canonical[parameter] = self._find(parameter)
        return self._canonical[parameter]

    def changes(self) -> list[NameChange]:
        """Return what differs in names between the adapter and the base, beyond a part more or less in front."""
        found = []
        for own, parameter in self._canonical.items():
            pieces = () if self._is_known_as_borrowed(parameter) else self.pieces(parameter)
            if pieces and _near(own, self._base.tensors, self._inner) is None:
                found.append((own, [piece.tensor for piece in pieces]))
        return name_changes(found)

    def _is_known_as_borrowed(self, parameter: str) -> bool:
        """Tell whether the layout was asked, and says that a parameter has no tensor of its own."""
        return self._layout is not None and parameter in self._layout.borrowed

    def _find(self, parameter: str) -> str:
        name = self._rules.apply(parameter)
        plain = _near(name, self._base.tensors, self._inner)
        short = _near(name, self._stripped, self._inner_stripped) if self._rules.prefixes else None
        if short is not None and self._stripped[short] != plain:
            return self._owner(self._stripped[short])
        if plain is not None or name in self.layout.pieces:
            return name
        tensor = self._spelled_alike().get(name)
        return name if tensor is None else self._owner(tensor)

    def _owner(self, tensor: str) -> str:
        """Return the parameter that is one tensor of the base; the tensor's own name if that cannot be told."""
        whole = (Piece(tensor),)
        owners = (name for name, pieces in self.layout.pieces.items() if pieces == whole)
        return next((name for name in owners if name not in self.layout.borrowed), tensor)

    def _asked(self) -> list[str]:
        """Return the names of all parameters that the adapter may mean."""
        adapter = self._adapter
        lasts = [
            f"{one.module}.{last}"
            for one in adapter.factors
            for last in ("weight", *adapter.config.parameter_of(one.module))
        ]
        return [*lasts, *(f"{module}.weight" for module in adapter.tokens), *adapter.whole, *adapter.layers]

    def _spelled_alike(self) -> dict[str, str]:
        """Return tensors of the base by the names of the adapter that differ in spelling, or in how they begin."""
        if self._alike is None:
            names = {self._rules.apply(name) for name in self._asked()}
            near = {name for name in names if _near(name, self._stripped, self._inner_stripped) is not None}
            mine = unique((plain_name(name), name) for name in names - near if name not in self.layout.pieces)
            theirs = unique((plain_name(short), own) for short, own in self._stripped.items())
            self._alike = {mine[spelled]: theirs.pop(spelled) for spelled in mine if spelled in theirs}
            left = [spelled for spelled, name in mine.items() if name not in self._alike]
            heads = match_heads(left, theirs, lambda _, __: True)
            self._alike |= {mine[spelled]: theirs[target] for spelled, target in heads.names.items()}
        return self._alike

    @property
    def layout(self) -> ModelLayout:
        """The layout of the base's model."""
        if self._layout is None:
            shapes = {name: tensor.shape for name, tensor in self._base.tensors.items()}
            self._layout = model_layout(self.config, shapes)
        return self._layout

    def pieces(self, parameter: str) -> tuple[Piece, ...]:
        """Return the base's tensors that a parameter is made of, or those of one that it is tied to; none if none."""
        found = self._own_pieces(parameter)
        if found or self.layout.known:
            return found
        return next((pieces for name in self.tied(parameter) if (pieces := self._own_pieces(name))), ())

    def is_borrowed(self, parameter: str) -> bool:
        """Tell whether a tied parameter has no tensor of its own."""
        return parameter in self.layout.borrowed if self.layout.known else not self._own_pieces(parameter)

    def _own_pieces(self, parameter: str) -> tuple[Piece, ...]:
        near = _near(parameter, self._base.tensors, self._inner)
        return self.layout.pieces.get(parameter, ()) if near is None else (Piece(near),)

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of a parameter that has pieces."""
        pieces = self.pieces(parameter)
        shape = self._base.tensors[pieces[0].tensor].shape
        if len(pieces) == 1 and pieces[0].expert is None:
            return shape
        last = max(pieces, key=lambda piece: (piece.start, piece.expert or 0))
        rows = last.start + self._base.tensors[last.tensor].shape[0]
        return (rows, *shape[1:]) if last.expert is None else (last.expert + 1, rows, *shape[1:])

    def parameters(self, module: str, several: list[Factors]) -> list[str]:
        """Return the parameter that each of a module's factors belongs to.

        Args:
            module: the module.
            several: its factors. A module with several has them in the order of its parameters, the first inside.

        Raises:
            UnsupportedError: it cannot be told which factors belong to which parameter.
            WrongBaseError: the base has no such module.
        """
        named = {
            last: name
            for last in self._adapter.config.parameter_of(module)
            if self.pieces(name := self.canonical(f"{module}.{last}"))
        }
        if len(several) == 1 and len(named) != 1:
            weight = self.canonical(f"{module}.weight")
            if self.pieces(weight):
                return [weight]
            if self.pieces(self.canonical(f"{module}.in_proj_weight")):
                raise UnsupportedError(
                    f'{self._adapter.path}: "{module}" is a torch.nn.MultiheadAttention, of which versions of PEFT '
                    "compute other things; merge the adapter with PEFT (merge_and_unload), save the model and use pack"
                )
            if not named:
                raise self.unmatched(several[0].a.name)
        if len(named) != len(several):
            raise UnsupportedError(
                f'{self._adapter.path}: module "{module}" has {len(several)} pairs of factors, and target_parameters '
                f"names {len(named)} of its parameters"
            )
        ordered = list(named.values())
        if len(named) > 1:
            # The joined projections of experts are the one case that the table knows.
            order = list(self.layout.pieces) if self.layout.known else []
            place = {name: number for number, name in enumerate(order)}
            ordered.sort(key=lambda name: (place.get(name, 0), name.rpartition(".")[2].startswith("down"), name))
        inside_first = sorted(several, key=lambda factors: -factors.depth)
        by_depth = dict(zip((factors.depth for factors in inside_first), ordered, strict=True))
        return [by_depth[factors.depth] for factors in several]

    def is_crossed(self, factors: Factors, parameter: str) -> bool:
        """Tell whether a square parameter has the rows and columns of its module's weight exchanged."""
        module = parameter.rpartition(".")[0]
        model_type = self.config.get("model_type")
        if len(self.shape(parameter)) == 3:
            return module in self.layout.crossed if self.layout.known else model_type in _CROSSED_MODELS
        if is_conv1d(factors.module, self.config):
            return True
        if not self._adapter.config.transposed:
            return False
        kind = self.layout.kinds.get(module) if self.layout.known else None
        return kind in (None, TRANSPOSED)

    def tied(self, parameter: str) -> tuple[str, ...]:
        """Return all names of a parameter that the model uses in several places, this one's among them."""
        module = parameter.rpartition(".")[0]
        head = is_head(module)
        # Only where nothing speaks for a tie is the model itself not asked.
        if not (head or is_embedding(module) or self._may_be_tied(parameter)):
            return (parameter,)
        if self.layout.known:
            return self.layout.ties.get(parameter, (parameter,))
        if not parameter.endswith(".weight"):
            return (parameter,)
        inputs = [name for name in self._base.tensors if _is_input(name)]
        heads = [name for name in self._base.tensors if is_head(name.rpartition(".")[0])]
        ties, classes = self.config.get("tie_word_embeddings"), self.config.get("architectures") or ()
        # Without a word in the configuration, a model with a head and no tensor for it ties it.
        headed = head or any(str(name).endswith(_HEADED) for name in classes)
        if len(inputs) != 1 or not (ties is True or (ties is None and headed and not heads)):
            return (parameter,)
        if head:
            return self._used(inputs[0], _is_input), parameter
        tied = inputs[0] in {piece.tensor for piece in self._own_pieces(parameter)}
        other = self._used(heads[0] if heads else "lm_head.weight", lambda name: is_head(name.rpartition(".")[0]))
        return (parameter, other) if tied else (parameter,)

    def _may_be_tied(self, parameter: str) -> bool:
        """Tell whether a parameter has no tensor of its name, or has a row for each token."""
        tensor = self._base.tensors.get(parameter)
        if tensor is None:
            return self._layout is not None
        return len(tensor.shape) == 2 and tensor.shape[0] in _vocabularies(self.config)

    def _used(self, name: str, fits: Callable[[str], bool]) -> str:
        """Return the name that the adapter uses for a parameter, or the given one if it uses none."""
        adapter = self._adapter
        modules = [*(factors.module for factors in adapter.factors), *adapter.tokens]
        used = [*(f"{module}.weight" for module in modules), *adapter.whole, *adapter.layers]
        return next((other for other in map(self.canonical, used) if fits(other)), name)

    def unmatched(self, name: str) -> WrongBaseError:
        """Return the error for a tensor of the adapter that belongs to no tensor of the base."""
        named = self._adapter.config.base_name
        other = f", and its base is named {named!r}" if named else ""
        text = f'{self._adapter.path}: tensor "{name}" matches nothing in {self._base.path}{other}'
        return WrongBaseError(text, Remedy("rename", None))


def _without_first(names: Iterable[str]) -> dict[str, str]:
    """Return names by what stands behind their first part, where that is the name's alone."""
    return unique((name.partition(".")[2], name) for name in names)


def _near(name: str, names: Container[str], inner: Mapping[str, str]) -> str | None:
    """Look up a name that may have one part fewer, or one more, in front."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in names:
            return candidate
    return inner.get(name)


def is_head(module: str) -> bool:
    """Tell from its name whether a module is an output head that may be tied to an embedding."""
    return module.rpartition(".")[2] in _HEADS


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    """Return the sizes of the vocabularies that a configuration and its parts name."""
    sizes = {size for key, size in config.items() if key == "vocab_size" and isinstance(size, int)}
    return sizes.union(*(_vocabularies(part) for part in config.values() if isinstance(part, dict)))


def _is_input(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _INPUT
