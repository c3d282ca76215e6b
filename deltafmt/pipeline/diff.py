"""``deltafmt.diff``: the tensors that differ between two delta files or two checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltafmt.checkpoint.correspondence import correspond
from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.checkpoint.fp8 import read_as_values
from deltafmt.checkpoint.library_names import library_names
from deltafmt.checkpoint.name_changes import NameChange, name_changes
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.container.content import semantic_entry
from deltafmt.container.reader import Container
from deltafmt.delta import DeltaFile, row_ranges
from deltafmt.errors import StorageError, UsageError
from deltafmt.format.choices import check_choice
from deltafmt.format.constants import DELTA_DTYPES
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.sections import Attachment
from deltafmt.pipeline.outputs import is_delta_file
from deltafmt.pipeline.quantized_pairs import EXACT, QUANTIZED
from deltafmt.pipeline.summary import describe_entry
from deltafmt.terms import floats


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor, attachment or key of the metadata that is not the same on both sides.

    Attributes:
        name: the tensor's name.
        kind: ``only in A``, ``only in B`` or ``changed``.
        detail: what differs, in words.
        relative: for two checkpoints, the norm of the difference divided by the norm of A's tensor.
        largest: for two checkpoints, the largest absolute difference.
    """

    name: str
    kind: str
    detail: str = ""
    relative: float | None = None
    largest: float | None = None

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        obj: dict[str, Any] = {"name": self.name, "kind": self.kind, "detail": self.detail}
        if self.relative is not None:
            for key, number in (("relative", self.relative), ("largest", self.largest)):
                # JSON has no NaN and no infinity.
                obj[key] = number if number is not None and math.isfinite(number) else None
        return obj


@dataclass(frozen=True, slots=True)
class DiffResult:
    """What differs.

    Attributes:
        changes: the tensors, attachments and keys that differ.
        same: number of tensors that are the same.
        names: for two checkpoints, what differs between their names and layouts.
    """

    changes: list[Change]
    same: int
    names: list[NameChange] = field(default_factory=list)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    variant: str | None = None,
    quantized: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DiffResult:
    """Compare two delta files, or two checkpoints.

    Delta files are compared by the digests in their indexes. :func:`deltafmt.verify` checks that the bytes of a file
    have these digests.

    Args:
        a, b: two delta files, or two checkpoints: folders or ``.safetensors`` files.
        rename: for two checkpoints, rules FROM=TO that say what a name of B is in A, as :func:`deltafmt.pack` takes
            them.
        strip_prefix: for two checkpoints, beginnings of names that do not count, on either side.
        variant: for two checkpoints, read the weights of this variant, such as ``fp16``.
        quantized: for two checkpoints, how 8-bit floats with scales are read: ``values``, as if not given, compares the
            BF16 values that they mean; ``exact`` compares the stored bytes, also those of other quantizers.
        limits: for two delta files, how much memory and output they may ask for.

    Raises:
        UsageError: one is a delta file and the other a checkpoint, or options of checkpoints are given for delta files.
        UnsupportedError: a checkpoint's weights are codes that are not read as weights.
        InvalidFileError, StorageError: an input cannot be read.
    """
    renames = Renames.parse(rename, strip_prefix)
    are_deltas = [_is_delta(Path(path)) for path in (a, b)]
    if are_deltas[0] != are_deltas[1]:
        one, other = (a, b) if are_deltas[0] else (b, a)
        raise UsageError(f"{one} is a delta file and {other} is not; diff compares two delta files or two checkpoints")
    if quantized is not None:
        check_choice("quantized", quantized, QUANTIZED)
    if are_deltas[0] and (variant is not None or quantized is not None):
        raise UsageError("a variant and what is quantized are for two checkpoints, and these are delta files")
    if are_deltas[0] and renames:
        raise UsageError("rules of names are for two checkpoints, and these are delta files")
    if are_deltas[0]:
        with DeltaFile(a, limits=limits) as first, DeltaFile(b, limits=limits) as second:
            found = _collect(
                {entry.name: entry for entry in first.container.entries()},
                {entry.name: entry for entry in second.container.entries()},
                _compare_entries,
            )
            return DiffResult(found.changes + _compare_rest(first.container, second.container), found.same)
    with Checkpoint(a, variant=variant) as left, Checkpoint(b, variant=variant) as right:
        if quantized != EXACT:
            read_as_values(left)
            read_as_values(right)
        return _compare_checkpoints(left, right, renames)


