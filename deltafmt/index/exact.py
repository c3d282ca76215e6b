"""Exact tensors and weight files, as the index has them (spec/deltafmt-v1.md, sections 7.10 and 17)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from deltafmt.format.checks import Where, check_bytes, check_fields, check_uint, fail
from deltafmt.format.constants import SECTION_KIND_EXACT, buffer_alignment
from deltafmt.index.file_names import is_safe_path, lies_among_weights
from deltafmt.index.sections import DIGEST_BYTES, BufferRef

MIN_CHUNK_UNITS: Final = 1 << 8
MAX_CHUNK_UNITS: Final = 1 << 24

# The exponent of a float32; one of ones is that of an infinity or a NaN.
_EXPONENT: Final = 0x7F800000

# A weight file, and an index of weight files, whose names may say a variant.
_WEIGHTS: Final = re.compile(r"(.*/)?[^/]+\.safetensors")
_INDEX: Final = re.compile(r"(.*/)?[^/]+\.safetensors(\.[^/.]+)?\.index(\.[^/.]+)?\.json")


@dataclass(frozen=True, slots=True)
class ExactRef:
    """Where the chunks of an exact tensor lie, and what they restore.

    Attributes:
        chunk: units of a chunk, a power of two.
        data: the buffer.
        digest: the fingerprint (section 7.5) of the fine-tuned tensor.
        factors: of the exact part of an ``add``, the bits of a float32 for each term: what the term is multiplied
            with to predict the tensor (section 17.8).
    """

    chunk: int
    data: BufferRef
    digest: bytes
    factors: tuple[int, ...] = ()

    KEYS = ("chunk", "data", "digest")

    @classmethod
    def from_obj(cls, obj: Any, where: Where, terms: int = 0) -> ExactRef:
        """Return a reference, after checking it; ``terms`` is the number of the entry's terms."""
        keys = (*cls.KEYS, "factors") if terms else cls.KEYS
        chunk, data, digest, *rest = check_fields(obj, where, keys)
        check_uint(chunk, (where, ".chunk"), MAX_CHUNK_UNITS)
        if chunk < MIN_CHUNK_UNITS or chunk & (chunk - 1):
            fail((where, ".chunk"), f"{chunk} is not a power of two from {MIN_CHUNK_UNITS} to {MAX_CHUNK_UNITS}")
        check_bytes(digest, (where, ".digest"), DIGEST_BYTES)
        alignment = buffer_alignment(SECTION_KIND_EXACT)
        factors = _parse_factors(rest[0], (where, ".factors"), terms) if rest else ()
        return cls(chunk, BufferRef.from_obj(data, (where, ".data"), alignment), digest, factors)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        factors = {"factors": list(self.factors)} if self.factors else {}
        return {"chunk": self.chunk, "data": self.data.to_obj(), "digest": self.digest, **factors}


def _parse_factors(obj: Any, where: Where, terms: int) -> tuple[int, ...]:
    if type(obj) is not list or len(obj) != terms:
        fail(where, f"expected a list of {terms}, a factor for each term")
    for i, bits in enumerate(obj):
        check_uint(bits, (where, "[", i, "]"), 2**32 - 1)
        if bits & _EXPONENT == _EXPONENT:
            fail((where, "[", i, "]"), f"{bits:#x} is no finite float32")
    return tuple(obj)


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of the fine-tune that is restored byte for byte.

    Attributes:
        digest: the BLAKE3 of the file.
        head: of a weight file the bytes before its tensors, of an index of shards the whole file.
    """

    digest: bytes
    head: BufferRef

    KEYS = ("digest", "head")

    @classmethod
    def from_obj(cls, name: str, obj: Any) -> FileRef:
        """Return a file, after checking it; its name must be a plain relative path of a weight file or an index."""
        where = ('files["', name, '"]')
        digest, head = check_fields(obj, where, cls.KEYS)
        if not is_safe_path(name) or not is_restored(name):
            fail(where, "not a plain relative path of a weight file, or of an index of weight files")
        return cls(check_bytes(digest, (where, ".digest"), DIGEST_BYTES), BufferRef.from_obj(head, (where, ".head")))

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {"digest": self.digest, "head": self.head.to_obj()}


def is_index(name: str) -> bool:
    """Tell whether a name is that of an index of weight files, such as ``model.safetensors.index.json``."""
    return _INDEX.fullmatch(name) is not None


def is_restored(name: str) -> bool:
    """Tell whether a file of this name may be restored byte for byte: a weight file, or an index of weight files.

    Its name keeps the other rules of section 7.9, so that no folder of it ends as a weight file does.
    """
    return (_WEIGHTS.fullmatch(name) is not None or is_index(name)) and not lies_among_weights(name)
