"""Vectors of compressed sections (section 6)."""

from __future__ import annotations

import zstandard
from draft import CHUNK, Draft, frames
from vector_tools import stored, vector

from container_vectors.sections import empty_sections

PAYLOAD = bytes(range(200))


def cold(frame: bytes, table: list[int] | None = None, between: bytes = b"", raw: bytes = PAYLOAD) -> bytes:
    """Return a file whose only section is stored as this frame."""
    draft = Draft.of(stored({"a": raw}, "cold"))
    lengths = [len(frame)] if table is None else table
    draft.stored[0] = frame + between + b"".join(length.to_bytes(4, "little") for length in lengths)
    return draft.build()


def one_frame(data: bytes, *, content_size: bool = True, checksum: bool = False) -> bytes:
    """Return data as a zstd frame."""
    made = zstandard.ZstdCompressor(level=9, write_content_size=content_size, write_checksum=checksum).compress(data)
    return bytes(made)


@vector("ok", "three chunks: a buffer that fills one and more, one that goes on in the next, a short one")
def zstd_chunks() -> bytes:
    pattern = bytes(i * 7 % 251 for i in range(251)) * 2500
    return stored({"a": pattern[: CHUNK + 1000], "b": pattern[:300_000][::-1], "c": pattern[:77]}, "cold")


@vector("ok", "one chunk of 262144 bytes, which no empty one follows")
def zstd_full_chunk() -> bytes:
    return stored({"a": bytes(i % 256 for i in range(CHUNK))}, "cold")


@vector("ok", "a section of no raw bytes, compressed: it stores none")
def zstd_empty() -> bytes:
    return stored({"a": b""}, "cold")


@vector("ok", "a frame of raw blocks, larger than its content")
def zstd_raw_blocks() -> bytes:
    size = len(PAYLOAD)
    head = b"\x28\xb5\x2f\xfd" + bytes([0x20, size])  # one segment; the size takes a byte
    return cold(head + (size << 3 | 1).to_bytes(3, "little") + PAYLOAD)


@vector("invalid", "a zstd frame declares one byte more than its chunk has, and holds it", "declares")
def zstd_wrong_size() -> bytes:
    return cold(one_frame(PAYLOAD + b"\0"))


@vector("invalid", "a zstd frame does not declare its size", "declares")
def zstd_without_size() -> bytes:
    return cold(one_frame(PAYLOAD, content_size=False))


@vector("invalid", "a zstd frame has a checksum", "a dictionary or a checksum")
def zstd_checksum() -> bytes:
    return cold(one_frame(PAYLOAD, checksum=True))


@vector("invalid", "a zstd frame asks for a dictionary", "a dictionary or a checksum")
def zstd_dictionary() -> bytes:
    size = len(PAYLOAD)
    head = b"\x28\xb5\x2f\xfd" + bytes([0x21, 7, size])  # one segment; dictionary 7
    return cold(head + (size << 3 | 1).to_bytes(3, "little") + PAYLOAD)


@vector("invalid", "a chunk is no zstd frame", "not a zstd frame")
def zstd_no_frame() -> bytes:
    return cold(b"\x29\xb5\x2f\xfd" + one_frame(PAYLOAD)[4:])


@vector("invalid", "a skippable frame follows a zstd frame inside its length", "does not end where its chunk ends")
def zstd_something_follows() -> bytes:
    return cold(one_frame(PAYLOAD) + b"\x50\x2a\x4d\x18" + bytes(4))


@vector("invalid", "a zstd frame is a byte longer than the table says", "does not end where its chunk ends")
def zstd_cut_short() -> bytes:
    frame = one_frame(PAYLOAD)
    return cold(frame[:-1])


@vector("invalid", "three bytes stand between the last frame and the table", "the chunks take")
def zstd_table_too_little() -> bytes:
    return cold(one_frame(PAYLOAD), between=bytes(3))


@vector("invalid", "the table says that a frame reaches into the table", "the chunks take")
def zstd_table_too_much() -> bytes:
    frame = one_frame(PAYLOAD)
    return cold(frame, [len(frame) + 2])


@vector("invalid", "a section of 100 stored bytes says that it decodes to 2**38", "cannot hold the")
def zstd_too_little_stored() -> bytes:
    return Draft.of(cold(one_frame(PAYLOAD))).build(lambda index: index["sections"][0].update(raw_length=1 << 38))


@vector(
    "invalid", "the chunks of a compressed section are swapped, their lengths in the table as they were", "declares"
)
def zstd_chunks_swapped() -> bytes:
    draft = Draft.of(stored({"a": bytes(CHUNK) + PAYLOAD}, "cold"))
    first, second = one_frame(bytes(CHUNK)), one_frame(PAYLOAD)
    lengths = b"".join(len(frame).to_bytes(4, "little") for frame in (first, second))
    draft.stored[0] = second + first + lengths
    assert frames(bytes(draft.raw[0])) != draft.stored[0]
    return draft.build()


def raw_block(window: int = 0x88, dictionary: int | None = None) -> bytes:
    """Return a zstd frame of one raw block.

    Args:
        window: the window descriptor: 0x88 for 2^27 bytes, 0x89 for 2^24 more.
        dictionary: a dictionary ID of one byte.
    """
    size = len(PAYLOAD)
    head = b"\x28\xb5\x2f\xfd" + bytes([0x80 | (dictionary is not None), window])
    ids = b"" if dictionary is None else bytes([dictionary])
    return head + ids + size.to_bytes(4, "little") + (size << 3 | 1).to_bytes(3, "little") + PAYLOAD


@vector("ok", "a zstd frame with a window of 2^27 bytes, the largest")
def zstd_largest_window() -> bytes:
    return cold(raw_block())


@vector("ok", "a zstd frame with a dictionary ID of 0, which names none")
def zstd_no_dictionary() -> bytes:
    return cold(raw_block(dictionary=0))


@vector("invalid", "a zstd frame with a window above 2^27 bytes", "a window of 150,994,944 bytes")
def zstd_window() -> bytes:
    return cold(raw_block(window=0x89))


@vector("invalid", "a skippable frame stands in front of a chunk's frame, and the table counts both", "declares 0")
def zstd_skippable() -> bytes:
    return cold(b"\x50\x2a\x4d\x18\0\0\0\0" + raw_block())


@vector("invalid", "a frame of no content follows a chunk's frame, and the table counts both", "does not end where")
def zstd_two_frames() -> bytes:
    return cold(raw_block() + one_frame(b""))


@vector("invalid", "an attached file of no bytes, compressed, in a section of three bytes", "stores none, not 3")
def zstd_bytes_of_nothing() -> bytes:
    draft = Draft.of(empty_sections())
    draft.index["sections"][1]["codec"] = 1
    draft.stored[1] = bytes(3)
    return draft.build()
