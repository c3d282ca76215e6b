"""Rules of sections 3 to 6 and 8: the file, its header, sections, chunks and trailer."""

from __future__ import annotations

from .rule import Patch, Skip, rule

NEXT = Skip("container.file_index", "{} where {} is next")
INDEX_AT = Skip("container.file_index", "they end at {}, the index starts at")
PADDING = Skip("container.reader", "the padding after section {} is not zero")
RESERVED = "size != c.HEADER_SIZE or any(reserved)"

COVER = "MUST cover the file exactly: no gap, no overlap, no byte after the trailer"
rule("3.2", COVER, "section-gap section-gap-later sections-overlap", NEXT)
rule("3.2", COVER, "index-gap", INDEX_AT)
rule(
    "3.2",
    COVER,
    others="trailing-byte truncated section-into-index",
    reason="the trailer is what ends the file: with a byte more or less, other bytes are read in its place",
)
rule(
    "3.2",
    "with zero padding up to the next multiple of 4096 after the header",
    "header-padding header-padding-first",
    Skip("container.reader", "the padding after the header is not zero"),
)
rule("3.2", "and after every section", "section-padding section-padding-second", PADDING)
rule(
    "3.2",
    "A file without sections has its index at 4096",
    "empty",
    Patch("container.frame", "offset < c.SECTION_ALIGNMENT", "offset <= c.SECTION_ALIGNMENT"),
)

MAGIC = Patch("container.frame", "if not data.startswith(c.HEADER_MAGIC):", "if False:")
rule(
    "4.1",
    "A reader MUST refuse a file whose magic differs",
    "magic-first-byte magic-last-byte",
    MAGIC,
    others="foreign text-mode empty-file header-cut",
    reason="files of another format have neither checksum nor seal",
)
rule(
    "4.2",
    "A reader MUST check the checksum",
    "header-checksum",
    Skip("container.frame", "the header's checksum is"),
    others="newer-version-damaged",
    reason="without the checksum, the other vector is one of a newer version",
)
rule(
    "4.2",
    "a reader version above its own",
    "newer-version",
    Skip("container.frame", "the file needs a reader of version"),
)
rule(
    "4.2",
    "and any incompatible bit that it does not know",
    "incompatible-bit incompatible-bit-63",
    Skip("container.frame", "incompatible features that this reader lacks"),
)
rule("4.2", "It MUST refuse reader version 0", "version-0", Skip("container.frame", "which never existed"))
rule(
    "4.1",
    "in this order: the magic, the checksum, the reader version",
    "newer-version-damaged",
    Patch("container.frame", "if found != checksum:", "if found != checksum and version == c.FORMAT_VERSION:"),
)
SIZE = 'raise InvalidFileError("reserved bytes of the header are not as required")'
FIRST = "    if version > c.FORMAT_VERSION:"
rule(
    "4.1",
    "the incompatible features, and then header size and reserved bytes",
    "newer-version-of-another-size newer-version-with-reserved incompatible-bit-with-reserved",
    Patch("container.frame", FIRST, f"    if {RESERVED}:\n        {SIZE}\n{FIRST}"),
)
rule(
    "4.1",
    "the reader version, the incompatible features",
    "version-0-with-bits",
    Patch("container.frame", "if version == 0:", "if version == 0 and not incompatible:"),
)
rule(
    "4.2",
    "above the reader's, or is not 0 and comes with an incompatible bit",
    "newer-version newer-version-with-bits",
    Patch(
        "container.frame",
        'raise UnsupportedError(f"the file needs a reader',
        'raise InvalidFileError(f"the file needs a reader',
    ),
)
rule(
    "4.2",
    "It MUST ignore compatible bits that it does not know",
    "compatible-bit",
    Patch(
        "container.frame", "_, version, size, incompatible, _, reserved", "_, version, size, _, incompatible, reserved"
    ),
)
rule("4.3", "Header size other than 64", "header-size", Patch("container.frame", RESERVED, "any(reserved)"))
rule(
    "4.3",
    "reserved bytes other than zero MUST be refused",
    "header-reserved-first header-reserved-last",
    Patch("container.frame", RESERVED, "size != c.HEADER_SIZE"),
)
for _bit, _name, _words in (
    (0, "parts", "MUST be set if an entry's `base` has `parts`"),
    (1, "leading", "MUST be set if an entry has `leading`"),
    (2, "scaled", "MUST be set if the index has `scaled`"),
    (5, "parent", "MUST be set if the index has `parent`"),
):
    _skip = Skip("container.file_index", f"bit {_bit}")
    rule(
        "4.4",
        "A reader MUST refuse a file that has what a bit stands for without the bit",
        f"{_name}-without-feature",
        _skip,
    )
    rule("4.4", _words, f"{_name}-without-feature", Skip("container.file_index", f"bit {_bit}"))
