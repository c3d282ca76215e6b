"""The base's tensor of every tensor of a fine-tune, and the refusal of a pair that does not belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from deltafmt.checkpoint.correspondence import Correspondence, correspond
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.library_names import library_names
from deltafmt.checkpoint.name_changes import NameChange, name_changes
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.resemblance import distance, unrelated
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.spellings import is_layered, numberless
from deltafmt.errors import Remedy, UsageError, WrongBaseError
from deltafmt.format.constants import DELTA_DTYPES, element_count


@dataclass(frozen=True, slots=True)
class PairOptions:
    """What a user says of a pair.

    Attributes:
        renames: what the fine-tune's names are in the base.
        allow_architecture: True to accept two types of model.
    """

    renames: Renames = field(default_factory=Renames)
    allow_architecture: bool = False

    @classmethod
    def parse(
        cls, rename: Sequence[str] = (), strip_prefix: Sequence[str] = (), allow_architecture: bool = False
    ) -> Self:
        """Return the options that the arguments of :func:`deltafmt.pack` give.

        Raises:
            UsageError: a rule is not of the form FROM=TO.
        """
        return cls(Renames.parse(rename, strip_prefix), allow_architecture)


@dataclass(frozen=True, slots=True)
class Pairing:
    """The tensors of a pair that belong together.

    Attributes:
        tensors: the base's tensor by the name of the fine-tune's.
        tied: names of tensors that the base lacks and whose base is another tensor: a head, untied from the embedding.
        unrelated: names that were left without a base because the values of the two are unrelated.
        unlike: names of the base's tensors that those were compared with.
        inner: True if the fine-tune's type of model is that of a model inside the base.
        architecture: the two types of model, if they differ and this was allowed; otherwise empty.
        left: matrices of the fine-tune's layers without a counterpart, although the base has layers left.
        free: those of the base, if ``left`` is not empty.
    """

    tensors: Mapping[str, Tensor]
    tied: frozenset[str] = frozenset()
    unrelated: frozenset[str] = frozenset()
    unlike: frozenset[str] = frozenset()
    inner: bool = False
    architecture: str = ""
    left: tuple[str, ...] = ()
    free: tuple[str, ...] = ()

    def changes(self) -> list[NameChange]:
        """Return what differs in names and layouts."""
        return name_changes((name, [part.name for part in base.parts()]) for name, base in self.tensors.items())

    def owns(self, name: str) -> bool:
        """Tell whether a tensor has a base that is not another tensor's."""
        return name in self.tensors and name not in self.tied

    def taken(self) -> set[str]:
        """Return the names of the base's tensors that belong to some tensor of the fine-tune."""
        return {part.name for base in self.tensors.values() for part in base.parts()}


def pair_up(base: Checkpoint, finetuned: Checkpoint, options: PairOptions | None = None) -> Pairing:
    """Find what belongs together in two checkpoints.

    Raises:
        UsageError: a rule of the user's matches no name.
        WrongBaseError: the models have different types, or most elements have no counterpart in the base.
    """
    options = options or PairOptions()
    unused = options.renames.unused(list(finetuned.tensors))
    if unused is not None:
        raise UsageError(f"rename {unused!r} matches no tensor of {finetuned.path}")
    for prefix in options.renames.prefixes:
        if not any(name.startswith(prefix) for name in (*base.tensors, *finetuned.tensors)):
            raise UsageError(f"no tensor's name begins with the prefix {prefix!r}, on either side")
    architecture = _types(base, finetuned, options)
    found = correspond(
        finetuned.tensors, base.tensors, options.renames, lambda names: library_names((base, finetuned), names)
    )
    dropped = _unrelated(finetuned, found)
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in dropped}
    tied = dict(_untied(base, finetuned, tensors, dropped))
    _check(base, finetuned, tensors, found, dropped)
    return Pairing(
        tensors | tied,
        frozenset(tied),
        frozenset(dropped),
        frozenset(part.name for name in dropped for part in found.tensors[name].parts()),
        _model_type(finetuned.config()) in _inner(base.config()),
        architecture,
        tuple(found.left),
        tuple(found.free),
    )


def _types(base: Checkpoint, finetuned: Checkpoint, options: PairOptions) -> str:
    """Refuse two types of model, unless one is a part of the other or the user allows it.

    Raises:
        WrongBaseError: names the types.
    """
    configs = base.config(), finetuned.config()
    mine, theirs = map(_model_type, configs)
    if None in (mine, theirs) or mine == theirs or theirs in _inner(configs[0]) or mine in _inner(configs[1]):
        return ""
    if not options.allow_architecture:
        text = f"the base is a {mine!r} model, the fine-tune a {theirs!r} model"
        raise WrongBaseError(text, Remedy("allow_architecture"))
    return f"{mine} to {theirs}"


