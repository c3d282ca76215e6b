"""The base that a delta is applied to: its tensors, and the check that they are those packed against.

Whoever applies a delta looks its base's tensors up by the names that the file records (spec/deltafmt-v1.md, sections
7.4 and 7.5). A base may have them under other names, or keep a tied head apart. Fingerprints tell whether it is the
one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deltafmt.checkpoint.correspondence import correspond
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.fp8 import read_recorded
from deltafmt.checkpoint.library_names import library_names
from deltafmt.checkpoint.name_changes import NameChange, name_changes
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.spellings import is_layered
from deltafmt.checkpoint.stitched import stitch_parts
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.container.reader import Container
from deltafmt.errors import Remedy, WrongBaseError
from deltafmt.format.constants import METADATA_BASE
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry
from deltafmt.pipeline.workers import worker_pool


class BaseSource(Protocol):
    """What a delta is applied to: an open checkpoint, or what the delta before it gives."""

    @property
    def path(self) -> Path | str:
        """What messages call it."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by name."""

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""

    def config(self) -> dict[str, Any]:
        """Return the model's configuration, or an empty map."""

    def check_unchanged(self) -> None:
        """Check that no file was replaced or written to since it was opened."""


def open_base(path: str | os.PathLike[str], container: Container) -> Checkpoint:
    """Open the base of a delta: the weights of the variant that it was packed against, read as it was read then.

    Args:
        path: the base.
        container: the delta file. If it describes 8-bit floats with scales, those of the base are read as values.

    Raises:
        UnsupportedError, InvalidFileError: as :func:`deltafmt.checkpoint.fp8.read_as_values` raises them.
    """
    checkpoint = Checkpoint(path, variant=container.metadata.get(METADATA_VARIANT), lenient=True)
    scaled = container.scaled()
    if scaled:
        read_recorded(checkpoint, scaled)
    return checkpoint