rule(
    "4.4",
    "It MUST NOT refuse a bit that it knows where nothing needs it",
    "unused-features",
    Patch(
        "container.frame",
        "return int(incompatible)",
        "raise InvalidFileError('bits') if incompatible == 7 else ValueError",
    ),
)

rule(
    "5.1",
    "A section has a kind, a codec",
    "section-kind",
    Skip("index.sections", "unknown section kind"),
    Skip("container.file_index", "is of another kind"),
)
rule("5.1", "A section has a kind, a codec", "section-codec", Skip("index.sections", "unknown codec"))
rule(
    "5.2",
    "The stored length and the raw length of a section of codec 0 MUST be equal",
    "section-lengths",
    Skip("index.sections", "a stored section has equal lengths"),
)
rule("5.2", "Sections are listed in the order of their offsets", "sections-swapped", NEXT)
rule("5.2", "The first starts at 4096", "section-gap", NEXT)
rule(
    "5.2",
    "A section of stored length 0 takes no bytes",
    "empty-sections zstd-empty",
    Patch(
        "container.file_index",
        "position = c.align(section.offset + section.length, ",
        "position = c.align(section.offset + max(section.length, 1), ",
    ),
)
rule(
    "5.4",
    "behind a buffer that ends at 300 it lies at 512",
    "empty-last-buffer buffers-empty",
    Patch(
        "pipeline.verify",
        "start = c.align(position, c.buffer_alignment(container.sections[number].kind))",
        "start = c.align(position, c.BUFFER_ALIGNMENT if ref.length else 1)",
    ),
    others="empty-buffer-unaligned",
    reason="an offset is a multiple of 256 in any case",
)
rule(
    "5.2",
    "every other at the least multiple of 4096 that is not below the end of the one before it",
    "section-gap-later",
    NEXT,
)
rule("5.2", "The bytes between MUST be zero", "section-padding section-padding-second", PADDING)
rule("5.2", "The index starts where the next section would", "index-gap", INDEX_AT)
rule(
    "5.3",
    "A reader MUST check it",
    "flipped-section flipped-attachment checksum-last-byte",
    Skip("container.reader", "is damaged: its checksum is"),
)
rule("5.3", "and the padding after the section, before it uses", "section-padding", PADDING)

BETWEEN = Skip("pipeline.verify", "the padding at {} is not zero")
BEGIN = Skip("pipeline.verify", "a buffer starts at {}, where {} is next")
rule(
    "5.4",
    "every other at the least multiple of 256",
    "buffer-unaligned",
    Skip("index.sections", "is not a multiple of"),
    BEGIN,
    BETWEEN,
)
rule("5.4", "that is not below the end of the one before it", "buffers-gap", BEGIN)
rule("5.4", "The first starts at 0", "buffers-begin", BEGIN)
rule("5.4", "the bytes between MUST be zero", "buffers-padding", BETWEEN)
BEHIND = Skip("pipeline.verify", "no buffer holds the bytes from")
rule("5.4", "the section ends where its last buffer ends", "section-longer", BEHIND)
rule("5.4", "and has at least one", "section-without-buffer", Skip("pipeline.verify", "no buffer lies in it"))
rule("5.4", "No two buffers share a byte", "buffers-overlap buffers-nest", BEGIN)
rule(
    "5.4",
    "A buffer of length 0 lies where the next buffer would, also if it is the last",
    "buffers-empty-inside empty-buffer-too-far",
    BEGIN,
    Patch("pipeline.verify", "position = ref.offset + ref.length", "position = max(position, ref.offset + ref.length)"),
)
rule(
    "5.5",
    "All buffers of a tensor, those of length 0 too, MUST lie in one section",
    "two-sections two-sections-data",
    Skip("container.file_index", "the buffers lie in several sections"),
)
rule(
    "5.6",
    "sections of kind 1 MUST have codec 0",
    "hot-but-compressed",
    Skip("container.file_index", "a hot file stores its tensors as they are"),
)

