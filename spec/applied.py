"""A delta applied to a base, one sentence of the specification after the other (sections 7.4, 7.8 and 10).

The vectors' fine-tuned bytes come from here, not from the package, which is compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from applied_exact import predicted_by, restored, width_of
from numpy.typing import NDArray

from deltafmt.delta import DeltaFile, RunDecoder, codec_of
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.index.scaled import ScaledRef
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMCodec
from deltafmt.terms.sparse.codec import SparseCodec

# Dtype, shape and bytes.
Stored = tuple[str, tuple[int, ...], bytes]
Floats = NDArray[np.float32]

# Bits of an element, and of its fraction.
WIDTHS = {"BF16": (16, 7), "F16": (16, 10), "F32": (32, 23)}
SIZES = {"F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F64": 8, "I64": 8}


def fine_tuned(delta: DeltaFile, deltas: Mapping[str, Any], base: Mapping[str, Stored]) -> dict[str, bytes]:
    """Return the bytes of every tensor of the fine-tune, given the matrices of those with terms."""
    return {name: _tensor(delta, delta.resolve(name), deltas, base) for name in delta}


def _tensor(delta: DeltaFile, entry: TensorEntry, deltas: Mapping[str, Any], base: Mapping[str, Stored]) -> bytes:
    if entry.exact is not None:
        known = None if entry.base is None else (entry.base.dtype, _of_base(delta, entry, entry.base, base))
        buffer = bytes(delta.container.buffer(entry.exact.data))
        if entry.terms and known is not None:
            predicted, marks = part_of(delta, entry, known[1], entry.exact.factors)
            return restored(buffer, entry.exact.chunk, entry.dtype, predicted, marks)
        return restored(buffer, entry.exact.chunk, entry.dtype, predicted_by(entry.dtype, entry.nbytes, known))
    new = b"" if entry.data is None else bytes(delta.container.buffer(entry.data))
    if entry.base is None:
        return new
    of_base = _of_base(delta, entry, entry.base, base)
    if not entry.terms:
        return of_base
    shared, columns = entry.delta_rows, entry.columns
    change = np.asarray(deltas[entry.name]).reshape(-1)[: shared * columns]
    return added(of_base, entry.base.dtype, change, entry.dtype) + new


def part_of(delta: DeltaFile, entry: TensorEntry, base: bytes, factors: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Return the prediction of a tensor with an exact part, and which of its units are marked (section 17.8)."""
    assert entry.base is not None
    rows, columns = entry.delta_rows, entry.columns
    change, marks = np.zeros((rows, columns), np.float32), np.zeros((rows, columns), bool)
    matrices = RunDecoder(delta, entry).matrices(0, rows)
    for number, (bits, matrix, term) in enumerate(zip(factors, matrices, entry.terms, strict=True)):
        # "each element t of a term's matrix is replaced by float32(c * t)"
        product = matrix * np.array([bits], "<u4").view("<f4")
        change = change + product if number else product
        # "A unit is marked if a term of kind nm or sparse has an entry at its place, whatever its value."
        for row, column in entries_of(delta, entry, term):
            marks[row, column] = True
    predicted = added(base, entry.base.dtype, change.reshape(-1), entry.dtype)
    # "The prediction of the units of all other rows is `data`." "Units of `data` are not marked."
    predicted += b"" if entry.data is None else bytes(delta.container.buffer(entry.data))
    width = width_of(entry.dtype)
    units = [int.from_bytes(predicted[at : at + width], "little") for at in range(0, len(predicted), width)]
    marked = [bool(mark) for mark in marks.reshape(-1)]
    return units, marked + [False] * (len(units) - len(marked))