class BaseTensors:
    """The base's tensors by the names of the entries that need them.

    Args:
        checkpoint: the base.
        entries: the entries of a delta file.
        container: the file, which may name the base, or the delta that gives it.
        renames: what the names that the file records are in this base.

    Attributes:
        checkpoint: the base.
        changes: what differs between the names that the file records and those of the base.

    Raises:
        WrongBaseError: the base lacks a tensor, or has it in another dtype or shape.
    """

    def __init__(
        self,
        checkpoint: BaseSource,
        entries: Iterable[TensorEntry],
        container: Container,
        renames: Renames | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._named = named_base(container)
        needed = {entry.name: (entry, entry.base) for entry in entries if entry.base is not None}
        rules = renames or Renames()
        tensors = {short: checkpoint.tensors[name] for short, name in rules.stripped(checkpoint.tensors).items()}
        self._tensors: dict[str, Tensor] = {}
        missing: dict[str, _Needed] = {}
        for name, (_, base) in needed.items():
            found = _recorded(tensors, name, base, rules)
            if found is not None:
                self._tensors[name] = found
            else:
                missing[name] = _Needed(name, base)
        moved = self._find_moved(missing, rules) if missing else []
        self.changes: list[NameChange] = name_changes(moved)
        for name, want in missing.items():
            if name not in self._tensors:
                raise self._lacking(name, want.base, rules)

    def _find_moved(self, missing: Mapping[str, _Needed], rules: Renames) -> list[tuple[str, list[str]]]:
        """Find tensors that the base has under other names; return the names on both sides."""
        checkpoint, moved = self.checkpoint, []
        uses = Counter(want.recorded for want in missing.values())
        recorded = {want.recorded: want for want in missing.values() if uses[want.recorded] == 1}
        # Pieces of one tensor have its name in common; the entries' own names may still be those of this base.
        for wanted in (recorded, missing):
            left = {name: want for name, want in wanted.items() if want.name not in self._tensors}
            match = correspond(left, checkpoint.tensors, rules, lambda names: library_names((checkpoint,), names))
            for name, want in left.items():
                tensor = match.tensors.get(name)
                if tensor is not None and (tensor.dtype, tensor.shape) == (want.base.dtype, want.base.shape):
                    self._tensors[want.name] = tensor
                    moved.append((name, [part.name for part in tensor.parts()]))
        for name, want in missing.items():
            tensor = None if name in self._tensors else _tied(checkpoint, want)
            if tensor is not None:
                self._tensors[name] = tensor
                moved.append((want.recorded, [tensor.name]))
        return moved

    def _lacking(self, name: str, base: BaseRef, rules: Renames) -> WrongBaseError:
        recorded = _Needed(name, base).recorded
        found = self.checkpoint.tensors.get(rules.apply(recorded))
        where = f"wrong base {self.checkpoint.path}"
        if found is not None:
            return WrongBaseError(
                f'{where}: tensor "{recorded}" is {found.dtype} {list(found.shape)}, '
                f"not {base.dtype} {list(base.shape)}{self._named}"
            )
        alike = next((name for name, other in self.checkpoint.tensors.items() if other.shape == base.shape), None)
        if alike is None:
            return WrongBaseError(f'{where}: it has no tensor "{recorded}"{self._named}')
        text = f'it has no tensor "{recorded}"; "{alike}" has the same shape{self._named}'
        return WrongBaseError(f"{where}: {text}", Remedy("rename", None))

    def find(self, entry: TensorEntry) -> Tensor | None:
        """Return the base tensor that an entry needs, or None if it needs none."""
        return self._tensors[entry.name].as_matrix(entry.leading) if entry.base is not None else None

    def differs(self, name: str) -> WrongBaseError:
        """Return the error for a base tensor whose bytes differ."""
        return WrongBaseError(
            f'wrong base {self.checkpoint.path}: tensor "{name}" differs from the one that was packed against'
            f"{self._named}"
        )


def named_base(container: Container) -> str:
    """Return the end of a message about a wrong base: what a delta file says of its base, if it does."""
    name, parent = container.metadata.get(METADATA_BASE), container.parent
    if parent is not None:
        return f"; {container.name} was made on what the delta {short_id(parent)} gives, which comes before it"
    return f'; the delta names its base "{name}"' if name else ""


def short_id(content_id: bytes) -> str:
    """Return the beginning of a content id, as messages have it."""
    return content_id.hex()[:16]


@dataclass(frozen=True, slots=True)
class _Needed:
    """A base tensor that is not there under its recorded name.

    Attributes:
        name: the entry's name.
        base: what the entry says of it.
    """

    name: str
    base: BaseRef

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.base.shape

    @property
    def recorded(self) -> str:
        """The name that it had in the base packed against; the entry's own if it was made of several tensors."""
        return self.base.parts[0].name if len(self.base.parts) == 1 else self.name


def _recorded(tensors: Mapping[str, Tensor], name: str, base: BaseRef, rules: Renames) -> Tensor | None:
    """Return the tensor that stands where an entry says, or None if it is not there in this dtype and shape."""
    if not base.parts:
        tensor = tensors.get(rules.apply(name))
        same = tensor is not None and (tensor.dtype, tensor.shape) == (base.dtype, base.shape)
        return tensor if same else None
    parts = [BasePart(rules.apply(part.name), part.start, part.elements) for part in base.parts]
    return stitch_parts(name, base.dtype, base.shape, parts, tensors)


def _tied(checkpoint: BaseSource, want: _Needed) -> Tensor | None:
    """Return the embedding of a base that ties its head to it, where the base packed against had both, or None.

    Its fingerprint tells, so no other tensor is taken for it.
    """
    if is_layered(want.recorded) or len(want.shape) != 2:
        return None
    for name, tensor in checkpoint.tensors.items():
        alike = (tensor.dtype, tensor.shape) == (want.base.dtype, want.base.shape) and not is_layered(name)
        if alike and tensor.fingerprint() == want.base.digest:
            return tensor
    return None


def compare_bases(base: BaseTensors, entries: Iterable[TensorEntry], threads: int) -> Iterator[tuple[str, bool]]:
    """Give the name of every base tensor that the entries need, and True if its bytes are those packed against.

    Args:
        base: the base's tensors.
        entries: the entries of a delta file.
        threads: worker threads for the fingerprints.
    """
    with worker_pool(threads, "base") as pool:
        needed = [(entry, tensor) for entry in entries if (tensor := base.find(entry)) is not None]
        digests = pool.map(_fingerprint, [tensor for _, tensor in needed])
        for (entry, _), digest in zip(needed, digests, strict=True):
            yield entry.name, entry.base is not None and digest == entry.base.digest


def _fingerprint(tensor: Tensor) -> bytes:
    digest = tensor.fingerprint()
    tensor.forget()
    return digest
