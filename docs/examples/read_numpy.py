"""Read the delta of any tensor of a delta file with numpy alone: every kind of term, sums of terms, seeded positions.

    deltafmt inspect math.deltafmt --json > math.json
    python docs/examples/read_numpy.py math.json TENSOR

deltafmt is not imported. The JSON says where the arrays lie, so the file must be of the hot profile; ``repack`` makes
one of a cold file. Section numbers are those of the specification, ``spec/deltafmt-v1.md``.
"""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"U8": "u1", "U32": "<u4", "BF16": "<u2", "F16": "<f2", "F32": "<f4"}


def fields(words: Any, width: int, count: int) -> Any:
    """Section 11.2, planes: packed words, one row of words for each row, to ``count`` integers of ``width`` bits."""
    found, low, first, i = np.zeros((len(words), count), np.int64), 0, 0, np.arange(count)
    while low < width:
        plane = 1 << min(5, (width - low).bit_length() - 1)
        bits = words[:, first + i * plane // 32] >> (i * plane % 32).astype(np.uint32) & np.uint32(2**plane - 1)
        found |= bits.astype(np.int64) << low
        first, low = first + -(-count * plane // 32), low + plane
    return found


def rows_of(array: Any, rows: int, items: int, share: int = 1) -> Any:
    """Section 11.2, tiles: row r is lane r mod (32 share) // share of one of ``share`` tiles."""
    tiles = array.reshape(-1, share, items, 32)
    return tiles.transpose(0, 3, 1, 2).reshape(-1, items)[:rows]


def words_of(width: int, count: int) -> int:
    """Return the packed words that ``count`` fields of a row take: each binary digit of the width is a plane."""
    return sum(-(-count * (1 << bit) // 32) for bit in range(min(width.bit_length(), 6)) if width >> bit & 1)


def values(codes: Any, layout: dict[str, Any], scales: Any, zeros: Any = 0) -> Any:
    """Sections 11.5 and 12.3: integers to float32 values."""
    if layout["grid"] == "asymmetric":
        return (codes - zeros).astype(np.float32) * scales
    top = 2 ** layout["bits"] - (2 if layout["grid"] == "midtread" else 1)
    return (2 * codes - top).astype(np.float32) * (scales * np.float32(0.5))


def wide(array: Any, dtype: str) -> Any:
    """Return BF16 (the upper half of a float32), F16 or F32 as float32."""
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32) if dtype == "BF16" else array.astype(np.float32)


def seeded(seed: int, mask_rows: int, groups: int, n: int, m: int) -> Any:
    """Section 11.4: the positions that follow from a seed, shape (mask rows, groups, N)."""
    log_m = m.bit_length() - 1
    bits = next(size for size in (4, 8, 16) if size >= (log_m if n == 1 else 2 * log_m - 1))
    x = np.uint32(seed) + np.arange(mask_rows, dtype=np.uint32) * np.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
    g = np.arange(groups, dtype=np.uint32)
    x = x[:, None] + g // np.uint32(64 // bits) * np.uint32(0x85EBCA6B)
    product = (x ^ x >> np.uint32(16)).astype(np.uint64) * np.uint64(0xCD9E8D57)
    hashed = (product >> np.uint64(32) ^ product & np.uint64(0xFFFFFFFF)) * np.uint64(0xFFFEB2D5)
    lane = (hashed >> (g % np.uint32(64 // bits) * np.uint32(bits)).astype(np.uint64)).astype(np.int64)
    factor, offset = lane >> log_m - 1 & m - 1 | 1, lane & m - 1
    return factor[:, :, None] * np.arange(n) + offset[:, :, None] & m - 1


def nm(layout: dict[str, Any], buffers: dict[str, Any], rows: int, columns: int) -> Any:
    """Section 11: N entries of every M columns."""
    n, m, share = layout["keep"], layout["group"], layout["share"]
    groups, mask_rows = -(-columns // m), -(-rows // share)
    kept = groups * n
    codes = fields(rows_of(buffers["codes"], rows, words_of(layout["bits"], kept), share), layout["bits"], kept)
    size = layout["scale_group"] or kept
    scales = rows_of(buffers["scales"], rows, -(-kept // size), share)[:, np.arange(kept) // size]
    if "index" in buffers:
        width = (m - 1).bit_length()
        index = rows_of(buffers["index"], mask_rows, words_of(width, kept))
        positions = fields(index, width, kept).reshape(mask_rows, groups, n)
    else:
        positions = seeded(layout["seed"], mask_rows, groups, n, m)
    column = (positions + np.arange(groups)[:, None] * m).reshape(mask_rows, kept).repeat(share, axis=0)[:rows]
    out = np.zeros((rows, groups * m), np.float32)
    np.put_along_axis(out, column, values(codes, layout, scales), axis=1)
    return out[:, :columns]


def lowbit(layout: dict[str, Any], buffers: dict[str, Any], rows: int, columns: int) -> Any:
    """Section 12: a code for every element."""
    codes = fields(rows_of(buffers["codes"], rows, words_of(layout["bits"], columns)), layout["bits"], columns)
    if layout["axis"] == "column":
        return values(codes, layout, buffers["scales"])
    size = layout["scale_group"] or columns
    column = np.arange(columns) // size
    scales, zeros = (
        rows_of(buffers[name], rows, column[-1] + 1)[:, column] if name in buffers else 0
        for name in ("scales", "zero_points")
    )
    return values(codes, layout, scales, np.int64(zeros))


def lowrank(layout: dict[str, Any], buffers: dict[str, Any], rows: int, columns: int) -> Any:
    """Section 13: a sum of outer products, in order, each product and each sum rounded to float32."""
    factors, sides = layout["factors"], []
    for side, length in (("u", rows), ("v", columns)):
        if side in buffers:
            sides.append(buffers[side].reshape(-1, length))
            continue
        element = np.arange(length) // (factors["scale_group"] or length)
        codes = fields(buffers[f"{side}_codes"].reshape(layout["rank"], -1), factors["bits"], length)
        scales, zeros = (
            buffers[name].reshape(layout["rank"], -1)[:, element] if name in buffers else 0
            for name in (f"{side}_scales", f"{side}_zero_points")
        )
        sides.append(values(codes, factors, scales, np.int64(zeros)))
    out = np.zeros((rows, columns), np.float32)
    for u, v in zip(*sides, strict=True):
        out = out + u[:, None] * v
    return out


def sparse(layout: dict[str, Any], buffers: dict[str, Any], rows: int, columns: int) -> Any:
    """Section 14: entries that stand anywhere, each at a gap from the one before it."""
    slots, filler, coding = layout["slots"], 2 ** layout["gap_bits"] - 1, layout["values"]
    if not slots:
        return np.zeros((rows, columns), np.float32)
    gaps = fields(rows_of(buffers["gaps"], 32, words_of(layout["gap_bits"], slots)), layout["gap_bits"], slots)
    blocks = -(-columns // layout["span"])
    out = np.zeros((-(-rows // 32) * 32, columns), np.float32)
    if isinstance(coding, dict):
        codes = fields(rows_of(buffers["codes"], 32, words_of(coding["bits"], slots)), coding["bits"], slots)
    for number, (start, stop) in enumerate(zip(buffers["starts"][:-1], buffers["starts"][1:], strict=True)):
        tile, block = divmod(number, blocks)
        gap = gaps[:, start:stop]
        last = block * layout["span"] - 1 + np.cumsum(np.where(gap == filler, filler, gap + 1), axis=1)
        lane, slot = np.nonzero(gap != filler)
        if isinstance(coding, dict):
            scales = rows_of(buffers["scales"], len(out), 1)[tile * 32 + lane, 0]
            found = values(codes[lane, start + slot], coding, scales)
        else:
            found = buffers["values"].reshape(-1, 32)[start + slot, lane]
        out[tile * 32 + lane, last[lane, slot]] = found
    return out[:rows]


def delta(report: dict[str, Any], name: str) -> Any:
    """Return the delta of a tensor, float32, one row for each row of its matrix."""
    tensor = report["tensors"].get(name, {})
    if "terms" not in tensor:
        raise SystemExit(f"{name} is no tensor of the file that has a delta")
    if any("file_offset" not in place for place in tensor["buffers"].values()):
        raise SystemExit("the file is cold; deltafmt repack makes a hot one of it")
    with open(report["file"], "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    rows, columns = tensor["rows"], tensor["columns"]
    total: Any = None
    for number, term in enumerate(tensor["terms"]):
        prefix = f"terms[{number}]." if len(tensor["terms"]) > 1 else ""
        buffers = {}
        for key, place in tensor["buffers"].items():
            if not key.startswith(prefix) or key == "new_rows":
                continue
            dtype = dtype_of(key.removeprefix(prefix), term)
            size = np.dtype(DTYPES[dtype]).itemsize
            view = np.frombuffer(mapped, DTYPES[dtype], place["length"] // size, place["file_offset"])
            buffers[key.removeprefix(prefix)] = wide(view, dtype) if dtype[0] in "BF" else view
        one = {"nm": nm, "lowbit": lowbit, "lowrank": lowrank, "sparse": sparse}[term["kind"]](
            term, buffers, rows, columns
        )
        total = one if total is None else total + one
    return total


def dtype_of(buffer: str, term: dict[str, Any]) -> str:
    """Return the dtype of a buffer's elements."""
    coding = term.get("factors", term.get("values", term))
    if buffer.endswith("zero_points"):
        return "U8"
    if buffer.endswith("scales"):
        return str(coding["scale_dtype"])
    return str(coding) if buffer in ("u", "v", "values") else "U32"


def main(inspected: str, name: str) -> None:
    """Print the shape and a few figures of a delta."""
    matrix = delta(json.loads(Path(inspected).read_text("utf-8")), name)
    print(f"{name}: {matrix.shape[0]} x {matrix.shape[1]}")
    print(f"nonzero elements: {np.count_nonzero(matrix)}")
    print(f"norm: {np.linalg.norm(matrix.astype(np.float64)):.6f}")
    print("row 0:", *(f"{value:.6g}" for value in matrix[0, :8]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
