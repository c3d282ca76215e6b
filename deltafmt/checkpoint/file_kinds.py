"""What a file is, told from its first bytes: its name may say something else, or nothing."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from typing import Final

# So many bytes tell every kind below.
HEAD_BYTES: Final = 4096

LFS_POINTER: Final = "a Git LFS pointer"
_LFS_MAGIC: Final = b"version https://git-lfs.github.com/spec/"
_MAGICS: Final = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "compressed data (gzip)"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x89DLT", "a delta file"),
    (b"BZh", "compressed data (bzip2)"),
    (b"\xfd7zXZ", "compressed data (xz)"),
    (b"\x28\xb5\x2f\xfd", "compressed data (zstd)"),
    (b"\x04\x22\x4d\x18", "compressed data (lz4)"),
    (b"\x7fELF", "a program"),
)
# A pickle of protocol 0 or 1 has no magic; it starts with one of these operations.
_OLD_PICKLE: Final = re.compile(rb"\(dp|\(lp|\(i[a-z_]|c[a-zA-Z_][\w.]*\n|\]q|\}q|\(\]q|\(\}q")

# What holds weights, or objects that only Python restores. Such files never travel beside a delta.
WEIGHT_KINDS: Final = frozenset(
    (
        *("a pickle", "a PyTorch file", "an HDF5 file", "a numpy array", "a GGUF file", "a delta file"),
        *("a safetensors file", "a tar archive"),
    )
)


def kind_of(head: bytes, whole: bool = False) -> str:
    """Return in words what a file is, or an empty string if its bytes do not tell.

    Args:
        head: the first bytes of the file, at most HEAD_BYTES are looked at.
        whole: True if ``head`` is the whole file, which old pickles need to be known.
    """
    if head.startswith(_LFS_MAGIC):
        return LFS_POINTER
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    start = head[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file"
    for magic, words in _MAGICS:
        if head.startswith(magic):
            # The first member of what torch.save writes is NAME/data.pkl.
            return "a PyTorch file" if magic[:2] == b"PK" and b"data.pkl" in head[:1024] else words
    return "a pickle" if whole and _is_old_pickle(head) else ""


def is_torch_archive(data: bytes) -> bool:
    """Tell whether a zip archive, which is given whole, holds a pickle as torch.save writes it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.endswith((".pkl", ".pickle")) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError):
        return False


def lfs_size(head: bytes) -> int | None:
    """Return the size of the file that a Git LFS pointer stands for, if the pointer says it."""
    found = re.search(rb"^size ([0-9]{1,18})\s*$", head[:1024], re.MULTILINE)
    return int(found[1]) if found else None


def instead_of_weights(head: bytes) -> str:
    """Return what stands in the place of a safetensors file and what to do, or an empty string if that is not known."""
    kind = kind_of(head[:HEAD_BYTES])
    if kind == LFS_POINTER:
        size = lfs_size(head)
        return f"this is {kind}, not the file{f' of {size:,} bytes' if size else ''}; git lfs pull brings the file"
    if kind == "an HTML page":
        return "this is an HTML page, not weights; the download was refused, or needs a login"
    if not head:
        return "the file is empty; the download has not begun, or failed"
    if kind in WEIGHT_KINDS and kind not in ("a safetensors file", "a delta file"):
        return f"this is {kind}, not a safetensors file; convert it to safetensors"
    return ""


def _is_old_pickle(data: bytes) -> bool:
    if not _OLD_PICKLE.match(data) or not data.rstrip().endswith(b"."):
        return False
    try:
        for _ in pickletools.genops(data):
            pass
    except Exception:  # noqa: BLE001 - genops raises whatever the bytes lead it to; then they are no pickle
        return False
    return True
