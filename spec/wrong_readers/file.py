"""Wrong readers of headers, trailers, sections, chunks and limits (sections 3 to 6, 8 and 9)."""

from __future__ import annotations

from .wrong import Constant, patched, wrong

patched(
    "container.frame",
    (
        "the header's checksum is taken of 48 bytes",
        "attachment-empty",
        "xxh3_64_intdigest(data[:56])",
        "xxh3_64_intdigest(data[:48])",
    ),
    (
        "the header's checksum is XXH64",
        "attachment-empty",
        "xxh3_64_intdigest(data[:56])",
        "xxh64_intdigest(data[:56])",
    ),
    (
        "only four bytes of the magic are compared",
        "magic-last-byte",
        "startswith(c.HEADER_MAGIC)",
        "startswith(c.HEADER_MAGIC[:4])",
    ),
    (
        "only six bytes of the trailer's magic are compared",
        "trailer-magic-first-byte",
        "endswith(c.TRAILER_MAGIC)",
        "endswith(b'\\r\\n')",
    ),
    (
        "only the lower 32 feature bits are looked at",
        "incompatible-bit-63",
        "incompatible & ~c.K",
        "incompatible & 0xFFFFFFFF & ~c.K",
    ),
    (
        "compatible bits are taken for incompatible ones",
        "compatible-bit",
        "size, incompatible, _,",
        "size, _, incompatible,",
    ),
    ("version 1 is called too new", "add-0d", "version > c.FORMAT_VERSION", "version >= c.FORMAT_VERSION"),
    ("version 2 is read", "newer-version", "version > c.FORMAT_VERSION", "version > 2"),
    (
        "only the first reserved byte of the header is looked at",
        "header-reserved-last",
        "or any(reserved):",
        "or reserved[0]:",
    ),
    (
        "only the last reserved byte of the trailer is looked at",
        "trailer-reserved-first",
        "    if any(reserved):",
        "    if reserved[-1]:",
    ),
    (
        "the file's length may be less than the trailer says",
        "trailer-file-length",
        "total != file_length",
        "total < file_length",
    ),
    (
        "the index may not start at 4096",
        "attachment-empty",
        "offset < c.SECTION_ALIGNMENT",
        "offset <= c.SECTION_ALIGNMENT",
    ),
    ("the seal leaves the header out", "attachment-empty", "hasher = blake3(header)", "hasher = blake3()"),
    ("the seal leaves the index out", "attachment-empty", "    hasher.update(index)\n", ""),
    ("the seal leaves the trailer out", "attachment-empty", "hasher.update(covered)", "hasher.update(b'')"),
    (
        "the seal covers 56 bytes of the trailer",
        "attachment-empty",
        "hasher.update(covered)",
        "hasher.update(covered[:56])",
    ),
    ("the seal is compared in its first 16 bytes", "seal", ") != trailer.digest:", ")[:16] != trailer.digest[:16]:"),
)
wrong("feature bit 9 is taken for known", "incompatible-bit", Constant("format.constants.KNOWN_FEATURES", 7 | 1 << 9))
wrong(
    "feature bit 63 is taken for known", "incompatible-bit-63", Constant("format.constants.KNOWN_FEATURES", 7 | 1 << 63)
)
wrong("feature bit 0 is taken for unknown", "empty-name-part", Constant("format.constants.KNOWN_FEATURES", 6))
wrong("feature bit 2 is taken for unknown", "scaled-block-of-one", Constant("format.constants.KNOWN_FEATURES", 3))
wrong("leading dimensions need bit 0", "leading-dimensions", Constant("format.constants.FEATURE_LEADING", 1))
wrong("scaled tensors need bit 1", "scaled-rows", Constant("format.constants.FEATURE_SCALED", 2))

