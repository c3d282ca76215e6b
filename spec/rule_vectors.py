"""Vectors of single rules of headers, names, sections and entries, good and bad; everything else in them is right."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import xxhash
import zstandard
from blake3 import blake3
from vector_tools import Maker, change, encode, join, one_attachment, parts, simple, vector

from deltafmt.container.content import content_id
from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry
from deltafmt.index.scaled import ScaledRef, StoredRef
from deltafmt.terms.nm.layout import NMLayout


def several(cases: Mapping[str, tuple[str, Maker]], expect: str, comment: str, error: str = "") -> None:
    """Register vectors that differ in little: by name, what each comment ends with, and its maker."""
    for name, (what, make) in cases.items():
        make.__name__ = name
        vector(expect, comment + what, error)(make)


# Section 4: the order of checks decides between "invalid" and "unsupported".


def with_header(version: int = 1, size: int = 64, features: int = 0, reserved: int = 0, flipped: int = 0) -> bytes:
    """Return the usual file with another header, sealed again."""
    head = struct.pack("<8sIIQQ24s", c.HEADER_MAGIC, version, size, features, 0, bytes([reserved]) + bytes(23))
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head) ^ flipped)
    body, index = parts(simple())
    return join(head + body[c.HEADER_SIZE :], encode(index), simple()[-104:-72])


several(
    {
        "newer_version_of_another_size": ("and has a header of 128 bytes", lambda: with_header(2, size=128)),
        "newer_version_with_reserved": ("and uses reserved bytes", lambda: with_header(2, reserved=1)),
        "newer_version_with_bits": ("and has incompatible bit 5", lambda: with_header(2, features=32)),
    },
    "unsupported",
    "the file asks for a reader of version 2, ",
    "version 2",
)


@vector("unsupported", "incompatible bit 63 is set, and reserved bytes are used", "bit 63")
def incompatible_bit_with_reserved() -> bytes:
    return with_header(features=1 << 63, reserved=1)


@vector("invalid", "the file asks for version 2, and the header's checksum is wrong", "checksum")
def newer_version_damaged() -> bytes:
    return with_header(2, flipped=1)


@vector("invalid", "the file asks for version 0, and incompatible bit 5 is set", "version 0")
def version_0() -> bytes:
    return with_header(0, features=32)


@vector("invalid", "the header says that it has 128 bytes", "reserved bytes of the header")
def header_size() -> bytes:
    return with_header(size=128)


@vector("invalid", "a reserved byte of the header is set", "reserved bytes of the header")
def header_reserved() -> bytes:
    return with_header(reserved=1)


# Sections 5 and 6.


def replaced(writer: ContainerWriter, name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    """Write a tensor that replaces the base's."""
    return TensorEntry(name, "replace", dtype, shape, digest=blake3(data).digest(), data=writer.add(data))


def file_of(*tensors: tuple[str, bytes, str, tuple[int, ...]], profile: str = "hot", **rest: Any) -> bytes:
    """Return a file of tensors that replace the base's: names, bytes, dtypes, shapes."""
    writer = ContainerWriter(out := io.BytesIO(), profile)
    writer.finish([replaced(writer, *tensor) for tensor in tensors], **rest)
    return out.getvalue()


@vector("ok", "a tensor without elements behind one of 300 bytes: its buffer lies at 512, where the section ends")
def empty_last_buffer() -> bytes:
    return file_of(("a", bytes(range(150)) * 2, "U8", (300,)), ("b", b"", "F32", (0, 7)))


@vector("ok", "sections of no bytes: a tensor without elements, an attached file without bytes")
def empty_sections() -> bytes:
    writer = ContainerWriter(out := io.BytesIO())
    entries = [replaced(writer, "b", b"", "F32", (0, 7))]
    writer.finish(entries, attachments={"notes.txt": writer.attach(b"")})
    return out.getvalue()


@vector("invalid", "a buffer of length 0 lies behind the end of its section", "leave section 0")
def empty_buffer_outside() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["b"]["data"][1] = 768

    return change(empty_last_buffer(), edit)


@vector("invalid", "a buffer of length 0, the last one, lies 256 bytes too far", "768, where 512 is next")
def empty_buffer_too_far() -> bytes:
    body, index = parts(empty_last_buffer())
    index["tensors"]["b"]["data"][1] = 768
    index["sections"][0].update(length=768, raw_length=768, checksum=xxhash.xxh3_128_digest(body[4096:][:768]))
    return join(body, encode(index), empty_last_buffer()[-104:-72])


