"""How each tensor is packed, decided from names, dtypes and shapes before any weight is read."""

from __future__ import annotations

import fnmatch
import functools
import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blake3 import blake3

from deltafmt._version import __version__
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import NonFiniteError, Remedy, UsageError
from deltafmt.format.constants import DELTA_DTYPES, METADATA_BASE
from deltafmt.index.entries import predicts
from deltafmt.methods.base import Method
from deltafmt.pipeline.pairing import Pairing, pair_up
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import TILE_ROWS

Rule = tuple[str, Method | None]

NO_SMALLER = "no smaller when packed"
UNRELATED = "its values have nothing to do with the base's"

# The beginning of the reason of a tensor whose base is quantized.
BASE_DTYPE = "the base's dtype"

# The reason of a tensor that is codes, or that codes depend on, such as their scales.
CODES = "codes of a quantizer, or a part of them"

# Reasons that the user gave for storing a tensor whole.
CHOSEN = ("excluded", "not included", "by rule")


# A tensor of three dimensions or more whose last has fewer elements is a convolution's kernel.
KERNEL_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done with one fine-tuned tensor.

    Attributes:
        tensor: the fine-tuned tensor.
        base: the base tensor that belongs to it, if there is one.
        method: compresses the delta; None stores the tensor whole, or leaves the choice open if ``undecided``.
        reason: why the tensor is stored whole; empty otherwise.
        alias: the tensor of which this one is a tied copy, or None.
        undecided: True until a method is chosen for a target. No undecided plan is ever packed.
    """

    tensor: Tensor
    base: Tensor | None
    method: Method | None
    reason: str = ""
    alias: str | None = None
    undecided: bool = False

    @property
    def uses_moments(self) -> bool:
        """True if the tensor's method, or a method that may be chosen for it, uses a calibration's second moments."""
        return self.undecided or (self.method is not None and self.method.calibration != "none")

    def decided(self, method: Method | None, reason: str = "") -> Plan:
        """Return the plan with a method that is now chosen; None stores the tensor whole, for a reason."""
        return replace(self, method=method, reason=reason, undecided=False)

    @property
    def is_exact(self) -> bool:
        """True if every bit of the tensor is kept, whether it is stored whole or relative to the base."""
        return not self.undecided and (self.method is None or self.method.exact)

    @property
    def in_exact_sections(self) -> bool:
        """True if the tensor's bytes lie in the sections of exact tensors."""
        return self.method is not None and self.method.exact and self.alias is None

    @property
    def shared_rows(self) -> int:
        """Rows that the tensor and its base both have; 0 without a base."""
        return min(self.tensor.rows, 0 if self.base is None else self.base.rows)

    def layouts(self) -> tuple[TermLayout, ...]:
        """Return the layouts of the terms that the tensor becomes; none if it is stored whole or undecided.

        Raises:
            UsageError: the method's options do not go with this shape.
        """
        if self.method is None or self.base is None:
            return ()
        return self.method.layouts(self.shared_rows, self.tensor.columns)


def not_finite(name: str, message: str) -> NonFiniteError:
    """Return the error for a tensor whose delta is not finite, which can only be stored whole."""
    return NonFiniteError(f'tensor "{name}": {message}', Remedy("exclude", glob.escape(name)))


def make_plan(
    base: Checkpoint,
    finetuned: Checkpoint,
    method: Method | None,
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    pairing: Pairing | None = None,
) -> list[Plan]:
    """Decide for every fine-tuned tensor, in natural order of the names.

    Args:
        base, finetuned: the checkpoints.
        method: compresses every tensor that no rule decides; None leaves those undecided, for a target to choose.
        rules: (pattern, method or None) pairs; the last one that matches a name decides, and None there keeps the
            tensor exactly.
        include: if given, only names that match one of these patterns are compressed.
        exclude: names that match one of these patterns are stored whole.
        pairing: what belongs together; found anew if it is not given.

    Raises:
        UsageError: a pattern matches no tensor.
        WrongBaseError: base and fine-tune do not belong together.
    """
    names = list(finetuned.tensors)
    for pattern in (*include, *exclude, *(pattern for pattern, _ in rules)):
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"pattern {pattern!r} matches no tensor of {finetuned.path}")
    paired = pairing or pair_up(base, finetuned)
    ties = find_ties(paired, finetuned)

    def decide(tensor: Tensor) -> Plan:
        name = tensor.name
        other = paired.tensors.get(name)
        leading = leading_dimensions(tensor.shape)
        tensor, other = tensor.as_matrix(leading), None if other is None else other.as_matrix(leading)
        chosen, reason, undecided = method, "", method is None
        if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            chosen, reason, undecided = None, "not included", False
        for pattern, ruled in rules:
            if fnmatch.fnmatchcase(name, pattern):
                chosen, reason, undecided = ruled, "by rule" if ruled is None else "", False
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            chosen, reason, undecided = None, "excluded", False
        if chosen is not None and chosen.exact:
            return Plan(tensor, predicting(tensor, None if name in paired.unrelated else other), chosen)
        reason = reason or (CODES if name in finetuned.kept else "")
        reason = reason or (UNRELATED if name in paired.unrelated else why_exact(tensor, other, chosen))
        return Plan(tensor, other, None, reason) if reason else Plan(tensor, other, chosen, undecided=undecided)

    plans = {name: decide(tensor) for name, tensor in finetuned.tensors.items()}
    for name, target in ties.items():
        # A tensor that the user wants whole is no alias of one that is compressed.
        exact = plans[target].is_exact
        if exact or plans[name].reason not in CHOSEN:
            plans[name] = replace(plans[name].decided(None, "tied"), alias=target)
    return list(plans.values())


