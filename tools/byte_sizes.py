"""Sizes in bytes as the command line takes them."""

from __future__ import annotations

import re

from deltafmt.errors import UsageError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as ``5GB``, ``200MiB`` or ``1048576`` names.

    Raises:
        UsageError: the text is not a size, or the size is zero.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if not size:
        raise UsageError(f"{text!r} is not a size such as 5GB or 200MiB")
    return size
