"""What ``unpack`` and ``apply`` say of the folder that they have written."""

from __future__ import annotations

from typing import Any

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.pipeline.summary import left_out_line, plural
from deltafmt.pipeline.unpack import UnpackResult
from deltafmt.tools import console
from deltafmt.tools.name_arguments import names_obj, say_names
from deltafmt.tools.quantized_arguments import say_dequantized


def written_obj(result: UnpackResult) -> dict[str, Any]:
    """Return the fields of the JSON output that say what was written."""
    return {
        "tensors": result.tensors,
        "bytes": result.nbytes,
        "files": result.files,
        "restored_files": result.restored,
        "code": result.code,
        "removed": result.removed,
    }


def read_obj(result: UnpackResult) -> dict[str, Any]:
    """Return the fields of the JSON output that say how the base was read."""
    return {"names": names_obj(result.names), "dequantized": result.dequantized.to_obj()}


def say_written(result: UnpackResult, code: str | None) -> None:
    """Print what was written, and how the base was read.

    Args:
        result: what was done.
        code: the option ``--code``.
    """
    files = f" and {bounded(result.files, 30)}" if result.files else ""
    console.say(f"{result.path}: {plural(result.tensors, 'tensor')}, {result.nbytes:,} bytes{files}")
    if result.restored:
        console.say(f"restored byte for byte: {bounded(result.restored)}")
    if result.code:
        done = "left out" if code == "leave" else "written"
        console.say(f"code, {done}: {bounded(result.code, 30)}")
    say_names(result.names)
    say_dequantized(result.dequantized)
    if result.removed:
        console.say(left_out_line(result.removed))
