"""Vectors of the arithmetic of ``add`` (section 10): deltas, bases, and the fine-tuned tensors that they give.

The deltas are those of sparse terms with F32 values, which can be any.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from applied import rounded
from blake3 import blake3
from draft import Draft
from numpy.typing import NDArray
from vector_tools import WithBase, based, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.terms.buffers import blank, raw_bytes
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.sparse.codec import SparseArrays
from deltafmt.terms.sparse.layout import SparseLayout

Floats = NDArray[np.float32]
LAYOUT = SparseLayout("F32", 8, 256)


@dataclass
class Change:
    """A tensor with terms: dtypes and shapes of base and fine-tune, a matrix for each term, the new rows."""

    dtype: str
    shape: tuple[int, ...]
    matrices: list[Floats]
    base_dtype: str = ""
    base_shape: tuple[int, ...] = ()
    new: bytes | None = None


def with_terms(changes: dict[str, Change]) -> bytes:
    """Return a file of tensors with sparse terms."""
    out = io.BytesIO()
    writer = ContainerWriter(out)
    entries = []
    for name, change in changes.items():
        digest, terms = blake3(), []
        for matrix in change.matrices:
            term, payload = _term(writer, matrix)
            terms.append(term)
            digest.update(payload)
        data = None if change.new is None else writer.add(change.new)
        digest.update(change.new or b"")
        base = BaseRef(bytes(32), change.base_dtype or change.dtype, change.base_shape or change.shape)
        entries.append(TensorEntry(name, "add", change.dtype, change.shape, base, digest.digest(), data, tuple(terms)))
    writer.finish(entries)
    return out.getvalue()


def _term(writer: ContainerWriter, matrix: Floats) -> tuple[Term, bytes]:
    kept = (matrix != 0) | np.signbit(matrix)
    columns = np.nonzero(kept)[1]
    arrays = SparseArrays(np.cumsum(kept.sum(axis=1)), columns, matrix[kept].view(np.uint32))
    layout, slots = fitted(LAYOUT, arrays, matrix.shape[1])
    packed = blank(layout, *matrix.shape, slots)
    term_codec(layout, *matrix.shape, 0, slots).encode(arrays, packed, 0)
    refs = {name: writer.add(raw_bytes(array)) for name, array in packed.items()}
    payload = b"".join(bytes(raw_bytes(array)) for array in packed.values())
    return Term(writer.layout_number(layout), layout, 0, refs, slots), payload


def floats(*rows: list[float]) -> Floats:
    """Return a float32 matrix."""
    with np.errstate(over="ignore", under="ignore"):
        return np.array(rows, np.float64).astype(np.float32)


def bits(values: Floats, dtype: str) -> bytes:
    """Return values as the bytes of a dtype."""
    return bytes(rounded(values, dtype).tobytes())


# Bases and deltas. For each dtype: 1 and half its last place and a bit more or less (so that a sum that is rounded once
# differs from one that is rounded to float32 first), ties to either side, cancellation, the largest number and a step
# beyond it, the smallest ones, and the infinities.
LAST = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}
LARGEST = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234663852886e38}
LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
INF = float("inf")


def pair(base_dtype: str, dtype: str) -> WithBase:
    """Return a file that adds to one dtype and rounds to another, and its base."""
    ulp, top, tiny = LAST[dtype], LARGEST[dtype], LEAST[dtype]
    mine, largest, least = LAST[base_dtype], LARGEST[base_dtype], LEAST[base_dtype]
    steps = [
        *((1.0, ulp / 2), (1.0, ulp / 2 + 2.0**-26), (1.0, ulp * 1.5), (1.0, -ulp / 4), (1.0, ulp / 2 + 2.0**-23)),
        *((1.0 + mine, ulp / 2), (1.0 + mine, -1.0 - mine), (-1.0, -ulp / 2), (3.0, 2.0**-30), (-0.0, 0.0)),
        *((0.0, 0.0), (0.0, -0.0), (-0.0, -0.0), (-0.0, 2.0**-140), (least, tiny / 2), (least, -least), (0.0, tiny)),
        *((0.0, tiny * 1.5), (0.0, tiny / 2), (largest, 0.0), (largest, largest / 4), (-largest, -largest / 4)),
        *((top if top <= largest else 1.0, top * 2.0**-9), (INF, 1.0), (-INF, 0.0), (INF, 0.0), (0.1, 0.2)),
        *((1.0 + mine, 0.0), (least, 0.0), (-3.7, 3.7), (100.3, -0.007)),
    ]
    base, delta = floats([step[0] for step in steps]), floats([step[1] for step in steps])
    data = bits(base, base_dtype)
    return based(
        with_terms({"w": Change(dtype, base.shape, [delta], base_dtype)}), {"w": (base_dtype, base.shape, data)}
    )


for _base_dtype in ("BF16", "F16", "F32"):
    for _dtype in ("BF16", "F16", "F32"):
        vector(
            "ok",
            f"add from {_base_dtype} to {_dtype}: ties, sums that are rounded twice, zeros of either sign, bounds",
            name=f"add-{_base_dtype.lower()}-to-{_dtype.lower()}",
        )(lambda pair_of=(_base_dtype, _dtype): pair(*pair_of))  # type: ignore[misc]


@vector("ok", "where the delta is zero, the base's bits stay: NaN with and without the quiet bit, of all three dtypes")
def add_zero_to_nan() -> WithBase:
    words = {
        "BF16": ("<u2", [0x7FC0, 0x7F81, 0xFFA5, 0xFFC1, 0x8000, 0x0001]),
        "F16": ("<u2", [0x7E00, 0x7C01, 0xFE55, 0xFD00, 0x8000, 0x0001]),
        "F32": ("<u4", [0x7FC00000, 0x7F800001, 0xFFA5A5A5, 0xFFFFFFFF, 0x80000000, 0x00000001]),
    }
    base = {name: (name, (1, 6), np.array(found, form).tobytes()) for name, (form, found) in words.items()}
    zero = floats([0.0, -0.0, 0.0, -0.0, 0.0, -0.0])
    return based(with_terms({name: Change(name, (1, 6), [zero]) for name in base}), base)


NANS = {
    "BF16": ("<u2", [0x7FC0, 0x7F81, 0xFF81, 0xFFA5, 0x7FFF, 0xFFFF]),
    "F16": ("<u2", [0x7E00, 0x7C01, 0xFC08, 0xFE55, 0x7FFF, 0xFFFF]),
    "F32": ("<u4", [0x7FC00000, 0x7F800001, 0xFF804001, 0xFFA5A5A5, 0x7FFFFFFF, 0xFFFFFFFF]),
}


def nans(base_dtype: str, dtype: str) -> WithBase:
    """Return a file that adds numbers, and zero, to NaNs of a base."""
    form, found = NANS[base_dtype]
    data = np.array(found * 2, form).tobytes()
    delta = floats([1.0, -2.0, 0.5, 1e30, 1e-40, -1.0, *[0.0, -0.0] * 3])
    return based(with_terms({"w": Change(dtype, (1, 12), [delta], base_dtype)}), {"w": (base_dtype, (1, 12), data)})


for _base_dtype in NANS:
    for _dtype in NANS:
        vector(
            "ok",
            f"add from {_base_dtype} to {_dtype} where the base is NaN: its sign, its upper bits, and quiet",
            name=f"nan-{_base_dtype.lower()}-to-{_dtype.lower()}",
        )(lambda pair_of=(_base_dtype, _dtype): nans(*pair_of))  # type: ignore[misc]


@vector("ok", "infinity of the base less an infinite delta, in each dtype: the NaN that stands for no number")
def add_infinity_to_infinity() -> WithBase:
    delta = [floats([3e38, -3e38, 3e38, 1.0])] * 2
    base, words = (
        {},
        {"BF16": ("<u2", 0xFF80, 0x7F80), "F16": ("<u2", 0xFC00, 0x7C00), "F32": ("<u4", 0xFF800000, 0x7F800000)},
    )
    for name, (form, minus, plus) in words.items():
        base[name] = (name, (1, 4), np.array([minus, plus, plus, minus], form).tobytes())
    return based(with_terms({name: Change(name, (1, 4), delta) for name in base}), base)


@vector("ok", "three terms are summed in float32 in their order: 2**24 + 1 - 2**24 is 0, and not 1")
def sum_in_order() -> bytes:
    large, one = 2.0**24, 1.0
    rows = [[large, one, one, 1e-8], [one, large, one, 1.0], [-large, -large, one, -1.0]]
    data = with_terms({"w": Change("F32", (1, 4), [floats(row) for row in rows])})
    with DeltaFile(io.BytesIO(data)) as delta:
        assert delta.delta("w").tolist() == [[0.0, 0.0, 3.0, 0.0]]
    return data


@vector("ok", "three terms whose partial sums are beyond float32: infinity, which the third does not bring back")
def sum_beyond() -> bytes:
    rows = [[3e38, 3e38], [3e38, 3e38], [-3e38, -1.0]]
    return with_terms({"w": Change("F32", (1, 2), [floats(row) for row in rows])})


@vector("ok", "terms whose sum is zero leave the base's element as it is; -0 and NaN in the base")
def sum_of_zero() -> WithBase:
    rows = floats([1.5, -2.0, 1.0]), floats([-1.5, 2.0, -1.0])
    data = np.array([0x8000, 0x7F81, 0x3F80], "<u2").tobytes()
    return based(with_terms({"w": Change("BF16", (1, 3), list(rows))}), {"w": ("BF16", (1, 3), data)})


def ramp(*shape: int) -> Floats:
    """Return numbers that rise and fall, none of them zero but every fifth."""
    values = np.arange(1, np.prod(shape) + 1, dtype=np.float32)
    return np.where(values % 5 == 0, 0, (values % 17 - 8.5) / 32).astype(np.float32).reshape(shape)


def plain(name: str, dtype: str, *shape: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return a base tensor."""
    return {name: (dtype, shape, bits(ramp(*shape) * 3, dtype))}


