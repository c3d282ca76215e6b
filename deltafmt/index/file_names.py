"""The names that attached files may have (spec/deltafmt-v1.md, section 7.9).

Some file systems do not tell ``A`` from ``a``. Endings and equality are therefore those of the names in lower case, of
ASCII letters only: what other letters become depends on the version of Unicode.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Final

from deltafmt.format import constants as c

MAX_PART_BYTES: Final = 255

# Names that Windows takes for devices, also with an extension: "con.txt" is the console. It reads ¹, ², ³ as digits.
DEVICES: Final = frozenset(
    (
        *("con", "prn", "aux", "nul", "conin$", "conout$"),
        *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789¹²³"),
    )
)

# The endings of weight files and of their indexes.
WEIGHT_ENDINGS: Final = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".npz", ".npy"),
    *(".pkl", ".pickle", ".tflite", ".ot", ".deltafmt", ".partial", ".safetensors.index.json", ".bin.index.json"),
)
# The index of a variant of weights: "model.safetensors.index.fp16.json".
_WEIGHT_INDEXES: Final = (".safetensors.index.", ".bin.index.")

# What Python, or the system, loads as machine code or as compiled Python.
PROGRAM_ENDINGS: Final = (".so", ".pyd", ".dll", ".dylib", ".exe", ".pyc", ".pyo")
# A loader that finds this file takes the base that it names, and an adapter, in the place of the folder's weights.
ADAPTER_CONFIG: Final = "adapter_config.json"

SOURCE_ENDINGS: Final = (".py", ".pyw")

_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def ascii_lower(name: str) -> str:
    """Return a name with the letters A to Z in lower case; other letters stay as they are."""
    return name.translate(_LOWER)


def is_safe_path(name: str) -> bool:
    """Tell whether ``name`` is a plain relative path on every system: joined to a folder, it stays inside."""
    if len(name.encode("utf-8", "surrogatepass")) > c.MAX_NAME_BYTES:
        return False
    if any(ord(char) < 32 or 127 <= ord(char) < 160 or char in '\\:*?"<>|' or _is_surrogate(char) for char in name):
        return False
    return all(map(_is_safe_part, name.split("/")))


def _is_safe_part(part: str) -> bool:
    if not part or part.startswith(".") or part.endswith((" ", ".")) or len(part.encode()) > MAX_PART_BYTES:
        return False
    return ascii_lower(part.split(".", maxsplit=1)[0].rstrip(" ")) not in DEVICES


def _is_surrogate(char: str) -> bool:
    return 0xD800 <= ord(char) < 0xE000


def is_weight_file(name: str) -> bool:
    """Tell whether a file, or a folder of it, would be taken for weights, or for an index of them, by its name."""
    lower = ascii_lower(name)
    if lower.endswith(".json") and any(index in lower.rpartition("/")[2] for index in _WEIGHT_INDEXES):
        return True
    return any(part.endswith(WEIGHT_ENDINGS) for part in lower.split("/"))


def lies_among_weights(name: str) -> bool:
    """Tell whether a folder of a file would be taken for weights by its name."""
    return any(part.endswith(WEIGHT_ENDINGS) for part in ascii_lower(name).split("/")[:-1])


def is_program(name: str) -> bool:
    """Tell whether a file of this name would be loaded as compiled code, or would make a loader take other weights."""
    last = ascii_lower(name).rpartition("/")[2]
    return last.endswith(PROGRAM_ENDINGS) or last == ADAPTER_CONFIG


def is_source(name: str) -> bool:
    """Tell whether a file of this name is Python code, which a Python that runs in its folder can take for a module."""
    return ascii_lower(name).endswith(SOURCE_ENDINGS)


def first_collision(names: Iterable[str]) -> tuple[str, str] | None:
    """Return a name, and another that cannot stand beside it: the same file on some system, or its folder.

    Returns:
        The first such pair in the order of ``names``; None if all can stand in one folder.
    """
    by_lower: dict[str, str] = {}
    listed = list(names)
    for name in listed:
        earlier = by_lower.setdefault(ascii_lower(name), name)
        if earlier is not name:
            return name, earlier
    for name in listed:
        parts = ascii_lower(name).split("/")
        for depth in range(1, len(parts)):
            other = by_lower.get("/".join(parts[:depth]))
            if other is not None:
                return name, other
    return None


def collisions(names: Iterable[str]) -> dict[str, str]:
    """Return the names that have to go so that the others can stand in one folder; of two, the later one goes.

    Returns:
        By each such name, the one beside which it cannot stand.
    """
    kept, gone = list(names), {}
    while (found := first_collision(kept)) is not None:
        gone[found[0]] = found[1]
        kept.remove(found[0])
    return gone
