"""What an adapter does to each tensor of its base: names, dtypes and shapes are checked, and ties are heeded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from deltafmt.checkpoint.adapter import Adapter, Factors, is_embedding
from deltafmt.checkpoint.adapter_config import CONFIG_FILE
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, UnsupportedError, WrongBaseError
from deltafmt.format import constants as c
from deltafmt.pipeline.lora_factors import Product
from deltafmt.pipeline.lora_merge import Change
from deltafmt.pipeline.lora_names import Names, is_head
from deltafmt.pipeline.lora_ties import Untied, heed_ties

# Mamba's layers read the weights of this module themselves.
_READ: Final = "dt_proj"


@dataclass(slots=True)
class LoraPlan:
    """What an adapter does to its base.

    Attributes:
        changes: the change of each base tensor that changes, by its name.
        copies: tensors of the base that stay copies of another one, which changes: by their names, the other's name.
        added: tensors that the base lacks, by name: what is stored, and its change.
        config: keys of the base's ``config.json`` that get other values.
        warnings: what the user has to know.
        untied: the names of parameters that the base ties to others, and this adapter does not.
        names: what differs between the adapter's names and the base's.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    added: dict[str, tuple[Tensor, Change]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    names: list[NameChange] = field(default_factory=list)


def plan_lora(base: Checkpoint, adapter: Adapter, renames: Renames | None = None) -> LoraPlan:
    """Find what becomes of every tensor of the base.

    Args:
        base, adapter: the two sides.
        renames: what the adapter's names are in the base.

    Raises:
        UsageError: a rule of the user's matches no name.
        InvalidFileError: two modules or tensors of the adapter belong to the same base tensor.
        UnsupportedError: a change cannot be written.
        WrongBaseError: the base lacks a tensor, or has it in another shape.
    """
    return _Planner(base, adapter, renames).run()


class _Planner:
    """One run of the plan. Changes are found by parameter first, and then divided among the parameter's tensors."""

    def __init__(self, base: Checkpoint, adapter: Adapter, renames: Renames | None) -> None:
        self._base = base
        self._adapter = adapter
        self._names = Names(base, adapter, renames)
        self._changes: dict[str, Change] = {}
        self._plan = LoraPlan()

    def run(self) -> LoraPlan:
        self._check_complete()
        read = [factors.module for factors in self._adapter.factors if factors.module.endswith(f".{_READ}")]
        if read:
            self._plan.warnings.append(
                f'models read the weights of "{read[0]}" without a call, where factors have no part: the delta is what '
                "merge_and_unload makes, and PEFT computes another model before it merges"
            )
        self._add_factors()
        self._add_layers()
        self._add_rows()
        self._add_whole()
        untied = heed_ties(self._names, self._base, self._changes)
        for parameter, change in self._changes.items():
            self._place(parameter, change, untied)
        self._plan.copies |= {name: target for name, target in untied.copies.items() if target in self._plan.changes}
        self._plan.config |= untied.config
        self._plan.warnings += untied.warnings
        self._plan.untied = sorted(untied.sources)
        self._plan.names = self._names.changes()
        self._grow()
        return self._plan

    def _check_complete(self) -> None:
        """Refuse an adapter that lacks what its configuration names: PEFT would not load it."""
        config, held = self._adapter.config, _inner_names(self._adapter.whole)
        of_base = _inner_names(self._base.tensors)
        for name in config.saved:
            if name in of_base and name not in held:
                raise InvalidFileError(f'{self._adapter.path}: modules_to_save names "{name}", and no tensor is of it')
        if config.tokens and not self._adapter.tokens:
            raise InvalidFileError(
                f"{self._adapter.path}: trainable_token_indices is set, and no tensor holds the rows"
            )

    def _add_factors(self) -> None:
        by_module: dict[str, list[Factors]] = {}
        for factors in self._adapter.factors:
            by_module.setdefault(factors.module, []).append(factors)
        for module, several in by_module.items():
            for factors, parameter in zip(several, self._names.parameters(module, several), strict=True):
                if parameter in self._changes:
                    raise InvalidFileError(f'{self._adapter.path}: two modules are the base\'s tensor "{parameter}"')
                self._changes[parameter] = Change([self._product(factors, parameter)])
                if factors.bias is not None:
                    self._add_bias(factors, factors.bias)

    def _product(self, factors: Factors, parameter: str) -> Product:
        """Return the product that a parameter gets, after checking the factors' shapes against it."""
        config, shape = self._adapter.config, self._names.shape(parameter)
        own = self._adapter.layers.get(parameter)
        if own is not None and own.shape[1:] == shape[1:]:
            shape = own.shape
        a, b = factors.a, factors.b
        stacked = len(shape) == 3 and len(a.shape) == 2
        experts = shape[0] if stacked else 1
        # PEFT looks patterns up by the module's name, and by the parameter's where it has a name of its own.
        own_target = stacked or parameter.rpartition(".")[2] in config.parameter_of(factors.module)
        key = parameter if own_target else factors.module
        try:
            rank, scaling = config.rank_of(key), config.scaling_of(key)
        except UnsupportedError as error:
            raise error.located(self._adapter.path / CONFIG_FILE) from error
        if (a.shape[0], b.shape[1]) != (rank * experts, rank * experts) or 0 in (*a.shape, *b.shape):
            raise InvalidFileError(
                f'{a.file.path}: tensors "{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} '
                f"are not factors of rank {rank}" + (f" for {experts} experts" if stacked else "")
            )
        if len(a.shape) > 2:
            if shape != (b.shape[0], *a.shape[1:]):
                grouped = len(shape) == len(a.shape) and shape[0] == b.shape[0] and shape[2:] == a.shape[2:]
                if grouped:
                    raise UnsupportedError(
                        f'{self._adapter.path}: "{factors.module}" is a convolution with groups, whose factors PEFT '
                        "cannot merge; leave it out of the adapter"
                    )
                raise self._misshapen(parameter, f"the factors of {factors.module} are of a kernel {list(a.shape[1:])}")
            return Product(factors, scaling)
        straight, matrix = (b.shape[0], a.shape[1]), shape[1:] if stacked else shape
        if factors.embedding:
            fits, crossed = matrix == straight[::-1], True
        elif own_target and not stacked:
            fits, crossed = matrix == straight, False
        elif straight == straight[::-1]:
            fits, crossed = matrix == straight, self._names.is_crossed(factors, parameter)
        else:
            fits, crossed = matrix in (straight, straight[::-1]), matrix == straight[::-1]
        if not fits:
            raise self._misshapen(parameter, f"the factors of {factors.module} are of {list(straight)}")
        if factors.magnitude is not None and stacked:
            raise UnsupportedError(f'{self._adapter.path}: DoRA of the experts "{factors.module}" is not supported')
        return Product(factors, scaling, crossed, experts)

    def _add_bias(self, factors: Factors, bias: Tensor) -> None:
        parameter = self._names.canonical(f"{factors.module}.bias")
        if not self._names.pieces(parameter):
            raise UnsupportedError(
                f'{self._adapter.path}: lora_bias gives "{factors.module}" a bias, which the base does not have, so no '
                "merged checkpoint can hold it; serve this adapter with PEFT"
            )
        scaling = self._adapter.config.scaling_of(factors.module)
        if self._names.shape(parameter) != bias.shape:
            raise self._misshapen(parameter, f'tensor "{bias.name}" of the adapter is {list(bias.shape)}')
        self._changes[parameter] = Change(bias=(bias, scaling))

    def _add_layers(self) -> None:
        """Add the base's own tensors as the adapter's model had them, where they differ: PEFT loads them too."""
        for own, tensor in self._adapter.layers.items():
            name = self._names.canonical(own)
            base = self._one_tensor(name)
            if base is None:
                raise self._names.unmatched(tensor.name)
            if base.shape[1:] != tensor.shape[1:] or (base.shape != tensor.shape and len(base.shape) != 2):
                raise self._misshapen(name, f'tensor "{tensor.name}" of the adapter is {list(tensor.shape)}')
            if not tensor.equals(base):
                change = self._changes.setdefault(name, Change())
                change.own = tensor

    def _add_rows(self) -> None:
        """Add the trained rows of embeddings."""
        for module, tensor in self._adapter.tokens.items():
            numbers, parameter = self._adapter.config.rows_of(module), self._names.canonical(f"{module}.weight")
            base = self._one_tensor(parameter)
            if base is None:
                raise self._names.unmatched(tensor.name)
            change = self._changes.setdefault(parameter, Change())
            table = change.own or base
            if len(table.shape) != 2 or table.dtype not in c.DELTA_DTYPES:
                raise self._misshapen(parameter, f'tensor "{tensor.name}" of the adapter is rows of a table')
            rows, columns = table.shape
            if numbers is None or tensor.shape != (len(numbers), columns) or tensor.dtype not in c.DELTA_DTYPES:
                raise InvalidFileError(
                    f'{tensor.file.path}: tensor "{tensor.name}" {tensor.dtype} {list(tensor.shape)} is not the '
                    f"{0 if numbers is None else len(numbers)} rows that trainable_token_indices names"
                )
            if max(numbers, default=0) >= rows:
                raise WrongBaseError(
                    f"{self._base.path}: {module} has {rows} rows, and the adapter replaces row {max(numbers)}; resize "
                    "the base as it was for training"
                )
            if change.products:
                raise UnsupportedError(f'{self._adapter.path}: "{module}" has factors and trained rows')
            change.rows = (numbers, tensor)

    def _add_whole(self) -> None:
        for own, tensor in self._adapter.whole.items():
            name = self._names.canonical(own)
            base = self._one_tensor(name)
            known = self._changes.get(name)
            if known is not None and known.whole is not None:
                raise InvalidFileError(f'{self._adapter.path}: two tensors are the base\'s tensor "{name}"')
            if base is None:
                if not self._adapter.config.saves(own.rpartition(".")[0]) and not self._is_head(name):
                    raise self._names.unmatched(tensor.name)
            elif base.shape != tensor.shape and (len(base.shape) != 2 or base.shape[1:] != tensor.shape[1:]):
                raise self._misshapen(name, f'tensor "{tensor.name}" of the adapter is {list(tensor.shape)}')
            elif known is None and tensor.equals(base):
                if len(tensor.shape) == 2 and self._is_end(name):
                    self._changes[name] = Change(whole=tensor)  # a tied partner may change
                continue
            if known is not None and (known.products or known.rows is not None):
                if base is not None and tensor.equals(base):
                    continue
                # PEFT loads the plain name into the module inside, as it does the base layer's.
                known.own = tensor
            elif known is not None and known.bias is not None:
                known.own = tensor
            else:
                self._changes[name] = Change(whole=tensor)

    def _is_head(self, name: str) -> bool:
        return is_head(name.rpartition(".")[0]) and len(self._names.tied(name)) > 1

    def _is_end(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return is_embedding(module) or is_head(module)

    def _one_tensor(self, parameter: str) -> Tensor | None:
        pieces = self._names.pieces(parameter)
        if len(pieces) > 1:
            raise UnsupportedError(
                f'{self._adapter.path}: "{parameter}" is {len(pieces)} tensors in {self._base.path}, and the adapter '
                "stores it whole; save the base with this version of transformers"
            )
        return self._base.tensors[pieces[0].tensor] if pieces else None

    def _place(self, parameter: str, change: Change, untied: Untied) -> None:
        """Divide a parameter's change among the tensors that it is made of."""
        pieces = self._names.pieces(parameter)
        source = untied.sources.get(parameter)
        if source is not None:
            if change.whole is not None:
                self._plan.added[parameter] = (change.whole, Change())
            else:
                self._plan.added[parameter] = (source, change)
            return
        if not pieces:
            assert change.whole is not None
            self._plan.added[parameter] = (change.whole, Change())
            return
        for piece in pieces:
            tensor = self._base.tensors[piece.tensor]
            if change.whole is None and change.own is None and tensor.dtype not in c.DELTA_DTYPES:
                raise UnsupportedError(
                    f'{self._base.path}: tensor "{piece.tensor}" is {tensor.dtype}, which takes no delta'
                )
            if change.whole is not None and change.whole.equals(tensor):
                continue
            part = change
            if len(pieces) > 1 or piece.expert is not None:
                if change.magnitude is not None:
                    raise UnsupportedError(
                        f'{self._adapter.path}: DoRA of "{parameter}", which is {len(pieces)} tensors in '
                        f"{self._base.path}, is not supported; save the base with this version of transformers"
                    )
                part = Change([self._part(product, piece.expert, piece.start, tensor) for product in change.products])
            if piece.tensor in self._plan.changes:
                what = "tensors" if part.whole is not None else "modules"
                raise InvalidFileError(f'{self._adapter.path}: two {what} are the base\'s tensor "{piece.tensor}"')
            self._plan.changes[piece.tensor] = part

    def _part(self, product: Product, expert: int | None, start: int, tensor: Tensor) -> Product:
        stop = start + tensor.shape[0]
        return Product(product.factors, product.scaling, product.transposed, product.experts, expert, start, stop)

    def _grow(self) -> None:
        """Check that all tensors with a row for each token have grown alike, and note the vocabulary's new size."""
        grown: dict[str, tuple[int, int]] = {}
        for name, change in self._plan.changes.items():
            tensor, new = self._base.tensors[name], change.whole or change.own
            if new is not None and new.shape != tensor.shape:
                grown[name] = (tensor.shape[0], new.shape[0])
        if not grown:
            return
        old, new_size = next(iter(grown.values()))
        for name, tensor in self._base.tensors.items():
            if grown.get(name, (old, new_size)) != (old, new_size):
                raise self._misshapen(name, f"the adapter gives it {grown[name][1]} rows, and {new_size} to others")
            end = len(tensor.shape) == 2 and tensor.shape[0] == old and self._is_end(name)
            if end and name not in grown and name not in self._plan.copies:
                first = next(iter(grown))
                raise self._misshapen(
                    first, f'the adapter gives it {new_size} rows, while "{name}" keeps {tensor.shape[0]}'
                )
        self._plan.config["vocab_size"] = (old, new_size)

    def _misshapen(self, parameter: str, other: str) -> WrongBaseError:
        pieces = self._names.pieces(parameter)
        name = pieces[0].tensor if pieces else parameter
        return WrongBaseError(
            f'{self._base.path}: tensor "{name}" is {list(self._base.tensors[name].shape)}, and {other}'
        )


def _inner_names(tensors: Iterable[str]) -> set[str]:
    """Return every run of parts of the names of modules: for ``a.b.c.weight``, ``a``, ``a.b``, ``b``, ``b.c`` ..."""
    found = set()
    for module in {name.rpartition(".")[0] for name in tensors}:
        parts = module.split(".")
        found |= {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return found
