"""A tensor that a checkpoint keeps as 8-bit floats with scales, read as the BF16 values that they mean.

It is computed in pieces, like a tensor on disk that is read in pieces, so it never stands in memory whole
(spec/deltafmt-v1.md, section 7.8).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.float8 import block_scales, dequantize, values_of_codes
from deltafmt.checkpoint.safetensors_file import PagedTensor, Tensor
from deltafmt.format import constants as c
from deltafmt.index.scaled import ScaledRef, StoredRef
from deltafmt.terms.floats import RAW_DTYPES, Floats, widen

_ELEMENTS = 1 << 18  # elements that are computed at once: their float32 forms stay in the cache


@dataclass(frozen=True, slots=True)
class DequantizedTensor(PagedTensor):
    """The BF16 values of 8-bit floats with scales.

    Attributes:
        codes: the 8-bit floats, as the checkpoint has them.
        scales: their scales; None for codes that are the values themselves.
        block: the sizes of the block of elements that shares a scale, one for each dimension.
    """

    codes: Tensor | None = None
    scales: Tensor | None = None
    block: tuple[int, ...] = ()

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor | None, block: tuple[int, ...]) -> DequantizedTensor:
        """Return the values of some codes, under the codes' name."""
        nbytes = c.byte_count("BF16", codes.shape)
        return cls(codes.name, "BF16", codes.shape, codes.file, codes.offset, nbytes, None, codes, scales, block)

    @classmethod
    def recorded(cls, name: str, ref: ScaledRef, tensors: Mapping[str, Tensor]) -> DequantizedTensor | None:
        """Return the tensor that a delta file describes, or None if a checkpoint does not have it so.

        Args:
            name: the tensor's name.
            ref: the description.
            tensors: the checkpoint's tensors by name, as they are stored.
        """
        codes, scales = tensors.get(name), None
        if codes is None or (codes.dtype, codes.shape) != (ref.codes.dtype, ref.codes.shape):
            return None
        if ref.scales is not None:
            scales = tensors.get(ref.scales_name)
            if scales is None or (scales.dtype, scales.shape) != (ref.scales.dtype, ref.scales.shape):
                return None
        return cls.of(codes, scales, ref.block)

    def describe(self, digest: bytes | None = None) -> ScaledRef:
        """Return what a delta file says of the tensor: the identities of codes and scales, and the block.

        Args:
            digest: stands in the place of all fingerprints, so that nothing is read.
        """
        codes, scales = self._codes(), self.scales
        stored = StoredRef(digest or codes.fingerprint(), codes.dtype, codes.shape)
        if scales is None:
            return ScaledRef(self.block, stored)
        held = StoredRef(digest or scales.fingerprint(), scales.dtype, scales.shape)
        return ScaledRef(self.block, stored, held, scales.name)

    def will_need(self) -> None:
        """Ask the system to read the codes ahead. An error is ignored."""
        self._codes().will_need()

    def forget(self) -> None:
        """Give back the memory of what was computed for the codes and their scales."""
        for part in (self.codes, self.scales):
            if part is not None:
                part.forget()

    @contextlib.contextmanager
    def pages(self, start: int, length: int) -> Iterator[memoryview]:
        """Give some bytes of the values, computed now."""
        first, last = start // 2, (start + length + 1) // 2
        values = self._elements(first, last)
        yield values.view(np.uint8).data[start - 2 * first : start - 2 * first + length].toreadonly()

    def equals(self, other: Tensor) -> bool:
        """Tell whether dtype, shape and values are the same."""
        if isinstance(other, DequantizedTensor) and self.shape == other.shape and self.block == other.block:
            mine, theirs = self.scales, other.scales
            alike = mine is theirs if mine is None or theirs is None else mine.equals(theirs)
            if alike and self._codes().equals(other.codes or other):
                return True
        return Tensor.equals(self, other)

    def _codes(self) -> Tensor:
        assert self.codes is not None
        return self.codes

    def _elements(self, first: int, last: int) -> NDArray[np.uint16]:
        """Compute elements ``first`` to ``last``, in C order."""
        codes, columns = self._codes(), self.shape[-1] if self.shape else 1
        shape, scales = self.shape or (1,), self._scale_values()
        out = np.empty(last - first, np.uint16)
        rows = max(_ELEMENTS // max(columns, 1), 1)
        position = first
        while position < last:
            row = position // columns
            stop = min(last, (row + rows) * columns)
            with codes.pages(position, stop - position) as view:
                held = np.frombuffer(view, np.uint8)
                if scales is None or scales.size == 1:
                    one = None if scales is None else scales.reshape(-1)
                    found = dequantize(held, codes.dtype, one)
                else:
                    end = -(-stop // columns)
                    wide = block_scales(scales, shape, self.block or (1,), row, end)
                    if wide.shape[1] == 1 and (stop - position) == (end - row) * columns:
                        found = dequantize(held.reshape(-1, columns), codes.dtype, wide).reshape(-1)
                    else:
                        every = np.broadcast_to(wide, (end - row, columns)).reshape(-1)
                        mine = every[position - row * columns : stop - row * columns]
                        found = dequantize(held, codes.dtype, mine)
            out[position - first : stop - first] = found
            position = stop
        return out

    def _scale_values(self) -> Floats | None:
        """Return the scales in float32."""
        scales = self.scales
        if scales is None:
            return None
        with scales.pages(0, scales.nbytes) as view:
            data = bytes(view)
        if scales.dtype in RAW_DTYPES:
            return widen(np.frombuffer(data, RAW_DTYPES[scales.dtype]), scales.dtype)
        return values_of_codes(scales.dtype)[np.frombuffer(data, np.uint8)]