patched(
    "container.reader",
    ("the padding after a section is not read", "section-padding", "-end % c.SECTION_ALIGNMENT))", "0))"),
    (
        "the first byte of the padding is not read",
        "attachment-empty",
        "self._read(end, -end % c.S",
        "self._read(end + 1, (-end - 1) % c.S",
    ),
    (
        "checksums are compared in their first 8 bytes",
        "checksum-last-byte",
        "if found != section.checksum:",
        "if found[:8] != section.checksum[:8]:",
    ),
    (
        "checksums are little-endian",
        "attachment-empty",
        "if found != section.checksum:",
        "if found[::-1] != section.checksum:",
    ),
    (
        "only one half of the padding after the header is read",
        "header-padding",
        "if bytes(head[c.HEADER_SIZE :]) != bytes(len(head) - c.HEADER_SIZE):",
        "if any(head[c.HEADER_SIZE : 512]):",
    ),
)
patched(
    "format.constants",
    (
        "the next multiple is always above",
        "attachment-empty",
        "return -(-offset // alignment) * alignment",
        "return (offset // alignment + 1) * alignment",
    ),
    (
        "positions are rounded down",
        "attachment-names",
        "return -(-offset // alignment) * alignment",
        "return offset // alignment * alignment",
    ),
    (
        "bits of an element are rounded up to bytes",
        "every-dtype",
        "element_count(shape) * DTYPE_BITS[dtype] // 8)",
        "element_count(shape) * -(-DTYPE_BITS[dtype] // 8))",
    ),
    (
        "rows are the first dimension",
        "add-1d",
        "element_count(shape[:-1] if leading is None",
        "element_count(shape[:1] if leading is None",
    ),
    (
        "columns are all dimensions but the first",
        "add-1d",
        "element_count(shape[-1:] if leading is None",
        "element_count(shape[1:] if leading is None",
    ),
    ("leading dimensions are one more", "leading-dimensions", "else shape[:leading])", "else shape[: leading + 1])"),
    ("sizes of 0 make a bound shape", "endless-shape", "count *= size or 1", "count *= size"),
    (
        "elements are counted in 32 bits",
        "endless-shape",
        "return count <= MAX_ELEMENTS",
        "return count % 2**32 <= MAX_ELEMENTS",
    ),
    (
        "elements are counted in 64 bits",
        "endless-shape",
        "return count <= MAX_ELEMENTS",
        "return count % 2**64 <= MAX_ELEMENTS",
    ),
    ("2**48 elements are too many", "most-elements", "return count <= MAX_ELEMENTS", "return count < MAX_ELEMENTS"),
)
wrong("chunks have 2**17 bytes", "zstd-chunks", Constant("format.constants.ZSTD_CHUNK", 1 << 17))
wrong("chunks have 2**20 bytes", "zstd-chunks", Constant("format.constants.ZSTD_CHUNK", 1 << 20))
wrong("a tensor may have nine dimensions", "nine-dimensions", Constant("format.constants.MAX_RANK", 9))
wrong("a tensor may have seven dimensions", "eight-dimensions", Constant("format.constants.MAX_RANK", 7))
wrong("names may have 1023 bytes", "attachments-allowed", Constant("format.constants.MAX_NAME_BYTES", 1023))
wrong("names may have 1025 bytes", "attachment-long-name", Constant("format.constants.MAX_NAME_BYTES", 1025))
wrong("buffers start at multiples of 64", "attachment-names", Constant("format.constants.BUFFER_ALIGNMENT", 64))
wrong("buffers start at multiples of 512", "attachment-names", Constant("format.constants.BUFFER_ALIGNMENT", 512))
wrong("sections start at multiples of 512", "attachment-empty", Constant("format.constants.SECTION_ALIGNMENT", 512))
wrong("only F32 tensors have deltas", "cold-but-stored", Constant("format.constants.DELTA_DTYPES", ("F32",)))
wrong("F16 tensors have no deltas", "actions-with-base", Constant("format.constants.DELTA_DTYPES", ("BF16", "F32")))
wrong("F64 tensors have deltas", "add-f64", Constant("format.constants.DELTA_DTYPES", ("BF16", "F16", "F32", "F64")))
wrong("there is no section of codec 1", "attachment-empty", Constant("format.constants.CODECS", (0,)))
wrong("17 terms are allowed", "terms-17", Constant("index.entries.MAX_TERMS", 17))
wrong("15 terms are allowed", "terms-16", Constant("index.entries.MAX_TERMS", 15))
wrong("a part of a path may have 256 bytes", "attachment-long-part", Constant("index.file_names.MAX_PART_BYTES", 256))
wrong("a window may have 2**28 bytes", "zstd-window", Constant("format.constants.ZSTD_MAX_WINDOW", 1 << 28))
wrong("a window may have 2**26 bytes", "zstd-largest-window", Constant("format.constants.ZSTD_MAX_WINDOW", 1 << 26))

patched(
    "container.chunks",
    ("the table is big-endian", "attachment-names", 'f"<{count}I"', 'f">{count}I"'),
    (
        "there is one chunk more than needed where the last is full",
        "zstd-full-chunk",
        "count = -(-raw_length // ZSTD_CHUNK)",
        "count = raw_length // ZSTD_CHUNK + 1",
    ),
    (
        "the last chunk is as long as the others",
        "zstd-chunks",
        "expected = min(ZSTD_CHUNK, self._raw_length - number * ZSTD_CHUNK)",
        "expected = min(ZSTD_CHUNK, self._raw_length)",
    ),
    ("a range stays in its first chunk", "zstd-chunks", "position += len(part)", "position = length"),
    ("what follows a frame is ignored", "zstd-something-follows", " or decoder.unused_data", ""),
)
patched(
    "format.zstd_frame",
    (
        "a dictionary ID is refused whatever it is",
        "zstd-no-dictionary",
        "if parameters.dict_id or",
        "if frame[4] & 3 or",
    ),
)
