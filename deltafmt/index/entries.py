"""Tensor entries of the index, their canonical form and their checks (spec/deltafmt-v1.md, sections 7.3 to 7.5).

Every structure converts to a plain object (``to_obj``) and back (``from_obj``). ``from_obj`` accepts a plain object
only if it has exactly the keys and types of values that ``to_obj`` gives; unknown and missing keys are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.format.checks import (
    Where,
    check_bytes,
    check_dtype,
    check_fields,
    check_name,
    check_shape,
    check_uint,
    check_whole,
    fail,
)
from deltafmt.index.exact import ExactRef
from deltafmt.index.sections import DIGEST_BYTES, BufferRef
from deltafmt.terms.layout import TermLayout

MAX_TERMS = 16
MAX_SLOTS = 2**48
ACTIONS = ("same", "replace", "add", "alias", "exact")


class BasePart(NamedTuple):
    """Some elements of a base tensor: ``[name, start, count]`` in C order (spec section 7.4)."""

    name: str
    start: int
    elements: int


@dataclass(frozen=True, slots=True)
class BaseRef:
    """Identity of a base tensor: dtype, shape and fingerprint (spec section 7.5).

    Attributes:
        digest, dtype, shape: the fingerprint, dtype and shape.
        parts: the elements of base tensors that follow each other in this one; empty for the base's tensor of the
            entry's own name.
    """

    digest: bytes
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[BasePart, ...] = ()

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> BaseRef:
        """Return a base identity, after checking it."""
        has_parts = type(obj) is dict and "parts" in obj
        digest, dtype, *parts, shape = check_fields(
            obj, where, ("digest", "dtype", *(("parts",) if has_parts else ()), "shape")
        )
        ref = cls(
            check_bytes(digest, (where, ".digest"), DIGEST_BYTES),
            check_dtype(dtype, (where, ".dtype")),
            check_shape(shape, (where, ".shape")),
        )
        check_whole(ref.dtype, ref.shape, where)
        return replace(ref, parts=_parse_parts(parts[0], (where, ".parts"), ref)) if parts else ref

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        parts = {"parts": [list(part) for part in self.parts]} if self.parts else {}
        return {"digest": self.digest, "dtype": self.dtype, **parts, "shape": list(self.shape)}


def _parse_parts(obj: Any, where: Where, ref: BaseRef) -> tuple[BasePart, ...]:
    if type(obj) is not list or not obj:
        fail(where, "expected a list of at least one part")
    if c.DTYPE_BITS[ref.dtype] % 8:
        fail(where, f"a tensor of {ref.dtype} has no parts, because its elements share bytes")
    parts = []
    for i, row in enumerate(obj):
        if type(row) is not list or len(row) != 3 or type(row[0]) is not str:
            fail((where, "[", i, "]"), "expected a name and two integers")
        check_name(row[0], (where, "[", i, "]"))
        start, count = (check_uint(value, (where, "[", i, "]"), c.MAX_ELEMENTS) for value in row[1:])
        check_uint(start + count, (where, "[", i, "]"), c.MAX_ELEMENTS)
        parts.append(BasePart(row[0], start, count))
    needed = c.element_count(ref.shape)
    total = sum(part.elements for part in parts)
    if total != needed:
        fail(where, f"the parts have {total} elements where the shape needs {needed}")
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a delta.

    Attributes:
        layout_number: the layout's number in the index's ``layouts``.
        layout: the layout itself.
        seed: the tensor seed if the layout is seeded; otherwise 0.
        buffers: references to the term's buffers by name, in sorted order.
        slots: the number of slots of a ``sparse`` term (spec section 14); otherwise 0.
    """

    layout_number: int
    layout: TermLayout
    seed: int
    buffers: dict[str, BufferRef]
    slots: int = 0

    @classmethod
    def from_obj(cls, obj: Any, where: Where, layouts: tuple[TermLayout, ...], rows: int, columns: int) -> Term:
        """Return a term, after checking it against the rows and columns that it covers."""
        number = obj.get("layout") if type(obj) is dict else None
        has_slots = type(number) is int and 0 <= number < len(layouts) and layouts[number].has_slots
        keys = ("buffers", "layout", "seed", *(("slots",) if has_slots else ()))
        buffers, number, seed, *counts = check_fields(obj, where, keys)
        check_uint(number, (where, ".layout"))
        if number >= len(layouts):
            fail((where, ".layout"), f"{number} is not one of the {len(layouts)} layouts")
        layout = layouts[number]
        check_uint(seed, (where, ".seed"), 2**32 - 1)
        if seed and not layout.seeded:
            fail((where, ".seed"), f"a layout that is not seeded has seed 0, not {seed}")
        slots = check_uint(counts[0], (where, ".slots"), MAX_SLOTS) if counts else 0
        try:
            lengths = layout.buffer_lengths(rows, columns, slots)
        except UsageError as error:
            fail(where, str(error))
        values = check_fields(buffers, (where, ".buffers"), tuple(lengths))
        refs = {}
        for (name, length), value in zip(lengths.items(), values, strict=True):
            ref = BufferRef.from_obj(value, (where, ".buffers.", name))
            if ref.length != length:
                fail((where, ".buffers.", name), f"{ref.length} bytes where the shape needs {length}")
            refs[name] = ref
        return cls(number, layout, seed, refs, slots)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""
        buffers = {name: ref.to_obj() for name, ref in self.buffers.items()}
        return {"buffers": buffers, "layout": self.layout_number, **self.numbers()}

    def numbers(self) -> dict[str, int]:
        """Return the term's numbers: its seed, and its slots if the layout has them."""
        return {"seed": self.seed, **({"slots": self.slots} if self.layout.has_slots else {})}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """How one fine-tuned tensor comes from the base (spec section 7.4).

    Attributes:
        name: the tensor's name.
        action: ``same``, ``replace``, ``add``, ``alias`` or ``exact``.
        dtype, shape: the dtype and shape of the fine-tuned tensor.
        base: the identity of the base tensor (``same``, ``add``, and ``exact`` unless it has none).
        digest: the BLAKE3 of the payload (``replace`` and ``add``; spec section 7.6).
        data: the bytes of a ``replace``, or the new rows of an ``add`` that grew.
        terms: the terms of an ``add``, in the order in which they are summed.
        target: the name of the tensor that an ``alias`` repeats.
        leading: the number of leading dimensions whose product is the number of rows of an ``add``; all but the last
            if None. A convolution's kernel [O, I, h, w] has 1: O rows of I h w columns.
        exact: where the chunks of an ``exact`` tensor lie, or those of an ``add`` that has an exact part.
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    base: BaseRef | None = None
    digest: bytes | None = None
    data: BufferRef | None = None
    terms: tuple[Term, ...] = ()
    target: str | None = None
    leading: int | None = None
    exact: ExactRef | None = None

    @property
    def rows(self) -> int:
        """The number of rows: the product of the leading dimensions."""
        return c.row_count(self.shape, self.leading)

    @property
    def columns(self) -> int:
        """The number of columns: the product of the other dimensions."""
        return c.column_count(self.shape, self.leading)

    @property
    def delta_rows(self) -> int:
        """The number of rows that the terms of an ``add`` cover: the rows that both base and fine-tune have."""
        return self.rows if self.base is None else min(self.rows, c.row_count(self.base.shape, self.leading))

    @property
    def nbytes(self) -> int:
        """Bytes of the fine-tuned tensor."""
        return c.byte_count(self.dtype, self.shape)

    def refs(self) -> list[tuple[str, BufferRef]]:
        """Return every buffer's name and reference, in the order in which the buffers are stored and digested."""
        named = []
        for number, term in enumerate(self.terms):
            prefix = f"terms[{number}]." if len(self.terms) > 1 else ""
            named += [(prefix + name, ref) for name, ref in term.buffers.items()]
        if self.data is not None:
            named.append(("data" if self.action == "replace" else "new_rows", self.data))
        if self.exact is not None:
            named.append(("exact", self.exact.data))
        return named

    @classmethod
    def from_obj(cls, name: str, obj: Any, layouts: tuple[TermLayout, ...]) -> TensorEntry:
        """Return a tensor entry, after checking it; the container checks its buffers against the sections."""
        where = ('tensors["', name, '"]')
        action = obj.get("action") if type(obj) is dict else None
        if type(action) is not str or action not in ACTIONS:
            fail((where, ".action"), f"unknown action {action!r}")
        if action == "add":
            return _parse_add(name, obj, where, layouts)
        entry = _PARSERS[action](name, obj, where)
        check_whole(entry.dtype, entry.shape, (where, ".shape"))
        return entry

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
        if self.exact is not None:
            obj["exact"] = self.exact.to_obj()
        if self.leading is not None:
            obj["leading"] = self.leading
        obj["shape"] = list(self.shape)
        if self.target is not None:
            obj["target"] = self.target
        if self.terms:
            obj["terms"] = [term.to_obj() for term in self.terms]
        return obj


