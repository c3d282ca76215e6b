"""One pack as a value: :class:`PackJob` decides every byte of the file, :class:`Delivery` decides none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from blake3 import blake3

from deltafmt._version import __version__
from deltafmt.checkpoint.dequantized import DequantizedTensor
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.container import canonical
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.format.choices import check_choice
from deltafmt.format.constants import (
    FEATURE_EXACT,
    FEATURE_LEADING,
    FEATURE_PARENT,
    FEATURE_PARTS,
    FEATURE_PROGRESSIVE,
    FEATURE_SCALED,
    element_count,
)
from deltafmt.index.entries import BasePart
from deltafmt.pipeline.completeness import Completeness
from deltafmt.pipeline.pairing import Pairing
from deltafmt.pipeline.plan import BASE_DTYPE, CODES, Plan, file_metadata
from deltafmt.pipeline.read_as_values import METADATA_DEQUANTIZED
from deltafmt.pipeline.workers import Progress

if TYPE_CHECKING:
    from deltafmt.pipeline.moments import MomentFolder

# How many tensors the fine-tune lacked, which are the base's; the folders that the packer left out.
METADATA_TAKEN: Final = "taken_from_base"
METADATA_DROPPED: Final = "folders_left_out"


def check_options(profile: str, seed: int) -> None:
    """Refuse a profile or a seed that no file can have.

    Raises:
        UsageError: names the value.
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed} is outside 0 to 2**64 - 1")
    check_choice("profile", profile, c.PROFILES)


