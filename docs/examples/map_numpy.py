"""Map a delta file with numpy alone; where the arrays lie is read from what ``deltafmt inspect --json`` printed.

    deltafmt inspect math.deltafmt --json > math.json
    python docs/examples/map_numpy.py math.json TENSOR ROW

The file must be of the hot profile and the tensor an ``add`` of one term. deltafmt is not imported.
"""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 16


def views(mapped: mmap.mmap, tensor: dict[str, Any]) -> dict[str, Any]:
    """Return codes, index and scales as arrays of shape (tiles, words or scales, 32) that lie in the map."""
    found = {}
    for name, place in tensor["buffers"].items():
        if name not in ("codes", "index", "scales"):
            continue
        dtype = np.dtype("<u4")
        if name == "scales":
            dtype = np.dtype("<u2" if tensor["terms"][0]["scale_dtype"] == "BF16" else "<f4")
        array = np.frombuffer(mapped, dtype, place["length"] // dtype.itemsize, place["file_offset"])
        rows = int(np.prod(tensor["shape"][:-1]))
        rows = min(rows, int(np.prod(tensor["base"]["shape"][:-1])))
        share = tensor["terms"][0]["share"]
        tiles = -(-rows // (32 * share))  # of the index; the rows of a mask row lie in `share` tiles
        found[name] = array.reshape(tiles if name == "index" else tiles * share, -1, 32)
    return found


def row_of(array: Any, row: int, share: int) -> Any:
    """Return one row's words or scales; ``share`` is 1 for the index."""
    return array[row // (32 * share) * share + row % share, :, row % (32 * share) // share]


def fields(words: Any, width: int, count: int, shown: int) -> list[int]:
    """Return the first of a row's ``count`` fields, which lie in planes of 32, 16, 8, 4, 2 and 1 bits."""
    number, found, first, low = np.arange(shown), np.zeros(shown, np.uint64), 0, 0
    while low < width:
        plane = 1 << min(5, (width - low).bit_length() - 1)
        bits = words[first + number * plane // 32].astype(np.uint64) >> (number * plane % 32).astype(np.uint64)
        found |= (bits & np.uint64((1 << plane) - 1)) << np.uint64(low)
        first, low = first + -(-count * plane // 32), low + plane
    return [int(value) for value in found]


def main(inspected: str, name: str, row: int) -> None:
    """Print the first codes, positions and scales of a row."""
    report = json.loads(Path(inspected).read_text("utf-8"))
    tensor = report["tensors"][name]
    (term,) = tensor["terms"]
    with open(report["file"], "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    arrays = views(mapped, tensor)
    for key, array in arrays.items():
        if array.flags.owndata or array.flags.writeable:
            raise SystemExit(f"{key} is a copy")
        print(f"{key}: {array.dtype} {array.shape}, a view of the map", file=sys.stderr)

    kept = -(-tensor["shape"][-1] // term["group"]) * term["keep"]
    share, shown = term["share"], min(SHOWN, kept)
    print("codes", *fields(row_of(arrays["codes"], row, share), term["bits"], kept, shown))
    if "index" in arrays:
        width = (term["group"] - 1).bit_length()
        print("positions", *fields(row_of(arrays["index"], row // share, 1), width, kept, shown))
    else:
        print("positions follow from seed", term["seed"])
    scales = row_of(arrays["scales"], row, share)[:SHOWN]
    if scales.dtype == np.uint16:  # the upper halves of float32 values
        scales = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
    print("scales", *(f"{float(scale):.9g}" for scale in scales))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