@vector("invalid", "a stored section of 512 bytes, of which 300 are raw, it says", "equal lengths")
def stored_longer_than_raw() -> bytes:
    data = file_of(("a", bytes(300), "U8", (300,)))
    body, index = parts(data)
    index["sections"][0].update(length=512, checksum=xxhash.xxh3_128_digest(bytes(512)))
    return join(body, encode(index), data[-104:-72])


def with_stored(stored: bytes, raw: bytes) -> bytes:
    """Return a cold file of one tensor whose section, of one chunk, has these stored bytes."""
    data = file_of(("w", raw, "U8", (len(raw),)), profile="cold")
    body, index = parts(data)
    index["sections"][0].update(length=len(stored), checksum=xxhash.xxh3_128_digest(stored))
    body = body[: c.SECTION_ALIGNMENT] + stored + bytes(-len(stored) % c.SECTION_ALIGNMENT)
    return join(body, encode(index), data[-104:-72])


def with_frame(frame_bytes: bytes, raw: bytes) -> bytes:
    """Return a cold file of one tensor whose bytes are a zstd frame."""
    return with_stored(frame_bytes + struct.pack("<I", len(frame_bytes)), raw)


RAW = bytes(range(100))


def zstd_frame(window: int = 0x88, dictionary: int | None = None, checksum: bytes = b"") -> bytes:
    """Return a zstd frame of one raw block that holds RAW.

    Args:
        window: the window descriptor: 0x88 for 2^27 bytes, 0x89 for 2^24 more.
        dictionary: a dictionary ID of one byte.
        checksum: four bytes; the frame then announces a checksum.
    """
    flags = 0x80 | (dictionary is not None) | 4 * bool(checksum)
    ids = b"" if dictionary is None else bytes([dictionary])
    head = struct.pack("<IBB", 0xFD2FB528, flags, window) + ids + struct.pack("<I", len(RAW))
    return head + (len(RAW) << 3 | 1).to_bytes(3, "little") + RAW + checksum


@vector("ok", "a zstd frame with a window of 2^27 bytes, the largest")
def zstd_largest_window() -> bytes:
    return with_frame(zstd_frame(), RAW)


@vector("ok", "a zstd frame with a dictionary ID of 0, which names none")
def zstd_no_dictionary() -> bytes:
    return with_frame(zstd_frame(dictionary=0), RAW)


@vector("invalid", "a zstd frame with a window above 2^27 bytes", "a window of 150,994,944 bytes")
def zstd_window() -> bytes:
    return with_frame(zstd_frame(window=0x89), RAW)


@vector("invalid", "a zstd frame names a dictionary, which it does not need", "dictionary or a checksum")
def zstd_dictionary() -> bytes:
    return with_frame(zstd_frame(dictionary=7), RAW)


@vector("invalid", "a zstd frame has a checksum, which is right", "dictionary or a checksum")
def zstd_checksum() -> bytes:
    # A frame's checksum is the lower half of the XXH64 of its content.
    checksum = xxhash.xxh64_intdigest(RAW) & 0xFFFFFFFF
    return with_frame(zstd_frame(checksum=struct.pack("<I", checksum)), RAW)


@vector("invalid", "a zstd frame does not say how long its content is", "declares")
def zstd_without_size() -> bytes:
    return with_frame(zstandard.ZstdCompressor(level=3, write_content_size=False).compress(RAW), RAW)


@vector("invalid", "a skippable frame stands in front of a chunk's frame, and the table counts both", "zstd")
def zstd_skippable() -> bytes:
    return with_frame(b"\x50\x2a\x4d\x18\0\0\0\0" + zstd_frame(), RAW)


@vector("invalid", "a frame of no content follows a chunk's frame, and the table counts both", "does not end where")
def zstd_two_frames() -> bytes:
    return with_frame(zstd_frame() + zstandard.ZstdCompressor().compress(b""), RAW)


# Section 7.9: names of attachments.