def _compare_checkpoints(left: Checkpoint, right: Checkpoint, renames: Renames) -> DiffResult:
    """Compare two checkpoints, each tensor of B with the one of A that belongs to it."""
    match = correspond(right.tensors, left.tensors, renames, lambda names: library_names((left, right), names))
    changes = name_changes((name, [part.name for part in tensor.parts()]) for name, tensor in match.tensors.items())
    taken = {part.name for tensor in match.tensors.values() for part in tensor.parts()}
    before = {name: tensor for name, tensor in left.tensors.items() if name not in taken} | match.tensors
    found = _collect(before, right.tensors, _compare_tensors)
    return DiffResult(found.changes, found.same, changes)


def _is_delta(path: Path) -> bool:
    if not path.exists():
        raise StorageError(f"no such file or folder: {path}")
    return path.is_file() and is_delta_file(path)


def _collect(a: dict[str, Any], b: dict[str, Any], compare: Any) -> DiffResult:
    changes = []
    same = 0
    for name in sorted(set(a) | set(b), key=natural_key):
        if name not in a or name not in b:
            changes.append(Change(name, "only in A" if name in a else "only in B"))
            continue
        change = compare(a[name], b[name])
        if change is None:
            same += 1
        else:
            changes.append(change)
    return DiffResult(changes, same)


def _compare_rest(a: Container, b: Container) -> list[Change]:
    """Compare the files, the metadata and the names of removed tensors of two delta files."""
    changes = _compare_files("attachment", a.attachments, b.attachments)
    changes += _compare_files("restored file", a.files, b.files)
    for key in sorted(a.metadata.keys() | b.metadata.keys()):
        before, after = a.metadata.get(key), b.metadata.get(key)
        if before != after:
            changes.append(Change(f"metadata {key}", "changed", f"{before} -> {after}"))
    if a.removed != b.removed:
        changes.append(Change("tensors that only the base has", "changed"))
    return changes


def _compare_files(
    label: str, a: Mapping[str, Attachment | FileRef], b: Mapping[str, Attachment | FileRef]
) -> list[Change]:
    changes = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            changes.append(Change(f"{label} {name}", "only in A" if name in a else "only in B"))
        elif a[name].digest != b[name].digest:
            changes.append(Change(f"{label} {name}", "changed", "content"))
    return changes


def _compare_entries(a: TensorEntry, b: TensorEntry) -> Change | None:
    left, right = semantic_entry(a), semantic_entry(b)
    if left == right:  # even if one file stores the positions as a fixed index and the other as a rank index
        return None
    parts = [key for key in ("dtype", "shape", "base") if left.get(key) != right.get(key)]
    before, after = describe_entry(a), describe_entry(b)
    if before != after:
        parts.append(f"{before} -> {after}")
    elif (left.get("digest"), left.get("exact")) != (right.get("digest"), right.get("exact")):
        parts.append("content")
    return Change(a.name, "changed", "; ".join(parts) or "seed")


def _compare_tensors(a: Tensor, b: Tensor) -> Change | None:
    if a.equals(b):
        return None
    if a.shape != b.shape or a.dtype != b.dtype:
        detail = f"{a.dtype} {list(a.shape)} -> {b.dtype} {list(b.shape)}"
        if a.shape != b.shape or not {a.dtype, b.dtype} <= set(DELTA_DTYPES):
            return Change(a.name, "changed", detail)
    elif a.dtype not in DELTA_DTYPES:
        return Change(a.name, "changed", "bytes")
    else:
        detail = "values"
    squares = reference = 0.0
    largest = 0.0
    for left, delta in _deltas(a, b):
        squares += float(np.square(delta, dtype=np.float64).sum())
        reference += float(np.square(left, dtype=np.float64).sum())
        largest = float(np.maximum(largest, np.abs(delta).max(initial=0)))  # NaN stays NaN
    relative = (squares / reference) ** 0.5 if reference else float("inf") if squares else 0.0
    return Change(a.name, "changed", detail, relative, largest)


def _deltas(a: Tensor, b: Tensor) -> Iterator[tuple[floats.Floats, floats.Floats]]:
    for start, stop in row_ranges(0, a.rows, a.columns, 1):
        with a.row_range(start, stop) as left, b.row_range(start, stop) as right:
            yield floats.widen(left, a.dtype), floats.subtract(right, b.dtype, left, a.dtype)[0]
