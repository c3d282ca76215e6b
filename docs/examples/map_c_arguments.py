"""Print the numbers that ``map_c`` takes after FILE and ROW, from what ``deltafmt inspect --json`` printed.

./map_c math.deltafmt 70 $(python docs/examples/map_c_arguments.py math.json TENSOR)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(inspected: str, name: str) -> None:
    """Print ROWS COLUMNS N M BITS SHARE SEED CODES INDEX SCALES SCALES_PER_ROW SCALE_BYTES."""
    tensor = json.loads(Path(inspected).read_text("utf-8"))["tensors"].get(name, {})
    terms = tensor.get("terms", [])
    if [term["kind"] for term in terms] != ["nm"]:
        raise SystemExit(f"{name} is not one nm term of the file; read_numpy.py reads every kind")
    (term,) = terms
    if any("file_offset" not in place for place in tensor["buffers"].values()) or term["index"] == "rank":
        raise SystemExit("the file is cold; deltafmt repack makes a hot one of it")
    rows, columns = tensor["rows"], tensor["columns"]
    at = {buffer: place["file_offset"] for buffer, place in tensor["buffers"].items()}
    kept = -(-columns // term["group"]) * term["keep"]
    scales = -(-kept // term["scale_group"]) if term["scale_group"] else 1
    print(rows, columns, term["keep"], term["group"], term["bits"], term["share"], term["seed"], end=" ")
    print(at["codes"], at.get("index", 0), at["scales"], scales, 4 if term["scale_dtype"] == "F32" else 2)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