@vector("ok", "a 1-d tensor: one row")
def add_1d() -> WithBase:
    return based(with_terms({"w": Change("BF16", (7,), [ramp(1, 7)])}), plain("w", "BF16", 7))


@vector("ok", "a 3-d tensor of shape [2, 3, 5]: six rows of five columns")
def add_3d() -> WithBase:
    return based(with_terms({"w": Change("BF16", (2, 3, 5), [ramp(6, 5)])}), plain("w", "BF16", 2, 3, 5))


@vector("ok", "a matrix that grew from 3 to 5 rows: terms for 3 rows, and the other rows as they are")
def add_grown() -> WithBase:
    new = bits(ramp(2, 4) + 7, "BF16")
    change = Change("BF16", (5, 4), [ramp(3, 4)], base_shape=(3, 4), new=new)
    return based(with_terms({"w": change}), plain("w", "BF16", 3, 4))


@vector("ok", "a 3-d tensor that grew from 2 to 3, from BF16 to F32: new rows are held in F32")
def add_grown_3d() -> WithBase:
    new = bits(ramp(2, 4) + 7, "F32")
    change = Change("F32", (3, 2, 4), [ramp(4, 4)], "BF16", (2, 2, 4), new)
    return based(with_terms({"w": change}), plain("w", "BF16", 2, 2, 4))


