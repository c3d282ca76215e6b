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
        if name == "index":
            rows = -(-rows // tensor["terms"][0]["share"])
        found[name] = array.reshape(-(-rows // 32), -1, 32)
    return found


def field(words: Any, row: int, number: int, width: int) -> int:
    """Return one field of a row: word w of row 32t + r is at [t, w, r], that is at word 32 (t W + w) + r."""
    word, shift = divmod(number * width, 32)
    tile, lane = divmod(row, 32)
    value = int(words[tile, word, lane]) >> shift
    if shift + width > 32:
        value |= int(words[tile, word + 1, lane]) << (32 - shift)
    return value & (1 << width) - 1


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
    shown = range(min(SHOWN, kept))
    print("codes", *(field(arrays["codes"], row, i, term["bits"]) for i in shown))
    if "index" in arrays:
        width = (term["group"] - 1).bit_length()
        print("positions", *(field(arrays["index"], row // term["share"], i, width) for i in shown))
    else:
        print("positions follow from seed", term["seed"])
    scales = arrays["scales"][row // 32, :SHOWN, row % 32]
    if scales.dtype == np.uint16:  # the upper halves of float32 values
        scales = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
    print("scales", *(f"{float(scale):.9g}" for scale in scales))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
