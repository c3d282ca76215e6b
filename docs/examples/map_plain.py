"""Map a delta file with Python's standard library alone: from the trailer to the index to one row's codes and scales.

    python docs/examples/map_plain.py math.deltafmt TENSOR ROW

The file must be of the hot profile and the tensor an ``add`` of one ``nm`` term (``read_numpy.py`` reads the others).
Positions are read from the index, or follow from the seed. Checksums are not checked here: run
``deltafmt verify`` once when a file arrives.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from typing import Any

SHOWN = 16
TRAILER = struct.Struct("<QQQ32s32s32s8s")


def decode(data: memoryview, at: int) -> tuple[Any, int]:
    """Decode one msgpack value of the kinds that an index holds; return it and where it ends."""
    tag = data[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if 0xCC <= tag <= 0xCF or 0xD0 <= tag <= 0xD3:
        size = 1 << (tag & 3)
        return int.from_bytes(data[at : at + size], "big", signed=tag >= 0xD0), at + size
    if tag >= 0xE0:
        return tag - 256, at
    if tag < 0x90:
        kind, count = "map", tag & 15
    elif tag < 0xA0:
        kind, count = "list", tag & 15
    elif tag < 0xC0:
        kind, count = "text", tag & 31
    else:
        kind, size = {
            0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xD9: ("text", 1), 0xDA: ("text", 2),
            0xDB: ("text", 4), 0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
        }[tag]  # fmt: skip
        count, at = int.from_bytes(data[at : at + size], "big"), at + size
    if kind in ("text", "bytes"):
        raw = bytes(data[at : at + count])
        return (raw.decode() if kind == "text" else raw), at + count
    values = []
    for _ in range(count * (2 if kind == "map" else 1)):
        value, at = decode(data, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if kind == "map" else values), at


def read_index(file: memoryview) -> dict[str, Any]:
    """Return the index, which the last 128 bytes of the file point to."""
    if len(file) < TRAILER.size:
        raise SystemExit("not a whole deltafmt file")
    offset, length, total, *_, magic = TRAILER.unpack(file[-TRAILER.size :])
    if magic != b"DLTEND\r\n" or total != len(file):
        raise SystemExit("not a whole deltafmt file")
    index, end = decode(file, offset)
    if end != offset + length:
        raise SystemExit("the index is damaged")
    return dict(index)


def row_of(items: memoryview, row: int, rows: int, share: int) -> memoryview:
    """Return one row's items, a strided view: item w of lane l of tile t is item 32 (t W + w) + l.

    The rows of a mask row lie in one lane of ``share`` tiles; the index has one tile for those, its ``share`` is 1.
    """
    tile, lane = row // (32 * share) * share + row % share, row % (32 * share) // share
    per_row = len(items) // (-(-rows // (32 * share)) * share * 32)
    return items[32 * tile * per_row + lane : 32 * (tile + 1) * per_row : 32]


def fields(words: memoryview, width: int, count: int, shown: int) -> list[int]:
    """Return the first of a row's ``count`` fields, which lie in planes of 32, 16, 8, 4, 2 and 1 bits."""
    found, first, low = [0] * shown, 0, 0
    while low < width:
        plane = 1 << min(5, (width - low).bit_length() - 1)
        for number in range(shown):
            word, shift = divmod(number * plane, 32)
            found[number] |= (words[first + word] >> shift & (1 << plane) - 1) << low
        first, low = first + -(-count * plane // 32), low + plane
    return found


def seeded(seed: int, mask_row: int, count: int, n: int, m: int) -> list[int]:
    """Return the first ``count`` positions of a mask row, which follow from the seed (section 11.4)."""
    log_m = m.bit_length() - 1
    bits = next(size for size in (4, 8, 16) if size >= (log_m if n == 1 else 2 * log_m - 1))
    key = seed + mask_row * 0x9E3779B1 & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        key = (key ^ key >> shift) * factor & 0xFFFFFFFF
    found = []
    for entry in range(count):
        group, i = divmod(entry, n)
        x = key + group // (64 // bits) * 0x85EBCA6B & 0xFFFFFFFF
        product = (x ^ x >> 16) * 0xCD9E8D57
        lane = (product >> 32 ^ product & 0xFFFFFFFF) * 0xFFFEB2D5 >> bits * (group % (64 // bits))
        factor, offset = lane >> log_m - 1 & m - 1 | 1, lane & m - 1
        found.append(factor * i + offset & m - 1)
    return found


def main(path: str, name: str, row: int) -> None:
    """Print the first codes, positions and scales of a row."""
    if sys.byteorder != "little":
        raise SystemExit("words would have to be swapped on this machine")
    with open(path, "rb") as opened:
        file = memoryview(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))
    index = read_index(file)
    if name not in index["tensors"]:
        raise SystemExit(f"{path} has no tensor {name}")
    tensor, _ = decode(memoryview(index["tensors"][name]), 0)
    terms = tensor.get("terms", [])
    if [index["layouts"][term["layout"]]["kind"] for term in terms] != ["nm"]:
        raise SystemExit(f"{name} is not one nm term; read_numpy.py reads every kind")
    (term,) = terms
    layout = index["layouts"][term["layout"]]
    if layout["index"] == "rank" or any(index["sections"][ref[0]]["codec"] for ref in term["buffers"].values()):
        raise SystemExit(f"{path} is a cold file; deltafmt repack makes a hot one of it")

    def buffer(key: str, item: str) -> memoryview:
        section, offset, length = term["buffers"][key]
        start = index["sections"][section]["offset"] + offset
        return file[start : start + length].cast(item)

    leading = tensor.get("leading", len(tensor["shape"]) - 1)
    rows, columns = math.prod(tensor["shape"][:leading]), math.prod(tensor["shape"][leading:])
    rows = min(rows, math.prod(tensor["base"]["shape"][:leading]))
    if not 0 <= row < rows:
        raise SystemExit(f"row {row} is not one of the {rows} rows")
    share, kept = layout["share"], -(-columns // layout["group"]) * layout["keep"]
    shown = min(SHOWN, kept)
    print("codes", *fields(row_of(buffer("codes", "I"), row, rows, share), layout["bits"], kept, shown))
    if "index" in term["buffers"]:
        words = row_of(buffer("index", "I"), row // share, -(-rows // share), 1)
        print("positions", *fields(words, (layout["group"] - 1).bit_length(), kept, shown))
    else:
        print("positions", *seeded(term["seed"], row // share, shown, layout["keep"], layout["group"]))
    if layout["scale_dtype"] == "F32":
        scales = [float(scale) for scale in row_of(buffer("scales", "f"), row, rows, share)[:SHOWN]]
    else:  # BF16: the upper half of a float32
        halves = row_of(buffer("scales", "H"), row, rows, share)[:SHOWN]
        scales = [struct.unpack("<f", struct.pack("<HH", 0, half))[0] for half in halves]
    print("scales", *(f"{scale:.9g}" for scale in scales))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