def _parse_same(name: str, obj: Any, where: Where) -> TensorEntry:
    action, base_obj, dtype, shape = check_fields(obj, where, ("action", "base", "dtype", "shape"))
    base = BaseRef.from_obj(base_obj, (where, ".base"))
    entry = TensorEntry(
        name, action, check_dtype(dtype, (where, ".dtype")), check_shape(shape, (where, ".shape")), base
    )
    if (base.dtype, base.shape) != (entry.dtype, entry.shape):
        fail((where, ".base"), "a tensor that is the same has the base's dtype and shape")
    return entry


def _parse_replace(name: str, obj: Any, where: Where) -> TensorEntry:
    keys = ("action", "data", "digest", "dtype", "shape")
    action, data_obj, digest, dtype, shape = check_fields(obj, where, keys)
    data = BufferRef.from_obj(data_obj, (where, ".data"))
    check_bytes(digest, (where, ".digest"), DIGEST_BYTES)
    check_dtype(dtype, (where, ".dtype"))
    entry = TensorEntry(name, action, dtype, check_shape(shape, (where, ".shape")), digest=digest, data=data)
    if data.length != entry.nbytes:
        fail((where, ".data"), f"{data.length} bytes where the shape needs {entry.nbytes}")
    return entry


def _parse_add(name: str, obj: Any, where: Where, layouts: tuple[TermLayout, ...]) -> TensorEntry:
    grown = type(obj) is dict and "data" in obj
    leads = type(obj) is dict and "leading" in obj
    kept = type(obj) is dict and "exact" in obj
    given = ("data", grown), ("exact", kept), ("leading", leads)
    optional = [key for key, found in given if found]
    keys = tuple(sorted(("action", "base", "digest", "dtype", "shape", "terms", *optional)))
    values = dict(zip(keys, check_fields(obj, where, keys), strict=True))
    base = BaseRef.from_obj(values["base"], (where, ".base"))
    dtype = check_dtype(values["dtype"], (where, ".dtype"))
    shape = check_shape(values["shape"], (where, ".shape"))
    digest = check_bytes(values["digest"], (where, ".digest"), DIGEST_BYTES)
    if dtype not in c.DELTA_DTYPES or base.dtype not in c.DELTA_DTYPES:
        fail((where, ".dtype"), f"a delta from {base.dtype} to {dtype} is not defined")
    if 0 in (c.element_count(shape), c.element_count(base.shape)):
        fail((where, ".shape"), "a tensor without elements has no delta")
    if not shape or len(shape) != len(base.shape) or shape[1:] != base.shape[1:]:
        fail((where, ".base.shape"), f"{list(base.shape)} and {list(shape)} differ beyond the first dimension")
    if len(shape) == 1 and shape != base.shape:
        fail((where, ".base.shape"), f"{list(base.shape)} and {list(shape)} differ, and a 1-d tensor cannot grow")
    data = BufferRef.from_obj(values["data"], (where, ".data")) if grown else None
    leading = check_uint(values["leading"], (where, ".leading")) if leads else None
    if leading is not None and not 1 <= leading <= len(shape) - 2:
        fail((where, ".leading"), f"{leading} is not 1 to {len(shape) - 2}, for a tensor of {len(shape)} dimensions")
    rows, columns = c.row_count(shape, leading), c.column_count(shape, leading)
    shared = min(rows, c.row_count(base.shape, leading))
    new_bytes = (rows - shared) * c.byte_count(dtype, (columns,))
    if (data.length if data else 0) != new_bytes or grown != (new_bytes > 0):
        fail((where, ".data"), f"new rows take {new_bytes} bytes, not {data.length if data else 0}")
    terms_obj = values["terms"]
    if type(terms_obj) is not list or not 1 <= len(terms_obj) <= MAX_TERMS:
        fail((where, ".terms"), f"expected a list of 1 to {MAX_TERMS} terms")
    terms = tuple(
        Term.from_obj(term, (where, ".terms[", i, "]"), layouts, shared, columns) for i, term in enumerate(terms_obj)
    )
    exact = ExactRef.from_obj(values["exact"], (where, ".exact"), len(terms)) if kept else None
    return TensorEntry(name, "add", dtype, shape, base, digest, data, terms, leading=leading, exact=exact)


