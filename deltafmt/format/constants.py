"""Constants of the container (spec/deltafmt-v1.md, sections 3 to 8)."""

from __future__ import annotations

from typing import Final

FORMAT_VERSION: Final = 1

# Section 4: the header. The first byte has its high bit set, and CR LF and SUB follow. A transfer in text mode
# therefore damages the magic, and the damage is seen at once.
HEADER_MAGIC: Final = b"\x89DLT\r\n\x1a\n"
HEADER_SIZE: Final = 64

# Section 8: the trailer.
TRAILER_MAGIC: Final = b"DLTEND\r\n"
TRAILER_SIZE: Final = 128
# What a reader of a remote file reads at once: the trailer, and the index of most files.
TAIL_BYTES: Final = 256 * 1024

# Section 4.4: incompatible features, a bit each.
FEATURE_PARTS: Final = 1 << 0  # a base tensor is made of parts of base tensors (section 7.4)
FEATURE_LEADING: Final = 1 << 1  # the rows of a delta are those of fewer dimensions than all but the last (section 7.4)
FEATURE_SCALED: Final = 1 << 2  # a base tensor is kept as 8-bit floats with scales (section 7.8)
FEATURE_EXACT: Final = 1 << 3  # tensors, or files, are restored bit for bit (sections 7.10 and 17)
FEATURE_PROGRESSIVE: Final = 1 << 4  # a served part, and exact parts behind it (section 17.7)
FEATURE_PARENT: Final = 1 << 5  # the base is what another delta file gives (section 18)
KNOWN_FEATURES: Final = (1 << 6) - 1

# Section 5: sections and buffers.
SECTION_ALIGNMENT: Final = 4096
BUFFER_ALIGNMENT: Final = 256

# A section kind says what a section holds. It is not the kind of a term ("nm", "lowbit", ...).
SECTION_KIND_TENSORS: Final = 1
SECTION_KIND_ATTACHMENTS: Final = 2
SECTION_KIND_EXACT: Final = 3
SECTION_KIND_SERVED: Final = 4
SECTION_KINDS: Final = (
    SECTION_KIND_TENSORS,
    SECTION_KIND_ATTACHMENTS,
    SECTION_KIND_EXACT,
    SECTION_KIND_SERVED,
)

CODEC_STORED: Final = 0
CODEC_ZSTD: Final = 1
CODECS: Final = (CODEC_STORED, CODEC_ZSTD)
ZSTD_CHUNK: Final = 256 * 1024
ZSTD_MAX_WINDOW: Final = 1 << 27
ZSTD_MIN_FRAME: Final = 9  # bytes of the shortest frame: magic, a header with a size, one empty block

PROFILES: Final = ("hot", "cold")

# The key of a file's metadata that names the base, for messages.
METADATA_BASE: Final = "base"

# Section 9: limits, checked before anything is allocated.
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
MAX_TENSORS: Final = 1_000_000
MAX_RANK: Final = 8
MAX_NAME_BYTES: Final = 1024
MAX_ELEMENTS: Final = 2**48
MAX_RAW_BYTES: Final = 2**40

# Bits per element of every dtype that a safetensors file can name.
DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}

# The dtypes of tensors that can have a delta (computed in float32); a tensor of another dtype is stored whole.
DELTA_DTYPES: Final = ("BF16", "F16", "F32")

# Section 7.8: the dtypes of 8-bit floats that are read with scales, and of the scales. A scale of dtype U8 is an
# F8_E8M0: some savers have no other dtype for it.
CODE_DTYPES: Final = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES: Final = ("BF16", "F16", "F32", "F8_E8M0", "U8")


def is_whole(dtype: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor takes whole bytes: elements of fewer than 8 bits may not fill the last one."""
    return element_count(shape) * DTYPE_BITS[dtype] % 8 == 0


def buffer_alignment(kind: int) -> int:
    """Return the alignment of buffers in a section of a kind; exact tensors are decoded, and need none (5.7)."""
    return 1 if kind == SECTION_KIND_EXACT else BUFFER_ALIGNMENT


def align(offset: int, alignment: int) -> int:
    """Return the smallest multiple of ``alignment`` that is at least ``offset``."""
    return -(-offset // alignment) * alignment


def element_count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of ``shape`` (1 for a 0-d tensor)."""
    count = 1
    for size in shape:
        count *= size
    return count


def is_bounded(shape: tuple[int, ...]) -> bool:
    """Tell whether a shape has at most MAX_ELEMENTS elements; sizes of 0 count as 1 (section 9)."""
    count = 1
    for size in shape:
        count *= size or 1
    return count <= MAX_ELEMENTS


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the number of bytes of a tensor; elements of under 8 bits are packed without gaps."""
    return -(-element_count(shape) * DTYPE_BITS[dtype] // 8)


def row_count(shape: tuple[int, ...], leading: int | None = None) -> int:
    """Return the number of rows: the product of the leading dimensions, of all but the last if not given."""
    return element_count(shape[:-1] if leading is None else shape[:leading])


def column_count(shape: tuple[int, ...], leading: int | None = None) -> int:
    """Return the number of columns: the product of the other dimensions, the last if not given (1 for a 0-d tensor)."""
    return element_count(shape[-1:] if leading is None else shape[leading:])
