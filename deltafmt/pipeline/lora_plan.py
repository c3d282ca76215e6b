"""The base tensor that each tensor of an adapter belongs to, found from names, dtypes and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from deltafmt.checkpoint.adapter import Adapter, Factors, is_conv1d
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, Remedy, UnsupportedError, WrongBaseError
from deltafmt.format import constants as c
from deltafmt.pipeline.lora_names import LoraNames


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """The place of every tensor of an adapter.

    Attributes:
        factors: pairs of factors, by the name of the base tensor to which their product is added.
        transposed: names of base tensors that are the transpose of their module's weight.
        replaced: tensors of the adapter that replace a base tensor, and new ones, by their name in the model.
        names: what differs between the adapter's names and the base's.
    """

    factors: dict[str, Factors]
    transposed: frozenset[str]
    replaced: dict[str, Tensor]
    names: list[NameChange]


def plan_lora(base: Checkpoint, adapter: Adapter, renames: Renames | None = None) -> LoraPlan:
    """Find the base tensor of everything in the adapter.

    Args:
        base, adapter: the two sides.
        renames: what the adapter's names are in the base.

    Raises:
        InvalidFileError: two modules or tensors of the adapter belong to the same base tensor.
        UnsupportedError: a tensor can be written neither as base plus factors nor as a replacement.
        WrongBaseError: the base lacks a tensor, or has it in another shape.
    """
    names = LoraNames(base, [*(f"{module}.weight" for module in adapter.factors), *adapter.whole], renames or Renames())
    factors: dict[str, Factors] = {}
    transposed = set()
    for module, pair in adapter.factors.items():
        name = names.find(f"{module}.weight")
        if name is None:
            raise _unmatched(base, adapter, pair.a.name)
        if name in factors:
            raise InvalidFileError(f'{adapter.path}: two modules are the base\'s tensor "{name}"')
        if _is_transposed(pair, base, name, adapter):
            transposed.add(name)
        factors[name] = pair
    replaced: dict[str, Tensor] = {}
    for name, tensor in adapter.whole.items():
        found = names.find(name)
        if not _changes(base, adapter, name, found, tensor):
            continue
        if found in factors:
            raise UnsupportedError(f'{adapter.path}: tensor "{tensor.name}" is not the base\'s, and has factors too')
        if found in replaced:
            raise InvalidFileError(f'{adapter.path}: two tensors are the base\'s tensor "{found}"')
        replaced[found or name] = tensor
    return LoraPlan(factors, frozenset(transposed), replaced, names.changes())


def _changes(base: Checkpoint, adapter: Adapter, name: str, found: str | None, tensor: Tensor) -> bool:
    """Return True if a tensor that the adapter stores whole differs from the base's, or is new.

    Raises:
        UnsupportedError, WrongBaseError: the tensor is new where none may be, or has another shape than the base's.
    """
    if found is not None:
        if base.tensors[found].shape != tensor.shape:
            raise _misshapen(base, found, f'tensor "{tensor.name}" of the adapter is {list(tensor.shape)}')
        return not tensor.equals(base.tensors[found])
    module = name.rpartition(".")[0]
    if not adapter.config.saves(module):
        raise _unmatched(base, adapter, tensor.name)
    if module.rpartition(".")[2] != "lm_head":
        return True
    # The base ties its head to its embedding, so the adapter's head must equal its embedding.
    if not any(tensor.equals(other) for other in adapter.whole.values() if other is not tensor):
        raise UnsupportedError(
            f'{adapter.path}: tensor "{tensor.name}" would untie the head from the embedding of {base.path}'
        )
    return False


def _is_transposed(pair: Factors, base: Checkpoint, name: str, adapter: Adapter) -> bool:
    """Return True if the base stores a weight with rows and columns exchanged.

    If the weight is square, its shape does not tell: the model's type decides, or the adapter's ``fan_in_fan_out``.
    """
    tensor = base.tensors[name]
    if tensor.dtype not in c.DELTA_DTYPES:
        raise UnsupportedError(f'{base.path}: tensor "{name}" is {tensor.dtype}, which takes no delta')
    straight = pair.b.shape[0], pair.a.shape[1]
    crossed = straight[::-1]
    if pair.embedding:
        fits, found = tensor.shape == crossed, True
    elif straight == crossed:
        fits, found = tensor.shape == straight, is_conv1d(pair.module, base.config()) or adapter.config.transposed
    else:
        fits, found = tensor.shape in (straight, crossed), tensor.shape == crossed
    if not fits:
        raise _misshapen(base, name, f"the factors of {pair.module} are of {list(straight)}")
    return found


def _unmatched(base: Checkpoint, adapter: Adapter, name: str) -> WrongBaseError:
    text = f'{adapter.path}: tensor "{name}" matches nothing in {base.path}{_named(adapter)}'
    return WrongBaseError(text, Remedy("rename", None))


def _misshapen(base: Checkpoint, name: str, other: str) -> WrongBaseError:
    return WrongBaseError(f'{base.path}: tensor "{name}" is {list(base.tensors[name].shape)}, and {other}')


def _named(adapter: Adapter) -> str:
    return f", and its base is named {adapter.config.base_name!r}" if adapter.config.base_name else ""
