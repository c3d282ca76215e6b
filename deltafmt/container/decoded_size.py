"""How much memory msgpack takes once it is decoded, counted before it is (spec/deltafmt-v1.md, section 9).

One byte can be an empty map, which takes 64 bytes as a Python object. A large index is therefore counted first, value
by value, without making one. A small one is bounded by its length.
"""

from __future__ import annotations

import struct
from typing import Final

from deltafmt.errors import InvalidFileError, Remedy

# No byte of msgpack becomes more bytes of Python objects: a map of one pair of short strings is the worst.
WORST: Final = 128
# An index of sections and layouts takes about 12 times its bytes, one of short strings 30 times.
SLACK: Final = 16 << 20
PER_BYTE: Final = 24

MAP, PAIR, LIST, ITEM, STRING, NUMBER = 64, 72, 56, 8, 50, 32

_LENGTHS = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}
# By the first byte: the bytes of the length that follow; a string or bytes, a list, or a map.
_TEXTS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
# Numbers, by the bytes that follow.
_NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}


def check_decoded_size(data: bytes | memoryview, what: str, max_memory: int | None = None) -> None:
    """Refuse msgpack that would take much more memory than an index needs.

    Args:
        data: the encoded bytes.
        what: the name of the data in messages.
        max_memory: the limit in bytes; None for 16 MiB and 24 bytes for each byte of ``data``.

    Raises:
        InvalidFileError: the objects would take more.
    """
    default = SLACK + PER_BYTE * len(data)
    limit = default if max_memory is None else max_memory
    if WORST * len(data) <= limit:
        return
    if decoded_size(data, limit) > limit:
        message = f"{what} of {len(data):,} bytes takes more than {limit:,} bytes of memory, which is max_memory"
        raise InvalidFileError(message, Remedy("limits", "max-memory"))


def decoded_size(data: bytes | memoryview, limit: int) -> int:
    """Return about how many bytes the objects of msgpack take; stop counting above ``limit``.

    Data that is not msgpack is counted up to where it breaks; the decoder says what is wrong with it.
    """
    total = position = 0
    end = len(data)
    while position < end and total <= limit:
        first = data[position]
        position += 1
        if first < 0x80 or first >= 0xE0:  # a small number
            total += NUMBER
        elif first < 0x90:
            total += MAP + PAIR * (first & 15)
        elif first < 0xA0:
            total += LIST + ITEM * (first & 15)
        elif first < 0xC0:
            total += STRING + (first & 31)
            position += first & 31
        elif first in _NUMBERS:
            total += NUMBER
            position += _NUMBERS[first]
        elif first in _TEXTS or first in _LISTS or first in _MAPS:
            width = _TEXTS.get(first) or _LISTS.get(first) or _MAPS[first]
            if position + width > end:
                break
            (length,) = _LENGTHS[width].unpack_from(data, position)
            position += width
            # More members than bytes follow cannot be: the decoder refuses them.
            members = min(length, end - position)
            if first in _TEXTS:
                total += STRING + members
                position += length
            else:
                total += LIST + ITEM * members if first in _LISTS else MAP + PAIR * members
        elif first not in (0xC0, 0xC2, 0xC3):
            break  # an extension, or nothing that msgpack has: refused by the decoder
    return total