def entries_of(delta: DeltaFile, entry: TensorEntry, term: Term) -> Iterator[tuple[int, int]]:
    """Give row and column of every entry of a term of kind ``nm`` or ``sparse``."""
    codec, packed, rows, columns = codec_of(entry, term), delta.term_views(entry, term), entry.delta_rows, entry.columns
    if isinstance(codec, SparseCodec):
        for tile in range(-(-rows // 32)):
            lanes, places, _ = codec.entries(packed, tile)
            yield from ((tile * 32 + int(lane), int(place)) for lane, place in zip(lanes, places, strict=True))
    if isinstance(codec, NMCodec):
        found = nm.decode(codec.layout, packed, term.seed, 0, rows, columns).positions
        for row in range(rows):
            for group, positions in enumerate(found[row // codec.layout.share]):
                columns_of = (group * codec.layout.m + int(position) for position in positions)
                yield from ((row, column) for column in columns_of if column < columns)


def _of_base(delta: DeltaFile, entry: TensorEntry, ref: BaseRef, base: Mapping[str, Stored]) -> bytes:
    """Return the bytes of the base's tensor, as far as a delta of this entry needs them."""
    scaled = delta.container.scaled()

    def values(name: str) -> bytes:
        return meant(scaled[name], name, base) if name in scaled and base[name][0] != "BF16" else base[name][2]

    size = SIZES.get(ref.dtype, 1)
    if ref.parts:
        return b"".join(values(part.name)[part.start * size :][: part.elements * size] for part in ref.parts)
    found = values(entry.name)
    return found[: entry.delta_rows * entry.columns * size] if entry.terms else found


def added(base: bytes, base_dtype: str, delta: Floats, dtype: str) -> bytes:
    """Return a base plus a delta of as many elements, as bytes (section 10)."""
    wide = widened(base[: delta.size * SIZES[base_dtype]], base_dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = wide + delta
    total = rounded(sums, dtype)
    # "It is 0x7FC0 in BF16, 0x7E00 in F16, 0x7FC00000 in F32."
    total = np.where(np.isnan(sums), {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtype], total)
    # "Where the delta is zero, the fine-tuned element is the base's", rounded
    total = np.where(delta == 0, rounded(wide, dtype), total)
    # "If the base's element is NaN, whatever the delta: it has the sign of the base's element, ..."
    raw = np.frombuffer(base, f"<u{SIZES[base_dtype]}")[: delta.size]
    total = np.where(np.isnan(wide), [_nan(int(bits), base_dtype, dtype) for bits in raw], total)
    # "with equal dtypes bit for bit, whatever it is"
    if base_dtype == dtype:
        total = np.where(delta == 0, raw, total)
    return total.astype(f"<u{SIZES[dtype]}").tobytes()


def _nan(bits: int, base_dtype: str, dtype: str) -> int:
    """Return the bits of a NaN in another dtype (section 10.5)."""
    (width, fraction), (new_width, new_fraction) = (WIDTHS[name] for name in (base_dtype, dtype))
    sign, kept = bits >> (width - 1), bits & ((1 << fraction) - 1)
    # "the highest bits of its fraction, as many as the fine-tune's dtype has, with zeros behind them if that has more"
    moved = kept << new_fraction >> fraction
    quiet = moved | 1 << (new_fraction - 1)
    exponent = (1 << (new_width - 1 - new_fraction)) - 1
    return sign << (new_width - 1) | exponent << new_fraction | quiet


def widened(data: bytes, dtype: str) -> Floats:
    """Return values in float32, exactly."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def rounded(values: Floats, dtype: str) -> NDArray[Any]:
    """Round float32 values to a dtype, to nearest, ties to even; the result holds bits."""
    if dtype == "F32":
        return values.view("<u4")
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype("<f2").view("<u2")
    bits = values.view("<u4")
    down, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (down & 1 == 1))
    return (down + up).astype("<u2")


def meant(ref: ScaledRef, name: str, base: Mapping[str, Stored]) -> bytes:
    """Return the BF16 values of a tensor that a base keeps as 8-bit floats (section 7.8)."""
    shape = ref.codes.shape
    codes = np.array([_code(ref.codes.dtype, byte) for byte in base[name][2]], np.float32).reshape(shape)
    if ref.scales is None:
        return _bf16(codes)
    dtype, data = ref.scales.dtype, base[ref.scales_name][2]
    if dtype in {"F8_E8M0", "U8"}:
        scales = np.array([np.nan if byte == 255 else 2.0 ** (byte - 127) for byte in data], np.float32)
    else:
        scales = widened(data, dtype)
    blocks = tuple(-(-size // step) for size, step in zip(shape, ref.block, strict=True))
    where = np.meshgrid(*(np.arange(n) // b for n, b in zip(shape, ref.block, strict=True)), indexing="ij")
    with np.errstate(over="ignore", invalid="ignore"):
        return _bf16(codes * scales.reshape(blocks)[tuple(where)])


def _bf16(values: Floats) -> bytes:
    # "A value that is not a number is the BF16 0x7FC0."
    return np.where(np.isnan(values), 0x7FC0, rounded(values, "BF16")).astype("<u2").tobytes()


def _code(dtype: str, byte: int) -> float:
    """Return the value of an 8-bit float."""
    bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    sign, exponent, fraction = -1.0 if byte >> 7 else 1.0, byte >> bits & (0x7F >> bits), byte & ((1 << bits) - 1)
    if dtype == "F8_E4M3" and byte & 0x7F == 0x7F:
        return float("nan")
    if dtype == "F8_E5M2" and exponent == 31:
        return float("nan") if fraction else sign * float("inf")
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - bits)
    return sign * (1 + fraction / (1 << bits)) * 2.0 ** (exponent - bias)
