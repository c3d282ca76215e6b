"""Typed structures of the index, their canonical form and their checks (spec/deltafmt-v1.md, section 7).

Every structure converts to a plain object (``to_obj``) and back (``from_obj``). A plain object is accepted only
when converting back gives the same object, so unknown keys, missing keys and other spellings of a value are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.layout import constants as c
from deltafmt.layout.nm import NMLayout

ACTIONS = ("same", "replace", "add", "alias")
DIGEST_BYTES = 32
CHECKSUM_BYTES = 16


def fail(where: str, what: str) -> NoReturn:
    """Raise InvalidFileError naming the place in the index."""
    raise InvalidFileError(f"{where}: {what}")


def _fields(obj: Any, where: str, keys: tuple[str, ...]) -> list[Any]:
    if type(obj) is not dict or tuple(obj) != keys:
        found = ", ".join(map(repr, obj)) if type(obj) is dict else type(obj).__name__
        fail(where, f"expected the keys {', '.join(keys)}, found {found or 'none'}")
    return list(obj.values())


def _uint(value: Any, where: str, limit: int = 2**63 - 1) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        fail(where, f"{value!r} is not an integer from 0 to {limit}")
    return value


def _bytes(value: Any, where: str, length: int) -> bytes:
    if type(value) is not bytes or len(value) != length:
        fail(where, f"expected {length} bytes")
    return value


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if type(value) is not list or len(value) > c.MAX_RANK:
        fail(where, f"a shape is a list of at most {c.MAX_RANK} sizes")
    shape = tuple(_uint(size, where) for size in value)
    if c.element_count(shape) > c.MAX_ELEMENTS:
        fail(where, f"{list(shape)} has more than {c.MAX_ELEMENTS} elements")
    return shape


def _dtype(value: Any, where: str) -> str:
    if type(value) is not str or value not in c.DTYPE_BITS:
        fail(where, f"unknown dtype {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the file: a run of stored bytes that starts on a 4096-byte boundary.

    Attributes:
        kind: ``KIND_TENSORS`` or ``KIND_ATTACHMENTS``.
        codec: ``CODEC_STORED`` or ``CODEC_ZSTD``.
        offset: where it starts in the file.
        length: stored bytes.
        raw_length: bytes once decoded.
        checksum: XXH3-128 of the stored bytes, big-endian.
    """

    kind: int
    codec: int
    offset: int
    length: int
    raw_length: int
    checksum: bytes

    KEYS = ("checksum", "codec", "kind", "length", "offset", "raw_length")

    @classmethod
    def from_obj(cls, obj: Any, where: str) -> Section:
        """Check one row of the section table."""
        checksum, codec, kind, length, offset, raw_length = _fields(obj, where, cls.KEYS)
        _bytes(checksum, f"{where}.checksum", CHECKSUM_BYTES)
        if type(codec) is not int or codec not in c.CODECS:
            fail(f"{where}.codec", f"unknown codec {codec!r}")
        if type(kind) is not int or kind not in c.KINDS:
            fail(f"{where}.kind", f"unknown section kind {kind!r}")
        _uint(length, f"{where}.length")
        _uint(offset, f"{where}.offset")
        _uint(raw_length, f"{where}.raw_length")
        if codec == c.CODEC_STORED and raw_length != length:
            fail(f"{where}.raw_length", f"a stored section has equal lengths, not {length} and {raw_length}")
        if codec == c.CODEC_ZSTD:
            chunks = -(-raw_length // c.ZSTD_CHUNK)
            if chunks * (4 + c.ZSTD_MIN_FRAME) > length:
                fail(f"{where}.raw_length", f"{length} bytes cannot hold the {chunks} frames of {raw_length} bytes")
        return cls(kind, codec, offset, length, raw_length, checksum)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {
            "checksum": self.checksum,
            "codec": self.codec,
            "kind": self.kind,
            "length": self.length,
            "offset": self.offset,
            "raw_length": self.raw_length,
        }


@dataclass(frozen=True, slots=True)
class BufferRef:
    """A run of raw bytes in a section: ``[section, offset, length]``."""

    section: int
    offset: int
    length: int

    @classmethod
    def from_obj(cls, obj: Any, where: str) -> BufferRef:
        """Check a reference, except for the section's existence and size."""
        if type(obj) is not list or len(obj) != 3:
            fail(where, "a buffer is a list of section, offset and length")
        section, offset, length = (_uint(value, where) for value in obj)
        if offset % c.BUFFER_ALIGNMENT:
            fail(where, f"offset {offset} is not a multiple of {c.BUFFER_ALIGNMENT}")
        return cls(section, offset, length)

    def to_obj(self) -> list[int]:
        """Return the index's form."""
        return [self.section, self.offset, self.length]


@dataclass(frozen=True, slots=True)
class BaseRef:
    """Identity of a base tensor: dtype, shape and fingerprint (spec section 7.5)."""

    digest: bytes
    dtype: str
    shape: tuple[int, ...]

    KEYS = ("digest", "dtype", "shape")

    @classmethod
    def from_obj(cls, obj: Any, where: str) -> BaseRef:
        """Check a base identity."""
        digest, dtype, shape = _fields(obj, where, cls.KEYS)
        return cls(
            _bytes(digest, f"{where}.digest", DIGEST_BYTES),
            _dtype(dtype, f"{where}.dtype"),
            _shape(shape, f"{where}.shape"),
        )

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {"digest": self.digest, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class NMTerm:
    """One ``nm`` term of a delta.

    Attributes:
        layout: number of the layout in the index's ``layouts``.
        params: that layout.
        seed: the tensor seed of a ``seeded`` index; 0 for the other encodings.
        buffers: ``codes``, ``index`` (unless seeded) and ``scales``.
    """

    layout: int
    params: NMLayout
    seed: int
    buffers: dict[str, BufferRef]

    KEYS = ("buffers", "layout", "seed")

    @classmethod
    def from_obj(cls, obj: Any, where: str, layouts: tuple[NMLayout, ...], rows: int, columns: int) -> NMTerm:
        """Check a term against the rows and columns that it covers."""
        buffers, number, seed = _fields(obj, where, cls.KEYS)
        _uint(number, f"{where}.layout")
        if number >= len(layouts):
            fail(f"{where}.layout", f"{number} is not one of the {len(layouts)} layouts")
        params = layouts[number]
        _uint(seed, f"{where}.seed", 2**32 - 1)
        if params.index != "seeded" and seed:
            fail(f"{where}.seed", f"a {params.index} index has seed 0, not {seed}")
        lengths = params.buffer_lengths(rows, columns)
        values = _fields(buffers, f"{where}.buffers", tuple(lengths))
        refs = {}
        for (name, length), value in zip(lengths.items(), values, strict=True):
            ref = BufferRef.from_obj(value, f"{where}.buffers.{name}")
            if ref.length != length:
                fail(f"{where}.buffers.{name}", f"{ref.length} bytes where the shape needs {length}")
            refs[name] = ref
        return cls(number, params, seed, refs)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {
            "buffers": {name: ref.to_obj() for name, ref in self.buffers.items()},
            "layout": self.layout,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """How one fine-tuned tensor comes from the base (spec section 7.4).

    Attributes:
        name: the tensor's name.
        action: ``same``, ``replace``, ``add`` or ``alias``.
        dtype, shape: of the fine-tuned tensor.
        base: identity of the base tensor (``same`` and ``add``).
        digest: BLAKE3 of the payload (``replace`` and ``add``; spec section 7.6).
        data: the bytes of a ``replace``, or the new rows of an ``add`` that grew.
        terms: the terms of an ``add``, in the order in which they are summed.
        target: the tensor that an ``alias`` repeats.
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    base: BaseRef | None = None
    digest: bytes | None = None
    data: BufferRef | None = None
    terms: tuple[NMTerm, ...] = ()
    target: str | None = None

    @property
    def rows(self) -> int:
        """Rows: the product of all dimensions but the last."""
        return c.row_count(self.shape)

    @property
    def columns(self) -> int:
        """Columns: the last dimension (1 for a 0-d tensor)."""
        return self.shape[-1] if self.shape else 1

    @property
    def delta_rows(self) -> int:
        """Rows that the terms of an ``add`` cover: those that base and fine-tune share."""
        return self.rows if self.base is None else min(self.rows, c.row_count(self.base.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the fine-tuned tensor."""
        return c.byte_count(self.dtype, self.shape)

    def refs(self) -> list[tuple[str, BufferRef]]:
        """Return every buffer with its name, in the order in which they are stored and digested."""
        named = []
        for number, term in enumerate(self.terms):
            prefix = f"terms[{number}]." if len(self.terms) > 1 else ""
            named += [(prefix + name, ref) for name, ref in term.buffers.items()]
        if self.data is not None:
            named.append(("data" if self.action == "replace" else "new_rows", self.data))
        return named

    @classmethod
    def from_obj(cls, name: str, obj: Any, layouts: tuple[NMLayout, ...]) -> TensorEntry:
        """Check one tensor entry; its buffers are checked against the sections by the container."""
        where = f'tensors["{name}"]'
        action = obj.get("action") if type(obj) is dict else None
        if type(action) is not str or action not in _PARSERS:
            fail(f"{where}.action", f"unknown action {action!r}")
        return _PARSERS[action](name, obj, where, layouts)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        obj: dict[str, Any] = {"action": self.action}
        if self.base is not None:
            obj["base"] = self.base.to_obj()
        if self.data is not None:
            obj["data"] = self.data.to_obj()
        if self.digest is not None:
            obj["digest"] = self.digest
        obj["dtype"] = self.dtype
        obj["shape"] = list(self.shape)
        if self.target is not None:
            obj["target"] = self.target
        if self.terms:
            obj["terms"] = [term.to_obj() for term in self.terms]
        return obj


def _parse_same(name: str, obj: Any, where: str, layouts: tuple[NMLayout, ...]) -> TensorEntry:
    action, base_obj, dtype, shape = _fields(obj, where, ("action", "base", "dtype", "shape"))
    base = BaseRef.from_obj(base_obj, f"{where}.base")
    entry = TensorEntry(name, action, _dtype(dtype, f"{where}.dtype"), _shape(shape, f"{where}.shape"), base)
    if (base.dtype, base.shape) != (entry.dtype, entry.shape):
        fail(f"{where}.base", "a tensor that is the same has the base's dtype and shape")
    return entry


def _parse_replace(name: str, obj: Any, where: str, layouts: tuple[NMLayout, ...]) -> TensorEntry:
    keys = ("action", "data", "digest", "dtype", "shape")
    action, data_obj, digest, dtype, shape = _fields(obj, where, keys)
    data = BufferRef.from_obj(data_obj, f"{where}.data")
    _bytes(digest, f"{where}.digest", DIGEST_BYTES)
    entry = TensorEntry(
        name, action, _dtype(dtype, f"{where}.dtype"), _shape(shape, f"{where}.shape"), digest=digest, data=data
    )
    if data.length != entry.nbytes:
        fail(f"{where}.data", f"{data.length} bytes where the shape needs {entry.nbytes}")
    return entry


def _parse_add(name: str, obj: Any, where: str, layouts: tuple[NMLayout, ...]) -> TensorEntry:
    grown = type(obj) is dict and "data" in obj
    keys = ("action", "base", *(("data",) if grown else ()), "digest", "dtype", "shape", "terms")
    values = dict(zip(keys, _fields(obj, where, keys), strict=True))
    base = BaseRef.from_obj(values["base"], f"{where}.base")
    dtype = _dtype(values["dtype"], f"{where}.dtype")
    shape = _shape(values["shape"], f"{where}.shape")
    digest = _bytes(values["digest"], f"{where}.digest", DIGEST_BYTES)
    if dtype not in c.DELTA_DTYPES or base.dtype not in c.DELTA_DTYPES:
        fail(f"{where}.dtype", f"a delta from {base.dtype} to {dtype} is not defined")
    if not shape or len(shape) != len(base.shape) or shape[1:] != base.shape[1:]:
        fail(f"{where}.base.shape", f"{list(base.shape)} and {list(shape)} differ beyond the first dimension")
    if len(shape) == 1 and shape != base.shape:
        fail(f"{where}.base.shape", f"{list(base.shape)} and {list(shape)} differ, and a 1-d tensor cannot grow")
    data = BufferRef.from_obj(values["data"], f"{where}.data") if grown else None
    bare = TensorEntry(name, "add", dtype, shape, base, digest, data)
    new_bytes = (bare.rows - bare.delta_rows) * c.byte_count(dtype, shape[-1:])
    if (data.length if data else 0) != new_bytes or grown != (new_bytes > 0):
        fail(f"{where}.data", f"new rows take {new_bytes} bytes, not {data.length if data else 0}")
    terms_obj = values["terms"]
    if type(terms_obj) is not list or not 1 <= len(terms_obj) <= 16:
        fail(f"{where}.terms", "expected a list of 1 to 16 terms")
    terms = tuple(
        NMTerm.from_obj(term, f"{where}.terms[{i}]", layouts, bare.delta_rows, bare.columns)
        for i, term in enumerate(terms_obj)
    )
    return TensorEntry(name, "add", dtype, shape, base, digest, data, terms)


def _parse_alias(name: str, obj: Any, where: str, layouts: tuple[NMLayout, ...]) -> TensorEntry:
    action, dtype, shape, target = _fields(obj, where, ("action", "dtype", "shape", "target"))
    if type(target) is not str or target == name:
        fail(f"{where}.target", f"{target!r} is not the name of another tensor")
    return TensorEntry(
        name, action, _dtype(dtype, f"{where}.dtype"), _shape(shape, f"{where}.shape"), target=target
    )


_PARSERS = {"same": _parse_same, "replace": _parse_replace, "add": _parse_add, "alias": _parse_alias}


@dataclass(frozen=True, slots=True)
class Attachment:
    """A small file that travels with the delta: its bytes and their BLAKE3."""

    data: BufferRef
    digest: bytes

    KEYS = ("data", "digest")

    @classmethod
    def from_obj(cls, name: str, obj: Any) -> Attachment:
        """Check one attachment; its name must be a plain relative path."""
        where = f'attachments["{name}"]'
        data, digest = _fields(obj, where, cls.KEYS)
        if not is_safe_path(name):
            fail(where, "not a plain relative path")
        return cls(BufferRef.from_obj(data, f"{where}.data"), _bytes(digest, f"{where}.digest", DIGEST_BYTES))

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        return {"data": self.data.to_obj(), "digest": self.digest}


def is_safe_path(name: str) -> bool:
    """Tell whether ``name`` can be joined to a folder without leaving it, on any system."""
    if not name or len(name.encode("utf-8", "surrogatepass")) > c.MAX_NAME_BYTES:
        return False
    if any(ord(char) < 32 or char in '\\:*?"<>|\x7f' or 0xD800 <= ord(char) < 0xE000 for char in name):
        return False
    return all(part not in ("", ".", "..") and part == part.rstrip(" .") for part in name.split("/"))


def parse_layout(obj: Any, where: str) -> NMLayout:
    """Check one row of the layout table."""
    keys = ("bits", "grid", "group", "index", "keep", "kind", "scale_dtype", "scale_group", "share")
    if type(obj) is dict and obj.get("kind") != "nm":
        fail(f"{where}.kind", f"unknown layout {obj.get('kind')!r}")
    values = dict(zip(keys, _fields(obj, where, keys), strict=True))
    del values["kind"]
    for key, value in values.items():
        wanted = str if key in ("grid", "index", "scale_dtype") else int
        if type(value) is not wanted:
            fail(f"{where}.{key}", f"{value!r} is not {'a string' if wanted is str else 'an integer'}")
    try:
        return NMLayout(**values)
    except UsageError as error:
        fail(where, str(error))
