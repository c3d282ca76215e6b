"""An ``nm`` term's packed buffers on a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS


@dataclass(frozen=True, slots=True, eq=False)
class NMOperand:
    """One ``nm`` term as it lies on a device (spec, section 11).

    Attributes:
        layout: of the term; ``seeded`` or ``fixed``.
        seed: the tensor seed; 0 for ``fixed``.
        rows, columns: of the delta.
        codes: int32, shape (tiles, words, 32), the bits of the packed words.
        index: likewise for a ``fixed`` index, otherwise None.
        scales: BF16 or F32, shape (tiles, scales per row, 32).

    Raises:
        UsageError: a rank index, or buffers whose shape, dtype or device do not fit.
    """

    layout: NMLayout
    seed: int
    rows: int
    columns: int
    codes: torch.Tensor
    index: torch.Tensor | None
    scales: torch.Tensor

    def __post_init__(self) -> None:
        layout = self.layout
        if layout.index == "rank":
            raise UsageError("a rank index is made fixed before it is multiplied with")
        if (self.index is None) != (layout.index == "seeded"):
            raise UsageError(f"a {layout.index} index comes with{'out' if layout.index == 'seeded' else ''} a buffer")
        scale_dtype = torch.bfloat16 if layout.scale_dtype == "BF16" else torch.float32
        row_tiles = layout.row_tiles(self.rows)
        check_buffer("codes", self.codes, (row_tiles, layout.codes_words(self.columns)), torch.int32)
        check_buffer("scales", self.scales, (row_tiles, layout.scales_per_row(self.columns)), scale_dtype)
        if self.index is not None:
            shape = (layout.index_tiles(self.rows), layout.index_words(self.columns))
            check_buffer("index", self.index, shape, torch.int32)
        if {tensor.device for tensor in self.tensors()} != {self.codes.device}:
            raise UsageError("the buffers of an operand lie on one device")

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the packed buffers."""
        yield self.codes
        if self.index is not None:
            yield self.index
        yield self.scales

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(tensor.nbytes for tensor in self.tensors())


def check_buffer(name: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refuse a packed buffer that a kernel could leave."""
    wanted = (*shape, TILE_ROWS)
    if tuple(tensor.shape) != wanted or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UsageError(f"{name}: expected contiguous {dtype} {wanted}, found {found}")