def _parse_alias(name: str, obj: Any, where: Where) -> TensorEntry:
    action, dtype, shape, target = check_fields(obj, where, ("action", "dtype", "shape", "target"))
    if type(target) is not str or target == name:
        fail((where, ".target"), f"{target!r} is not the name of another tensor")
    return TensorEntry(
        name, action, check_dtype(dtype, (where, ".dtype")), check_shape(shape, (where, ".shape")), target=target
    )


def _parse_exact(name: str, obj: Any, where: Where) -> TensorEntry:
    has_base = type(obj) is dict and "base" in obj
    keys = ("action", *(("base",) if has_base else ()), "dtype", "exact", "shape")
    action, *base_obj, dtype_obj, exact, shape_obj = check_fields(obj, where, keys)
    dtype, shape = check_dtype(dtype_obj, (where, ".dtype")), check_shape(shape_obj, (where, ".shape"))
    base = BaseRef.from_obj(base_obj[0], (where, ".base")) if base_obj else None
    if base is not None and not predicts(base.dtype, base.shape, dtype, shape):
        fail((where, ".base"), f"{base.dtype} {list(base.shape)} predicts no {dtype} {list(shape)}")
    return TensorEntry(name, action, dtype, shape, base, exact=ExactRef.from_obj(exact, (where, ".exact")))


def predicts(base_dtype: str, base_shape: tuple[int, ...], dtype: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a base tensor may predict an exact one: as it is, or converted, with more or fewer rows."""
    alike = base_dtype == dtype or (base_dtype in c.DELTA_DTYPES and dtype in c.DELTA_DTYPES)
    return alike and len(base_shape) == len(shape) and base_shape[1:] == shape[1:] and 0 not in (*base_shape, *shape)


_PARSERS = {"same": _parse_same, "replace": _parse_replace, "alias": _parse_alias, "exact": _parse_exact}