@vector("ok", "a matrix that shrank from 5 to 3 rows: terms for 3 rows; the identity is that of all 5 rows of the base")
def add_shrunk() -> WithBase:
    change = Change("BF16", (3, 4), [ramp(3, 4)], base_shape=(5, 4))
    return based(with_terms({"w": change}), plain("w", "BF16", 5, 4))


@vector("ok", "every action with a base: same, add with its alias, replace; another base tensor is removed")
def actions_with_base() -> WithBase:
    draft = Draft.of(with_terms({"w": Change("F16", (2, 3), [ramp(2, 3)])}))
    base = plain("w", "F16", 2, 3) | plain("kept", "F32", 4) | plain("gone", "F32", 2)
    end = len(draft.raw[0]) + -len(draft.raw[0]) % 256
    draft.raw[0] += bytes(end - len(draft.raw[0])) + b"new"
    draft.index["removed"] = ["gone"]
    kept = {"digest": bytes(32), "dtype": "F32", "shape": [4]}
    draft.index["tensors"] = {
        "kept": {"action": "same", "base": kept, "dtype": "F32", "shape": [4]},
        "new": {"action": "replace", "data": [0, end, 3], "digest": bytes(32), "dtype": "U8", "shape": [3]},
        "tied": {"action": "alias", "dtype": "F16", "shape": [2, 3], "target": "w"},
        "w": draft.entry,
    }
    return based(draft.build(), base)


@vector("ok", "a base whose bytes are not those that the file records: whoever applies the file refuses it")
def wrong_base() -> WithBase:
    return based(with_terms({"w": Change("BF16", (2, 3), [ramp(2, 3)])}), plain("w", "BF16", 2, 3), refused=True)


@vector("ok", "a tensor that is the same, of which the base has other bytes: whoever applies the file refuses it")
def wrong_base_same() -> WithBase:
    draft = Draft.of(with_terms({}))
    ref = {"digest": bytes(32), "dtype": "BF16", "shape": [2, 3]}
    draft.index["tensors"] = {"w": {"action": "same", "base": ref, "dtype": "BF16", "shape": [2, 3]}}
    return based(draft.build(), plain("w", "BF16", 2, 3), refused=True)


@vector("ok", "a base with the recorded bytes in another shape: whoever applies the file refuses it")
def wrong_base_shape() -> WithBase:
    right = based(with_terms({"w": Change("BF16", (2, 3), [ramp(2, 3)])}), plain("w", "BF16", 2, 3))
    return WithBase(right.data, {"w": ("BF16", (3, 2), right.base["w"][2])}, refused=True)


@vector("ok", "a base with the recorded bytes in another dtype: whoever applies the file refuses it")
def wrong_base_dtype() -> WithBase:
    right = based(with_terms({"w": Change("BF16", (2, 3), [ramp(2, 3)])}), plain("w", "BF16", 2, 3))
    return WithBase(right.data, {"w": ("F16", (2, 3), right.base["w"][2])}, refused=True)


@vector("ok", "a base without the tensor: whoever applies the file refuses it")
def wrong_base_missing() -> WithBase:
    right = based(with_terms({"w": Change("BF16", (2, 3), [ramp(2, 3)])}), plain("w", "BF16", 2, 3))
    return WithBase(right.data, plain("v", "BF16", 5, 1), refused=True)
