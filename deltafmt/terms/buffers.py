"""A term's buffers as arrays: views of bytes, or zeros to fill (spec/deltafmt-v1.md, section 11.3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms.layout import TermLayout

Buffers = Mapping[str, memoryview]
Packed = Mapping[str, NDArray[np.generic]]

# BF16 and F16 are viewed as their bits.
VIEW_DTYPES = {name: np.dtype(view) for name, view in (("U8", "u1"), ("U32", "<u4"), ("F32", "<f4"))}
VIEW_DTYPES |= dict.fromkeys(("BF16", "F16"), np.dtype("<u2"))


def views(
    layout: TermLayout, rows: int, columns: int, buffers: Buffers, slots: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Return the packed arrays of a term without copying a byte: BF16 and F16 as uint16, packed words as uint32.

    Their shapes are those of the layout's ``buffers``.
    """
    forms = layout.buffers(rows, columns, slots)
    return {
        name: np.frombuffer(buffer, VIEW_DTYPES[forms[name].dtype]).reshape(forms[name].shape)
        for name, buffer in buffers.items()
    }


def blank(layout: TermLayout, rows: int, columns: int, slots: int = 0) -> dict[str, NDArray[np.generic]]:
    """Return packed arrays of zeros, shaped as :func:`views` shapes them."""
    forms = layout.buffers(rows, columns, slots)
    return {name: np.zeros(form.shape, VIEW_DTYPES[form.dtype]) for name, form in forms.items()}


def check_same(expected: Packed, found: Packed) -> None:
    """Refuse packed arrays that are not the canonical ones.

    Raises:
        InvalidFileError: names the buffer.
    """
    for name, array in expected.items():
        if not np.array_equal(array.view(np.uint8), np.ascontiguousarray(found[name]).view(np.uint8)):
            raise InvalidFileError(f"unused bits of the {name} are not zero")


def raw_bytes(array: NDArray[np.generic]) -> memoryview:
    """Return an array's bytes in C order; an array that is in C order already is not copied."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
