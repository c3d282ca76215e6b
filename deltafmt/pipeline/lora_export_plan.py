"""What ``export_lora`` writes: which parameters get factors, and which modules PEFT has to store whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deltafmt.checkpoint.adapter import is_conv1d, is_embedding, may_be_conv1d
from deltafmt.checkpoint.parameter_names import Piece
from deltafmt.errors import Remedy, UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.lora_entries import EntriesInBase
from deltafmt.pipeline.lora_modules import LoraModule, stored_dtype
from deltafmt.pipeline.lora_names import is_head
from deltafmt.pipeline.lora_peft import can_keep_tied, is_left_out, is_old_expert, is_refused, saved_modules
from deltafmt.pipeline.model_layout import EMBEDDING, LINEAR, OTHER, TRANSPOSED, UNCALLED, ModelLayout
from deltafmt.terms.lowrank.layout import LowRankLayout


@dataclass(slots=True)
class ExportPlan:
    """What an adapter will hold.

    Attributes:
        modules: the parameters with factors.
        saved: the names of modules that are stored whole, as ``modules_to_save`` has them.
        whole: the parameters that are stored whole, by name: the tensors that each is made of.
        biases: the biases that are stored by themselves.
        tied: the module of an embedding that the base ties to others, if it changes; it is then stored whole, as they.
        tying: True if PEFT is told to keep the embedding and the head tied (``ensure_weight_tying``).
        left_out: the vectors that change and that an adapter for vLLM cannot hold: norms and biases.
    """

    modules: list[LoraModule] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    whole: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    biases: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    tied: str = ""
    tying: bool = False
    left_out: dict[str, tuple[Piece, ...]] = field(default_factory=dict)


class ExportPlanner:
    """Plan one export.

    Args:
        delta: the delta's entries by the names that the base has for them.
        layout: the layout of the base's model.
        config: the base's configuration; empty if it is not known.
        task: PEFT's name of the task.
        dtype: the dtype of the factors, or None for that in which they are stored.
        factors_only: True to store no module whole, as vLLM needs it: vectors are left out, and a head that the base
            ties to an embedding gets factors of its own.
    """

    def __init__(
        self,
        delta: EntriesInBase,
        layout: ModelLayout,
        config: Mapping[str, Any],
        task: str | None,
        dtype: str | None,
        *,
        factors_only: bool = False,
    ) -> None:
        self._factors_only = factors_only
        self._delta = delta
        self._layout = layout
        self._config = config
        self._task = task
        self._dtype = dtype
        self._name = delta.name
        # What is not of low rank in an imported adapter (trained rows, DoRA by a method) is stored whole.
        self._imported = delta.delta.metadata.get("method") == "lora"
        self._entries = delta.entries
        self._owner: dict[str, str] = {}
        for parameter, pieces in layout.pieces.items():
            if parameter not in layout.borrowed:
                # The table has a tensor's own name first, and the name that transformers gives it after that.
                self._owner.update((piece.tensor, parameter) for piece in pieces)
        stored = layout.state or dict.fromkeys(self._owner.values(), ())
        self._stored: dict[str, list[str]] = {}
        for parameter in stored:
            self._stored.setdefault(parameter.rpartition(".")[0], []).append(parameter)
        self._modules = set(layout.kinds) - {""} or _ancestors(self._stored)
        self._factors: dict[str, LoraModule] = {}
        self._saved: dict[str, None] = {}
        self._plan = ExportPlan()

    def plan(self) -> ExportPlan:
        """Return the plan.

        Raises:
            UsageError: a tensor's delta cannot be an adapter's (names the first), or no tensor has a low-rank delta.
        """
        changed = self._changed()
        for parameter, entries in changed.items():
            self._sort(parameter, entries)
        if self._factors_only:
            self._give_heads_factors(changed)
        else:
            self._heed_ties(changed)
            self._close()
        if not self._factors:
            stored = f", of those that PEFT does not store whole ({', '.join(self._saved)})" if self._saved else ""
            raise UsageError(f"{self._name}: no tensor has a low-rank delta{stored[:200]}")
        self._plan.modules = list(self._factors.values())
        return self._plan

    def _changed(self) -> dict[str, list[tuple[Piece, TensorEntry]]]:
        """Return the parameters that change, with the tensors that do, in the order of the file."""
        changed: dict[str, list[tuple[Piece, TensorEntry]]] = {}
        for name, listed in self._entries.items():
            entry = self._delta.resolve(name)
            if entry.action == "same" or (listed.target is not None and name not in self._owner):
                continue
            where = f'{self._name}: tensor "{name}"'
            if listed.target is not None and not self._config:
                text = (
                    f"{where} is tied to {listed.target}, and only the base's config.json tells if its model ties them"
                )
                raise UsageError(text, Remedy("base", None))
            parameter = self._owner.get(name)
            if parameter is None or (self._layout.known and parameter not in self._layout.state):
                raise UsageError(f"{where} has no place of its own in the base's model, where an adapter would lose it")
            piece = next(piece for piece in self._layout.pieces[parameter] if piece.tensor == name)
            changed.setdefault(parameter, []).append((piece, entry))
        return changed

    def _sort(self, parameter: str, parts: list[tuple[Piece, TensorEntry]]) -> None:
        """Give a parameter factors, or store its module whole."""
        module = parameter.rpartition(".")[0]
        entries = [entry for _, entry in parts]
        for entry in entries:
            self._check_terms(entry)
        if not module:
            raise UsageError(
                f'{self._name}: tensor "{entries[0].name}" is replaced and belongs to no module, so an adapter has no '
                "place for it; use unpack"
            )
        if not all(_is_low_rank(entry) for entry in entries):
            if self._factors_only:
                self._leave_out(parameter, entries)
            elif not self._is_bias(parameter, module):
                self._saved[module] = None
            return
        found = self._module(parameter, module, parts)
        if self._factors_only and (found is None or found.own):
            raise self._no_factors(parameter)
        if found is None:
            self._saved[module] = None
        else:
            self._factors[parameter] = found

    def _leave_out(self, parameter: str, entries: list[TensorEntry]) -> None:
        """Leave a vector out of an adapter that stores nothing whole.

        Raises:
            UsageError: it is a matrix.
        """
        if any(len(entry.shape) != 1 for entry in entries):
            raise self._no_factors(parameter)
        self._plan.left_out[parameter] = self._layout.pieces[parameter]

    def _no_factors(self, parameter: str) -> UsageError:
        return UsageError(
            f'{self._name}: "{parameter}" changes by no factors of its module, and vLLM loads nothing else from an '
            "adapter; serve the delta itself, which its plugin for vLLM does"
        )

    def _give_heads_factors(self, changed: Mapping[str, object]) -> None:
        """Write out the factors of heads that the base ties to an embedding: vLLM adapts each by its own."""
        for parameter, module in list(self._factors.items()):
            for name in self._group(parameter):
                if name == parameter or name in changed:
                    continue
                if not (name in self._layout.borrowed or self._is_copy(name)) or not module.embedding:
                    raise self._no_factors(name)
                self._factors[name] = replace(module, parameter=name, embedding=False)

    def _check_terms(self, entry: TensorEntry) -> None:
        where = f'{self._name}: tensor "{entry.name}"'
        kind = next((term.layout.kind for term in entry.terms if not isinstance(term.layout, LowRankLayout)), None)
        if kind is not None and not self._imported:
            raise UsageError(f"{where} has a term of kind {kind}; an adapter has lowrank terms alone")
        if entry.terms and (entry.base is None or entry.base.shape != entry.shape):
            raise UsageError(f"{where} has other rows than its base, which an adapter cannot say; use unpack")

    def _is_bias(self, parameter: str, module: str) -> bool:
        """Note a bias that is stored by itself: PEFT loads it into the module's own."""
        if parameter != f"{module}.bias" or len(self._stored.get(module, ())) < 2:
            return False
        self._plan.biases[parameter] = self._layout.pieces[parameter]
        return True

    def _module(self, parameter: str, module: str, parts: list[tuple[Piece, TensorEntry]]) -> LoraModule | None:
        """Return a parameter's factors, or None if it has to be stored whole."""
        layout, entry = self._layout, parts[0][1]
        where = f'{self._name}: tensor "{entry.name}"'
        stored = _shape(layout.pieces[parameter], self._delta)
        shape = layout.shapes.get(parameter) or stored
        if math.prod(shape) != math.prod(stored):
            text = f"{where} makes a parameter of shape {list(stored)}, and the config.json one of {list(shape)}"
            raise UsageError(text, Remedy("base", None))
        dtype = stored_dtype([part for _, part in parts], self._dtype)
        kind = layout.kinds.get(module, OTHER) if layout.known else ""
        # Models read the weights of tables of positions without a call, where PEFT's factors have no part in it.
        read = kind == UNCALLED or (kind == EMBEDDING and module not in self._tables())
        if read or is_refused(module, self._config):
            return None
        if kind == OTHER and any(owner.startswith(f"{module}.") for owner in self._stored):
            return None  # the model may look for the modules inside, which PEFT hides
        if len(shape) == 3 and (kind == OTHER or parts[0][0].expert is not None) and not parameter.endswith(".weight"):
            return LoraModule(parameter, shape, tuple(parts), crossed=module in layout.crossed, own=True, dtype=dtype)
        if len(shape) != 2:
            if layout.known:
                return None
            raise UsageError(f"{where} of shape {list(entry.shape)} is not the weight matrix of a module")
        if not parameter.endswith(".weight") or kind == OTHER or is_old_expert(module, layout):
            return LoraModule(parameter, shape, tuple(parts), own=True, dtype=dtype)
        if not layout.known and not self._config and may_be_conv1d(module):
            text = f"{where} may be stored transposed, which only its base's config.json tells"
            raise UsageError(text, Remedy("base", None))
        embedding = kind == EMBEDDING if layout.known else is_embedding(module)
        crossed = kind == TRANSPOSED if layout.known else is_conv1d(module, self._config)
        assert kind in ("", LINEAR, EMBEDDING, TRANSPOSED)
        return LoraModule(parameter, shape, tuple(parts), embedding, crossed, dtype=dtype)

    def _tables(self) -> tuple[str, ...]:
        """Return the modules of the input embedding: its own, and those that are tied to it."""
        table = self._layout.embedding
        return tuple(name.rpartition(".")[0] for name in self._group(f"{table}.weight"))

    def _heed_ties(self, changed: Mapping[str, object]) -> None:
        """Store tied parameters whole where PEFT, as it loads an adapter and as it merges it, gives two models.

        PEFT adds a module's factors to its own output, and merges them into the weight, which tied modules share.
        """
        for parameter in list(self._factors):
            group = self._group(parameter)
            apart = [name for name in group if name in changed or name in self._layout.borrowed]
            alike = [name for name in group if name in self._layout.borrowed or self._is_copy(name)]
            shared = [name for name in group if name.rpartition(".")[0] not in self._saved]
            if len(group) < 2 or (not alike and len(shared) < 2):
                continue
            for name in apart:
                self._saved[name.rpartition(".")[0]] = None
        for parameter in changed:
            group = self._group(parameter)
            alike = [name for name in group if name in self._layout.borrowed or self._is_copy(name)]
            if len(group) < 2 or not alike:
                continue
            for name in alike:
                self._saved[name.rpartition(".")[0]] = None
            if parameter.endswith(".weight"):
                modules = [name.rpartition(".")[0] for name in group]
                linear = [self._layout.kinds.get(module, LINEAR) == LINEAR for module in modules]
                self._plan.tied = parameter.rpartition(".")[0]
                # A head that PEFT keeps tied has no bias.
                plain = not any(f"{module}.bias" in self._layout.state for module in modules)
                self._plan.tying = len(group) == 2 and any(linear) and plain and can_keep_tied(modules)
                if self._layout.asks_for_ties and not self._plan.tying:
                    raise UsageError(
                        f'{self._name}: "{parameter}" changes, which the base ties; PEFT unties it when it merges, and '
                        "this model computes otherwise then; use unpack, or an adapter that leaves the embedding alone"
                    )

    def _group(self, parameter: str) -> tuple[str, ...]:
        """Return all names of a parameter in the base's model."""
        if self._layout.known:
            return self._layout.ties.get(parameter, (parameter,))
        module = parameter.rpartition(".")[0]
        vocabulary = self._config.get("vocab_size")
        tied = self._config.get("tie_word_embeddings") is True and is_embedding(module)
        pieces = self._layout.pieces.get(parameter, ())
        if not tied or not pieces or self._delta.resolve(pieces[0].tensor).shape[:1] != (vocabulary,):
            return (parameter,)
        heads = [name for name in self._owner.values() if is_head(name.rpartition(".")[0])]
        return parameter, (heads[0] if heads else "lm_head.weight")

    def _is_copy(self, parameter: str) -> bool:
        """Tell whether the fine-tune stores a parameter as a copy of another one, or not at all."""
        pieces = self._layout.pieces.get(parameter, ())
        entry = self._entries.get(pieces[0].tensor) if pieces else None
        return entry is None or entry.target is not None

    def _close(self) -> None:
        """Store whole what PEFT stores whole along with the modules that need it."""
        names: list[str] = []
        while True:
            names = [name for name in self._saved if not any(name.startswith(f"{other}.") for other in self._saved)]
            modules = saved_modules(names, self._task, self._modules | set(names))
            lost = [name for name in self._factors if is_left_out(name.rpartition(".")[0], names)]
            lost += [name for name in self._factors if name.rpartition(".")[0] in modules and name not in lost]
            for name in lost:
                del self._factors[name]
                if not any(_inside(name, module) for module in modules):
                    self._saved[name.rpartition(".")[0]] = None
            if not lost:
                break
        self._plan.saved = [name for name in names if name in self._modules or name in self._saved]
        for module in sorted(modules):
            inside = [name for owner, names in self._stored.items() if _inside(owner, module) for name in names]
            for name in inside or [f"{module}.weight"]:
                self._plan.whole[name] = self._values(name)
        for name in list(self._plan.biases):
            if any(_inside(name, module) for module in modules):
                del self._plan.biases[name]

    def _values(self, parameter: str) -> tuple[Piece, ...]:
        """Return the tensors that a parameter's values are made of."""
        # The fine-tune may have a tied parameter under another of its names alone.
        others = [name for name in self._owner.values() if parameter in self._group(name)]
        for name in (parameter, *others):
            pieces = self._layout.pieces.get(name, ())
            if pieces and all(piece.tensor in self._entries for piece in pieces):
                return pieces
        raise UsageError(f'{self._name}: PEFT stores "{parameter}" with its module, and the delta has no tensor for it')


def _is_low_rank(entry: TensorEntry) -> bool:
    return bool(entry.terms) and all(isinstance(term.layout, LowRankLayout) for term in entry.terms)


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _ancestors(modules: Mapping[str, object]) -> set[str]:
    found = set()
    for module in modules:
        outer = module
        while outer and outer not in found:
            found.add(outer)
            outer = outer.rpartition(".")[0]
    return found


def _shape(pieces: tuple[Piece, ...], delta: EntriesInBase) -> tuple[int, ...]:
    """Return the shape of a parameter that is made of tensors."""
    last = max(pieces, key=lambda piece: (piece.start, piece.expert or 0))
    shape = delta.resolve(last.tensor).shape
    if last.expert is None:
        return (last.start + shape[0], *shape[1:]) if len(pieces) > 1 else shape
    return (last.expert + 1, last.start + shape[0], *shape[1:])
