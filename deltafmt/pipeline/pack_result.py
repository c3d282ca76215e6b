"""What a pack reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.pipeline.read_as_values import Dequantized

if TYPE_CHECKING:
    from deltafmt.pipeline.choice import Choice


@dataclass(slots=True)
class PackResult:
    """What a pack did.

    Attributes:
        path: the file, or None when it went to a stream.
        size: bytes of the file.
        content_id: its content id, hexadecimal.
        finetuned_bytes: bytes of the fine-tune's weight files, headers included.
        actions: number of tensors by action.
        kept: names of matrices that are stored whole, with the reason.
        narrow: number of matrices with so few columns that dropping most of each row at random may cost accuracy.
        removed: names of tensors that only the base has; the unpacked folder lacks them.
        taken: names of tensors that the fine-tune lacks and that are taken from the base.
        unlisted: names of tensors that the fine-tune's index does not name, with the shard in which they were found.
        attached: names of the files that travel with the delta.
        left_out: why other files and folders do not travel, by name; hidden ones are not listed.
        names: what differs between the names and layouts of the two sides.
        unmatched: matrices of the fine-tune's layers for which the base has none, although it has layers left.
        unmatched_base: the base's matrices that are left then.
        architecture: the types of the two models, if they differ and this was allowed.
        base_name: the name of the base that the file records.
        resumed: number of tensors that an interrupted run had already packed.
        calibration_tokens: number of tokens of the calibration text that the fine-tune has read.
        sequential: True if each block was calibrated on the outputs of the compressed blocks before it.
        uncalibrated: names of compressed matrices for which a calibration was wanted and no moments were found.
        remarks: remarks about the inputs: which files were read, and whether the base is quantized.
        dequantized: how many tensors of either side are 8-bit floats that were read as the values that they mean.
        notes: remarks of the method, by name of the tensor. Tensors that an interrupted run had packed have none.
        choice: what was chosen for the target, if there was one.
        restored: names of the weight files and indexes that unpack restores byte for byte.
        served: bytes of the served part of a progressive file; otherwise 0.
        served_id: the content id of the served part, hexadecimal; otherwise empty.
    """

    path: Path | None
    size: int = 0
    content_id: str = ""
    finetuned_bytes: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    narrow: int = 0
    removed: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    unlisted: dict[str, str] = field(default_factory=dict)
    attached: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    names: list[NameChange] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    unmatched_base: list[str] = field(default_factory=list)
    architecture: str = ""
    base_name: str = ""
    resumed: int = 0
    remarks: list[str] = field(default_factory=list)
    calibration_tokens: int = 0
    sequential: bool = False
    uncalibrated: list[str] = field(default_factory=list)
    dequantized: Dequantized = field(default_factory=Dequantized)
    notes: dict[str, str] = field(default_factory=dict)
    choice: Choice | None = None
    restored: list[str] = field(default_factory=list)
    served: int = 0
    served_id: str = ""

    @property
    def target_size(self) -> int:
        """The bytes that a target counts: those of the file, or of its served part."""
        return self.served or self.size

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tune's weight files over bytes of the delta file, everything in it included."""
        return self.finetuned_bytes / self.size