def _model_type(config: dict[str, Any]) -> str | None:
    """Return the type of a model, or None where the configuration has none, or something else in its place."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def _inner(config: Any, depth: int = 4) -> set[str]:
    """Return the types of the models inside a model, such as the language model of a multimodal one."""
    found: set[str] = set()
    for value in config.values() if isinstance(config, dict) and depth else ():
        if isinstance(value, dict):
            kind = value.get("model_type")
            found |= ({kind} if isinstance(kind, str) else set()) | _inner(value, depth - 1)
    return found


def _unrelated(finetuned: Checkpoint, found: Correspondence) -> set[str]:
    """Return the names among those that were found whose values have nothing to do with the base's.

    All layers of a kind are judged together, by three of them.
    """
    kinds: dict[str, list[str]] = {}
    for name in found.found:
        if len(finetuned.tensors[name].shape) >= 2:
            kinds.setdefault(numberless(name), []).append(name)
    dropped: set[str] = set()
    for names in kinds.values():
        tried = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
        if all(unrelated(finetuned.tensors[name], found.tensors[name]) for name in tried):
            dropped.update(names)
    return dropped


def _untied(
    base: Checkpoint, finetuned: Checkpoint, tensors: Mapping[str, Tensor], dropped: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Give matrices without a counterpart that were trained from another matrix of the base, each with that matrix.

    A base that ties its output head to its embedding has no tensor for the head; a fine-tune may untie it.
    """
    sources = [tensor for name, tensor in base.tensors.items() if _is_table(name, tensor)]
    for name, tensor in finetuned.tensors.items():
        if name in tensors or name in dropped or not _is_table(name, tensor):
            continue
        alike = [
            (near, number)
            for number, source in enumerate(sources)
            if max(tensor.rows, source.rows) <= 2 * min(tensor.rows, source.rows)
            and (near := distance(tensor, source)) is not None
            and not unrelated(tensor, source)
        ]
        if alike:
            yield name, sources[min(alike)[1]]


def _is_table(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor may be an embedding or an output head: a matrix outside the layers."""
    return len(tensor.shape) == 2 and tensor.dtype in DELTA_DTYPES and bool(tensor.nbytes) and not is_layered(name)


def _check(
    base: Checkpoint, finetuned: Checkpoint, tensors: Mapping[str, Tensor], found: Correspondence, dropped: set[str]
) -> None:
    """Refuse a pair in which most elements have no counterpart in the base.

    Raises:
        WrongBaseError: says what the names or shapes of both sides look like.
    """
    matched = total = 0
    odd = None
    for name, tensor in finetuned.tensors.items():
        size, other = element_count(tensor.shape), tensors.get(name)
        total += size
        if other is not None and other.shape[1:] == tensor.shape[1:] and len(other.shape) == len(tensor.shape):
            matched += size
        else:
            odd = odd or tensor
    if odd is None or 2 * matched >= total:
        return
    if found.ambiguous:
        rules = " and ".join(repr(f"{_dotted(head.own)}={_dotted(head.base)}") for head in found.ambiguous[0])
        text = f"the fine-tune's names go with the base's in several ways: the rules {rules} fit equally well"
        raise WrongBaseError(text, Remedy("rename", None))
    other = tensors.get(odd.name) or base.tensors.get(odd.name)
    if odd.name in dropped:
        parts = found.tensors[odd.name].parts()
        joined = "" if len(parts) == 1 else " fused or stacked"
        raise WrongBaseError(
            f'the shapes go together under other names, but the values of tensor "{odd.name}" have nothing to do with '
            f'the base\'s{joined} "{parts[0].name}"',
            Remedy("rename", None),
        )
    if other is not None:
        found_shape = f"has shape {list(other.shape)} in the base"
        raise WrongBaseError(
            "base and fine-tune are of different architecture: "
            f'tensor "{odd.name}" of shape {list(odd.shape)} {found_shape}'
        )
    raise _other_names(base, finetuned, odd, found)


def _other_names(base: Checkpoint, finetuned: Checkpoint, odd: Tensor, found: Correspondence) -> WrongBaseError:
    """Return the error for a pair whose names differ, and for which no unique match was found."""
    if found.heads and found.left and found.free:
        rule = f"{_dotted(found.heads[0].own)}={_dotted(found.heads[0].base)}"
        text = f'names go together by the rule {rule!r}, but the fine-tune has "{found.left[0]}" left'
        return WrongBaseError(f'{text} and the base "{found.free[0]}"', Remedy("rename", None))
    shapes: dict[tuple[int, ...], str] = {}
    for name in found.free or base.tensors:
        shapes.setdefault(base.tensors[name].shape, name)
    left = found.left or [name for name in finetuned.tensors if name not in base.tensors]
    alike = [name for name in left if finetuned.tensors[name].shape in shapes]
    if alike and 2 * len(alike) >= len(left):
        theirs = shapes[finetuned.tensors[alike[0]].shape]
        return WrongBaseError(
            f'the base has the same shapes under other names: the fine-tune has "{alike[0]}", the base "{theirs}"',
            Remedy("rename", None),
        )
    stacked = next((name for name in left if "experts" in name), "")
    if stacked and any("experts" in name for name in found.free):
        theirs = next(name for name in found.free if "experts" in name)
        return WrongBaseError(
            "experts are stacked in one tensor on one side and single or in another order on the other: the fine-tune "
            f'has "{stacked}" {list(finetuned.tensors[stacked].shape)}, '
            f'the base "{theirs}" {list(base.tensors[theirs].shape)}'
        )
    theirs = next(iter(found.free or base.tensors))
    return WrongBaseError(
        "base and fine-tune are of different architecture: "
        f'tensor "{odd.name}" of shape {list(odd.shape)} is not there in the base, whose first tensor is "{theirs}" of '
        f"shape {list(base.tensors[theirs].shape)}"
    )


def _dotted(head: str) -> str:
    return f"{head}." if head else ""