@dataclass(frozen=True, slots=True)
class PackJob:
    """What is packed: everything that the bytes of a delta file depend on.

    Attributes:
        base, finetuned: the two checkpoints, open.
        plans: how each tensor is packed, in the order of the file.
        profile: ``hot`` or ``cold``.
        seed: the file's seed, 64 bits.
        description: what the file's metadata says of its method.
        pairing: the tensors of the two checkpoints that belong together.
        base_name: the name of the base that the file records; empty for none.
        completeness: what the fine-tune lacks.
        moments: second moments of the matrices' inputs, if a calibration has gathered some.
        restores: True if the fine-tune's weight files are restored byte for byte.
        progressive: True if exact parts follow what is served.
        parent: the content id of the delta that gives the base; None for most.
    """

    base: Checkpoint
    finetuned: Checkpoint
    plans: Sequence[Plan]
    profile: str
    seed: int
    description: str
    pairing: Pairing
    base_name: str
    completeness: Completeness = field(default_factory=Completeness)
    moments: MomentFolder | None = None
    restores: bool = False
    progressive: bool = False
    parent: bytes | None = None

    def digest(self) -> bytes:
        """Return a digest of the job: what an interrupted run has written is of use to a job of equal digest alone.

        Checkpoints count by the path, size and time of their files. The description of the method is left out, because
        every plan says which method it has.
        """
        sources = self.base, self.finetuned
        files = [[[os.fsencode(path), size, time] for path, size, time in source.identity()] for source in sources]
        plans = [[plan.tensor.name, plan.method.describe() if plan.method else plan.reason] for plan in self.plans]
        parts: dict[str, Any] = {
            "files": files,
            "plans": plans,
            "profile": self.profile,
            "seed": str(self.seed),
            "version": __version__,
        }
        moved = [[name, [list(part) for part in made_of]] for name, made_of in self.moved()]
        if moved or self.pairing.architecture:
            parts["names"] = [moved, self.pairing.architecture]
        if self.restores:
            parts["restores"] = True
        if self.progressive:
            parts["progressive"] = True
        if self.parent is not None:
            parts["parent"] = self.parent
        if self.moments is not None:
            parts["calibration"] = self.moments.described
        if self.base.dequantized or self.finetuned.dequantized:
            parts["dequantized"] = [self.base.dequantized, self.finetuned.dequantized]
        return blake3(canonical.encode(parts)).digest()

    def removed(self) -> list[str]:
        """Return the names of the tensors that only the base has, sorted."""
        return sorted(set(self.base.tensors) - {plan.tensor.name for plan in self.plans} - self.pairing.taken())

    def features(self) -> int:
        """Return the incompatible features that the file's header names."""
        leads = any(plan.tensor.leading is not None and not plan.is_exact for plan in self.plans)
        exact = any(plan.method is not None and plan.method.exact for plan in self.plans)
        return (
            (FEATURE_PARTS if any(self.moved()) else 0)
            | (FEATURE_LEADING if leads else 0)
            | (FEATURE_SCALED if self.scaled() else 0)
            | (FEATURE_EXACT if exact or self.progressive else 0)
            | (FEATURE_PROGRESSIVE if self.progressive else 0)
            | (FEATURE_PARENT if self.parent is not None else 0)
        )

    def scaled(self) -> dict[str, DequantizedTensor]:
        """Return the base's tensors that belong to the fine-tune's and are read as values, by their names."""
        found = {}
        for plan in self.plans:
            for part in () if plan.base is None or plan.alias is not None else plan.base.parts():
                tensor = self.base.tensors[part.name]
                if isinstance(tensor, DequantizedTensor):
                    found[part.name] = tensor
        return found

    def moved(self) -> Iterator[tuple[str, tuple[BasePart, ...]]]:
        """Give the tensors whose base is not simply the base's tensor of the same name, and what theirs is made of."""
        for plan in self.plans:
            name, base = plan.tensor.name, plan.base
            if base is not None and plan.alias is None:
                parts = base.parts()
                if parts != (BasePart(name, 0, element_count(base.shape)),):
                    yield name, parts

    def remarks(self) -> list[str]:
        """Return remarks about the inputs: which files were read, and whether the base is quantized."""
        found = [f"{source.path}: {note}" for source in (self.base, self.finetuned) for note in source.notes]
        whole = sum(plan.reason.startswith(BASE_DTYPE) and len(plan.tensor.shape) > 1 for plan in self.plans)
        if whole:
            found.append(
                f"the base is quantized: there is no delta to the codes of {whole:,} of its matrices, "
                "so the fine-tune's are stored whole"
            )
        if self.finetuned.dequantized and not self.base.dequantized:
            found.append(
                "the fine-tune is FP8 and the base is not, so the delta holds the rounding to 8 bits as well; the "
                "fine-tune from before quantizing, or the base quantized alike, gives a smaller loss"
            )
        kept = sum(plan.reason == CODES for plan in self.plans)
        if kept and not whole:
            found.append(
                f"the fine-tune is quantized: {kept:,} tensors of codes and scales are packed as the bytes that they "
                "are; a delta of the weights before quantizing is smaller"
            )
        return found

    def metadata(self) -> dict[str, str]:
        """Return the file's metadata."""
        calibration = {} if self.moments is None else self.moments.metadata()
        own = file_metadata(self.description, self.seed, self.finetuned, self.base_name, self.pairing.architecture)
        found = {METADATA_TAKEN: str(len(self.completeness.taken))} if self.completeness.taken else {}
        if self.finetuned.dropped:
            found[METADATA_DROPPED] = ", ".join(self.finetuned.dropped)
        if self.finetuned.dequantized:
            found[METADATA_DEQUANTIZED] = str(self.finetuned.dequantized)
        variant = self.base.names.variant()
        if variant is not None:
            found[METADATA_VARIANT] = variant
        found |= self.finetuned.names.completed(self.base.names, self.completeness.taken).metadata()
        return own | found | calibration


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where a packed file goes, and how the work is done.

    Attributes:
        out: the file to make, or a binary file object to write to.
        force: True to replace the file if it exists.
        threads: worker threads.
        progress: called with a tensor's name and bytes as each tensor is done.
    """

    out: Path | BinaryIO
    force: bool
    threads: int
    progress: Progress | None = None

    @property
    def path(self) -> Path | None:
        """The file to make, or None for a file object."""
        return self.out if isinstance(self.out, Path) else None
