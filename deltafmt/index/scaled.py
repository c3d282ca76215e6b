"""Base tensors that are kept as 8-bit floats with scales (spec/deltafmt-v1.md, section 7.8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from deltafmt.format import constants as c
from deltafmt.format.checks import Where, check_bytes, check_dtype, check_fields, check_name, check_shape, fail
from deltafmt.index.sections import DIGEST_BYTES


class StoredRef(NamedTuple):
    """The identity of a tensor as the base stores it: fingerprint, dtype and shape (spec section 7.5)."""

    digest: bytes
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScaledRef:
    """How the base keeps a tensor that is read as values.

    Attributes:
        block: the sizes of the block of elements that shares a scale, one for each dimension.
        codes: the identity of the 8-bit floats, which have the tensor's own name.
        scales: the identity of the scales; None for codes that are the values themselves.
        scales_name: the name of the scales; empty without scales.
    """

    block: tuple[int, ...]
    codes: StoredRef
    scales: StoredRef | None = None
    scales_name: str = ""

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> ScaledRef:
        """Return a description, after checking it."""
        block, codes_obj, scales_obj = check_fields(obj, where, ("block", "codes", "scales"))
        codes = StoredRef(*_stored(check_fields(codes_obj, (where, ".codes"), _STORED), (where, ".codes")))
        if codes.dtype not in c.CODE_DTYPES:
            fail((where, ".codes"), f"dtype {codes.dtype} is not one of {', '.join(c.CODE_DTYPES)}")
        sizes = check_shape(block, (where, ".block"))
        if len(sizes) != len(codes.shape) or 0 in sizes:
            fail((where, ".block"), f"{list(sizes)} is no block of a tensor of shape {list(codes.shape)}")
        if scales_obj is None:
            return cls(sizes, codes)
        digest, dtype, name, shape = check_fields(scales_obj, (where, ".scales"), ("digest", "dtype", "name", "shape"))
        scales = StoredRef(*_stored((digest, dtype, shape), (where, ".scales")))
        if scales.dtype not in c.SCALE_DTYPES:
            fail((where, ".scales"), f"dtype {scales.dtype} is not one of {', '.join(c.SCALE_DTYPES)}")
        check_name(name, (where, ".scales.name"))
        needed = block_count(codes.shape, sizes)
        if c.element_count(scales.shape) != needed:
            fail((where, ".scales"), f"{c.element_count(scales.shape)} scales where the blocks need {needed}")
        return cls(sizes, codes, scales, name)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        codes = {"digest": self.codes.digest, "dtype": self.codes.dtype, "shape": list(self.codes.shape)}
        scales = None
        if self.scales is not None:
            digest, dtype, shape = self.scales
            scales = {"digest": digest, "dtype": dtype, "name": self.scales_name, "shape": list(shape)}
        return {"block": list(self.block), "codes": codes, "scales": scales}


_STORED = ("digest", "dtype", "shape")


def _stored(values: Any, where: Where) -> tuple[bytes, str, tuple[int, ...]]:
    digest, dtype, shape = values
    return (
        check_bytes(digest, (where, ".digest"), DIGEST_BYTES),
        check_dtype(dtype, (where, ".dtype")),
        check_shape(shape, (where, ".shape")),
    )


def block_count(shape: tuple[int, ...], block: tuple[int, ...]) -> int:
    """Return the number of blocks of a tensor."""
    return c.element_count(tuple(-(-size // step) for size, step in zip(shape, block, strict=True)))