def predicting(tensor: Tensor, base: Tensor | None) -> Tensor | None:
    """Return the base tensor if an exact tensor can be coded relative to it, or None."""
    fits = base is not None and predicts(base.dtype, base.shape, tensor.dtype, tensor.shape)
    return base if fits else None


def leading_dimensions(shape: tuple[int, ...]) -> int | None:
    """Return how many leading dimensions of a tensor give its rows; None for all but the last.

    The kernel of a convolution, [O, I, h, w], is a matrix of O rows and I h w columns: its last dimension alone has few
    elements. A stack of experts, [E, out, in], has E out rows. Fewer rows than a tile has would leave it half empty.
    """
    return 1 if len(shape) > 2 and shape[-1] < KERNEL_COLUMNS and shape[0] >= TILE_ROWS else None


def why_exact(tensor: Tensor, base: Tensor | None, method: Method | None) -> str:
    """Return why a tensor cannot or should not be compressed, or an empty string.

    Without a method, the reason is one that holds for every method.
    """
    if base is None:
        return "not in the base"
    if tensor.dtype not in DELTA_DTYPES:
        return f"dtype {tensor.dtype}"
    if base.dtype not in DELTA_DTYPES:
        return f"{BASE_DTYPE} {base.dtype}"
    if len(tensor.shape) < 2:
        return "a vector"
    if len(base.shape) != len(tensor.shape) or base.shape[1:] != tensor.shape[1:]:
        return "another shape than the base's"
    if not tensor.nbytes or not base.nbytes:
        return "empty"
    if method is None:
        return ""
    shared = min(tensor.rows, base.rows)
    try:
        packed = least_bytes(method, shared, tensor.columns)
    except UsageError as error:
        raise error.located(f'tensor "{tensor.name}"') from error
    return NO_SMALLER if packed >= shared_bytes(tensor, base) else ""


@functools.lru_cache(4096)
def least_bytes(method: Method, rows: int, columns: int) -> int:
    """Return the bytes that a method's terms take at least; most models have few shapes, and some many tensors.

    The slots of unstructured terms are not known yet, so packing compares the true size again.
    """
    return sum(sum(layout.buffer_lengths(rows, columns).values()) for layout in method.layouts(rows, columns))


def shared_bytes(tensor: Tensor, base: Tensor) -> int:
    """Return the bytes of a tensor's rows that its base has as well."""
    return tensor.nbytes // tensor.rows * min(tensor.rows, base.rows)


def find_ties(pairing: Pairing, finetuned: Checkpoint) -> dict[str, str]:
    """Return matrices that the fine-tune stores twice, as tied weights are: the copy's name to the other's.

    Two matrices are tied if their bytes are equal in the fine-tune, and equal in the base where the base has both.
    For example, ``lm_head.weight`` is often a copy of ``model.embed_tokens.weight``. The copy is the one that the base
    lacks; if it has both, or neither, the copy is the one that comes later.
    """
    candidates: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in finetuned.tensors.values():
        if len(tensor.shape) >= 2 and tensor.nbytes:
            key = tensor.dtype, tensor.shape, tensor.head(4096)
            candidates.setdefault(key, []).append(tensor)
    ties: dict[str, str] = {}
    for group in candidates.values():
        ordered = sorted(group, key=lambda tensor: not pairing.owns(tensor.name))
        keys = _equal_keys(ordered)
        # What the base has comes first: of each content, the first with each content of the base.
        firsts: dict[object, dict[object, str]] = {}
        counts = Counter(keys)
        owned = [
            tensor.name
            for tensor, content in zip(ordered, keys, strict=True)
            if counts[content] > 1 and pairing.owns(tensor.name)
        ]
        bases = dict(zip(owned, _equal_keys([pairing.tensors[name] for name in owned]), strict=True))
        for tensor, content in zip(ordered, keys, strict=True):
            known = firsts.setdefault(content, {})
            base = bases.get(tensor.name)
            first = known.get(base) if tensor.name in bases else next(iter(known.values()), None)
            if first is None:
                known[base] = tensor.name
            else:
                ties[tensor.name] = first
    return ties


def _equal_keys(tensors: Sequence[Tensor]) -> list[object]:
    """Return a key of each tensor, equal where dtype, shape and bytes are; every byte is read once at most."""
    if len(tensors) == 2:  # the usual case, and most that differ do so early
        return [0, 0 if tensors[0].equals(tensors[1]) else 1]
    return [tensor.fingerprint() for tensor in tensors] if len(tensors) > 1 else [0] * len(tensors)


def file_metadata(
    method: str, seed: int, finetuned: Checkpoint, base_name: str = "", architecture: str = ""
) -> dict[str, str]:
    """Return the metadata of a delta file.

    Args:
        method: what the file says of its method: the method's description, or the target.
        seed: the file's seed.
        finetuned: the metadata of its safetensors files is kept under ``safetensors.KEY``.
        base_name: the base's name, kept under ``base`` unless it is empty.
        architecture: the types of the two models if they differ.
    """
    return {
        **({"architecture": architecture} if architecture else {}),
        **({METADATA_BASE: base_name} if base_name else {}),
        "deltafmt.version": __version__,
        "method": method,
        "seed": str(seed),
        **{f"safetensors.{key}": value for key, value in finetuned.metadata().items()},
    }


def tensor_seed(seed: int, name: str) -> int:
    """Derive a tensor's 32-bit seed from the file's seed and the tensor's name, never from the weights."""
    return int.from_bytes(blake3(seed.to_bytes(8, "little") + name.encode()).digest(4), "little")