_DEVICE = {
    "attachment_device": ("NUL", "NUL"),
    "attachment_device_in_lower_case": ("com7.tar.gz", "com7.tar.gz"),
    "attachment_device_with_spaces": ("two spaces before its full stop", "aux  .json"),
    "attachment_device_as_folder": ("LPT1, a folder", "LPT1/x.json"),
    "attachment_device_superscript": ("COM and a superscript 2", "COM\u00b2.txt"),
    "attachment_device_console": ("the console's input", "conin$"),
}
_PATH = {
    "attachment_backslash": ("a backslash", "a\\b"),
    "attachment_absolute": ("a root", "/etc/x"),
    "attachment_trailing_dot": ("a full stop at the end", "a."),
    "attachment_trailing_space": ("a space at the end of a folder", "a /b"),
    "attachment_control": ("a line feed", "a\nb"),
    "attachment_c1_control": ("U+0085", "a\u0085b"),
    "attachment_long_part": ("a part of 256 bytes", "\u00e9" * 128),
    "attachment_long": ("1,025 bytes", "/".join(["x" * 204] * 5) + "x"),
    "attachment_without_name": ("no byte", ""),
}
_WEIGHTS = {
    "attachment_of_weights_in_capitals": ("model.SAFETENSORS", "model.SAFETENSORS"),
    "attachment_folder_of_weights": ("a folder model.bin", "model.bin/x.json"),
    "attachment_index_of_weights": (
        "an index of weights of a variant",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
}
_PROGRAMS = {
    "attachment_program": ("a library", "json.cpython-311-x86_64-linux-gnu.so"),
    "attachment_program_in_capitals": ("X.PYD", "lib/X.PYD"),
    "attachment_adapter": ("the configuration of an adapter", "Adapter_Config.json"),
}
for _cases, _error in (
    (_DEVICE, "not a plain relative path"),
    (_PATH, "not a plain relative path"),
    (_WEIGHTS, "a name for weights"),
    (_PROGRAMS, "a name for a program"),
):
    several(
        {name: (what, lambda path=path: one_attachment(path)) for name, (what, path) in _cases.items()},
        "invalid",
        "the name of an attachment: ",
        _error,
    )


def attached(*names: str, **rest: Any) -> bytes:
    """Return a file with attachments of these names and no tensor."""
    writer = ContainerWriter(out := io.BytesIO())
    writer.finish([], attachments={name: writer.attach(name.encode()) for name in names}, **rest)
    return out.getvalue()


@vector("ok", "names of attachments that are allowed although they come close to what is not")
def attachments_allowed() -> bytes:
    close = ("CON\u00a0.txt", "com10.txt", "com.json", "console/nul_.json", "lpt0", "model.bin.md", "so", "pyd.txt")
    parts_of = ("A/x.json", "a/y.json", "adapter_config.json.txt", "\u00e9" * 127, "/".join(["x" * 204] * 5))
    # Letters other than A to Z have no lower case here.
    return attached(*close, *parts_of, "\u00c9.txt", "\u00e9.txt", "modeling_x.py")


@vector("invalid", "two attachments whose names differ in the case of a letter", "stands in the place of")
def attachments_equal() -> bytes:
    return attached("readme.md", "README.md")


@vector("invalid", "an attachment a, and one in a folder A", "stands in the place of")
def attachment_as_folder() -> bytes:
    return attached("A/b.json", "a")


@vector("invalid", "the bytes of an attachment are not those of its digest", "another digest")
def attachment_digest() -> bytes:
    data = attached("a.txt")
    body, index = parts(data)
    index["attachments"]["a.txt"]["digest"] = blake3(b"other").digest()
    with io.BytesIO() as out:
        writer = ContainerWriter(out)
        wrong = writer.attach(b"a.txt")
    identity = content_id([], [], {"a.txt": type(wrong)(wrong.data, blake3(b"other").digest())}, {})
    return join(body, encode(index), identity)


# Sections 7.2, 7.4 and 9: names and entries.


def of_base(name: str, dtype: str = "U8", shape: tuple[int, ...] = (3,), **rest: Any) -> TensorEntry:
    """Return the entry of a tensor that is the base's."""
    return TensorEntry(name, "same", dtype, shape, BaseRef(bytes(32), dtype, shape, **rest))


def unchanged(*entries: TensorEntry, features: int = 0, **rest: Any) -> bytes:
    """Return a file of tensors that are the base's."""
    ContainerWriter(out := io.BytesIO(), features=features).finish(entries, **rest)
    return out.getvalue()


@vector("ok", "the longest names, of 1,024 bytes; a removed tensor; a layout that no term uses")
def longest_names() -> bytes:
    longest = "\u00e9" * 512
    writer = ContainerWriter(out := io.BytesIO())
    writer.layout_number(NMLayout(1, 8, 4))
    writer.finish([of_base(longest)], removed=[longest[:-1] + "ab"], metadata={"": "", "x" * 2000: "y" * 2000})
    return out.getvalue()


@vector("ok", "names of tensors that come close to that of a safetensors file's metadata")
def metadata_names() -> bytes:
    return unchanged(of_base("__metadata__/w"), of_base("x__metadata__"), of_base("__metadata__."))


several(
    {
        "name_of_no_byte": ("no byte", lambda: unchanged(of_base(""))),
        "name_of_1025_bytes": ("1,025 bytes", lambda: unchanged(of_base("\u00e9" * 512 + "a"))),
    },
    "invalid",
    "the name of a tensor has ",
    "1 to 1024 bytes",
)
several(
    {
        "removed_of_no_byte": ("no byte", lambda: unchanged(of_base("w"), removed=[""])),
        "removed_of_1025_bytes": ("1,025 bytes", lambda: unchanged(of_base("w"), removed=["x" * 1025])),
    },
    "invalid",
    "the name of a removed tensor has ",
    "1 to 1024 bytes",
)
several(
    {
        "name_of_metadata": ("__metadata__", lambda: unchanged(of_base("__metadata__"))),
        "name_of_metadata_in_folder": ("unet/__metadata__", lambda: unchanged(of_base("unet/__metadata__"))),
    },
    "invalid",
    "a tensor is called ",
    "keeps no tensor under this name",
)


@vector("invalid", "a tensor is in the file, and removed", "distinct from the tensors")
def removed_and_there() -> bytes:
    return unchanged(of_base("w"), removed=["w"])


@vector("invalid", "a scaled tensor's name has no byte", "1 to 1024 bytes")
def scaled_name_of_no_byte() -> bytes:
    scaled = {"": ScaledRef((9,), StoredRef(bytes(32), "F8_E5M2", (9,)))}
    return unchanged(of_base("w"), features=c.FEATURE_SCALED, scaled=scaled)


@vector("invalid", "a layout stands in the table twice", "twice")
def layout_twice() -> bytes:
    return change(simple(), lambda index: index["layouts"].append(index["layouts"][0]))


@vector("ok", "tensors of 4-bit and 6-bit floats that take whole bytes")
def whole_bytes() -> bytes:
    return file_of(("a", b"\x12\x34\x56", "F4", (2, 3)), ("b", b"abc", "F6_E2M3", (4,)), ("c", b"", "F6_E3M2", (0,)))


@vector("invalid", "a tensor of three 4-bit floats, in two bytes", "does not take whole bytes")
def half_a_byte() -> bytes:
    return file_of(("a", b"\x12\x03", "F4", (3,)))


@vector("invalid", "a tensor of the base of six 6-bit floats", "does not take whole bytes")
def half_a_byte_of_base() -> bytes:
    return unchanged(of_base("a", "F6_E2M3", (6,)))


@vector("ok", "parts of no elements; a part that ends with the last element that a tensor can have; feature bit 0")
def parts_at_the_ends() -> bytes:
    last = (BasePart("huge", 2**48 - 3, 3), BasePart("old", 7, 0))
    nothing = (BasePart("gone", 2**48, 0),)
    entries = of_base("a", parts=last), of_base("b", shape=(0, 4), parts=nothing)
    return unchanged(*entries, features=c.FEATURE_PARTS)


@vector("invalid", "a part ends behind the last element that a tensor can have", "is not an integer from 0")
def parts_beyond() -> bytes:
    return unchanged(of_base("a", parts=(BasePart("huge", 2**48 - 2, 3),)), features=c.FEATURE_PARTS)


@vector("invalid", "a part's name has no byte", "1 to 1024 bytes")
def parts_without_name() -> bytes:
    return unchanged(of_base("a", parts=(BasePart("", 0, 3),)), features=c.FEATURE_PARTS)


# Section 7.7.


@vector("ok", "names of weight files")
def weight_names() -> bytes:
    names = {"weights": "other.safetensors", "weights/unet": "model.fp16.safetensors", "weightsx": "/"}
    return unchanged(of_base("w"), of_base("unet/w"), metadata=names)


several(
    {
        "weight_name_outside": ("a folder above", lambda: attached(metadata={"weights/..": "x.safetensors"})),
        "weight_name_of_folder": ("a folder in it", lambda: attached(metadata={"weights": "a/x.safetensors"})),
        "weight_name_alone": ("an ending alone", lambda: attached(metadata={"weights": ".safetensors"})),
        "weight_name_of_pickle": ("a pickle", lambda: attached(metadata={"weights": "model.bin"})),
        "weight_name_device": ("a device", lambda: attached(metadata={"weights/nul": "x.safetensors"})),
    },
    "invalid",
    "the name of a weight file: ",
    "is not the name of a weight file",
)