DECLARES = Skip("format.zstd_frame", "the frame declares")
rule(
    "6.1",
    "The raw bytes are cut into chunks of 262,144 bytes",
    "zstd-chunks zstd-full-chunk",
    Patch("container.chunks", "expected = min(ZSTD_CHUNK, ", "expected = min(ZSTD_CHUNK - 1, "),
    others="zstd-no-frame zstd-chunks-swapped zstd-skippable",
    reason="without frames in their order there is nothing to read",
)
rule(
    "6.1",
    "A section of no raw bytes stores none",
    others="zstd-bytes-of-nothing",
    reason="the bytes are no chunk table, and whoever reads the section refuses them",
)
rule("6.2", "Each MUST declare its content size", "zstd-without-size", DECLARES)
rule(
    "6.2",
    "a window above 2^27 bytes",
    "zstd-largest-window",
    Patch("format.zstd_frame", "parameters.window_size > ZSTD_MAX_WINDOW", "parameters.window_size >= ZSTD_MAX_WINDOW"),
)
rule(
    "6.2",
    "a dictionary ID other than 0",
    "zstd-no-dictionary",
    Patch(
        "format.zstd_frame",
        "if parameters.dict_id or parameters.has_checksum:",
        "if frame[4] & 3 or parameters.has_checksum:",
    ),
)
rule(
    "6.2",
    "which MUST be its chunk's length",
    "zstd-wrong-size",
    DECLARES,
    Patch("container.chunks", "len(chunk) != expected or ", ""),
)
rule(
    "6.2",
    "its header MUST NOT name a dictionary",
    others="zstd-dictionary",
    reason="a decoder does not have the dictionary, and refuses the frame",
)
rule(
    "6.2",
    "or ask for a window above 2^27 bytes",
    "zstd-window",
    Skip("format.zstd_frame", "the frame has a window of"),
)
rule(
    "6.2",
    "announce a checksum",
    "zstd-checksum",
    Skip("format.zstd_frame", "the frame uses a dictionary or a checksum"),
)
rule(
    "6.2",
    "Each MUST end exactly where the table says, with nothing after it",
    "zstd-something-follows zstd-two-frames",
    Patch("container.chunks", " or decoder.unused_data", ""),
    others="zstd-cut-short",
    reason="a frame that is cut short does not give its content",
)
rule(
    "6.3",
    "The lengths in the table MUST sum to the stored length less the table",
    "zstd-table-too-little",
    Skip("container.chunks", "the chunks take"),
    others="zstd-table-too-much",
    reason="a frame that reaches into the table does not end with its content",
)
rule(
    "6.3",
    "a section whose stored length is below 13 bytes a chunk",
    others="zstd-too-little-stored",
    reason="no frame is shorter than 9 bytes: the rule keeps a reader from making room for what cannot be there",
)

ENDS = "offset + length + c.TRAILER_SIZE != file_length or "
rule(
    "8",
    "A reader MUST check all of it before it uses the index: the magic",
    "trailer-magic-first-byte trailer-magic-last-byte",
    Patch("container.frame", " or not data.endswith(c.TRAILER_MAGIC)", ""),
)
rule("8", "the file's length", "trailer-file-length", Skip("container.frame", "the trailer speaks of"))
rule(
    "8",
    "that index and trailer end the file",
    "trailer-gap",
    Patch("container.frame", ENDS, ""),
    Patch("container.reader", "if behind <= len(tail):", "if False:"),
)
rule(
    "8",
    "a multiple of 4096, at least 4096",
    "index-unaligned",
    Patch("container.frame", " or offset % c.SECTION_ALIGNMENT", ""),
    INDEX_AT,
    others="index-at-0 index-at-64",
    reason="an index before byte 4096 lies where the header and its padding are",
)
rule(
    "8",
    "the reserved bytes",
    "trailer-reserved-first trailer-reserved-last",
    Skip("container.frame", "reserved bytes of the trailer"),
)
rule(
    "8",
    "and the seal",
    "seal flipped-index flipped-header flipped-trailer",
    Skip("container.frame", "the digest of header, index and trailer does not match"),
)
rule(
    "8",
    "a verifier MUST recompute it",
    "wrong-content-id wrong-content-id-last-byte",
    Skip("pipeline.digests", "the content id is not that of the content"),
)
