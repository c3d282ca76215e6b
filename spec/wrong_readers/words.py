"""Wrong readers of packed words and tiles (section 11.2)."""

from __future__ import annotations

from .wrong import patched

patched(
    "terms.tiles",
    (
        "fields of all widths are one plane",
        "fixed-16-16-k5",
        "found.append(min(1 << width.bit_length() - 1, WORD_BITS))",
        "found.append(width)",
    ),
    (
        "planes have 16 bits at most",
        "rank-31-66-cold",
        "min(1 << width.bit_length() - 1, WORD_BITS)",
        "min(1 << width.bit_length() - 1, 16)",
    ),
    ("the narrowest plane comes first", "fixed-16-16-k5", "return tuple(found)", "return tuple(found[::-1])"),
    (
        "planes are split into single bits",
        "cold-but-stored",
        "found.append(min(1 << width.bit_length() - 1, WORD_BITS))",
        "found.append(1)",
    ),
    (
        "super-tiles are not complete",
        "fixed-1-2",
        "return -(-rows // (TILE_ROWS * share)) * share",
        "return -(-rows // TILE_ROWS)",
    ),
    (
        "there is a tile more than needed where rows fill them",
        "lowbit-k2",
        "return -(-rows // (TILE_ROWS * share)) * share",
        "return (rows // (TILE_ROWS * share) + 1) * share",
    ),
    (
        "the last word of a plane is a whole one",
        "fixed-16-16-k5",
        "return -(-count * plane // WORD_BITS)",
        "return count * plane // WORD_BITS + 1",
    ),
)
patched(
    "terms.words",
    (
        "the highest bits come first in a word",
        "cold-but-stored",
        'np.unpackbits(np.ascontiguousarray(by_row).view(np.uint8), axis=1, bitorder="little")',
        'np.unpackbits(np.ascontiguousarray(by_row).view(np.uint8), axis=1, bitorder="big")',
    ),
    (
        "words are big-endian",
        "cold-but-stored",
        "np.unpackbits(np.ascontiguousarray(by_row).view(np.uint8),",
        "np.unpackbits(np.ascontiguousarray(by_row).byteswap().view(np.uint8),",
    ),
    (
        "the highest bit of a field comes first",
        "cold-but-stored",
        "(bits << np.arange(width, dtype=np.uint64))",
        "(bits << np.arange(width, dtype=np.uint64)[::-1])",
    ),
    (
        "every plane holds the lowest bits",
        "fixed-16-16-k5",
        "_unpack_plane(by_row[:, first : first + words], count, plane) << np.uint64(low)",
        "_unpack_plane(by_row[:, first : first + words], count, plane) << np.uint64(0)",
    ),
    (
        "planes lie behind each other without rest",
        "fixed-16-16-k5",
        "low, first = low + plane, first + words",
        "low, first = low + plane, first + max(words - 1, 0)",
    ),
    (
        "rows of a super-tile lie one tile after the other",
        "field-beyond-columns-late",
        "by_lane = tiled.reshape(supers, share, count, TILE_ROWS).transpose(0, 3, 1, 2)",
        "by_lane = tiled.reshape(supers, share, count, TILE_ROWS).transpose(0, 1, 3, 2)",
    ),
    (
        "a tile's words lie lane by lane",
        "fixed-1-2",
        "by_lane = tiled.reshape(supers, share, count, TILE_ROWS).transpose(0, 3, 1, 2)",
        "by_lane = tiled.reshape(supers, share, TILE_ROWS, count).transpose(0, 2, 1, 3)",
    ),
    (
        "share does not move rows",
        "field-beyond-columns-late",
        "supers, count = tiled.shape[0] // share, tiled.shape[1]\n    by_lane",
        "supers, count, share = tiled.shape[0], tiled.shape[1], 1\n    by_lane",
    ),
)
patched(
    "terms.unused",
    (
        "only the first lane without a row is looked at",
        "lowbit-scale-of-no-row-later",
        "np.divmod(np.arange(here, whole), share)",
        "np.divmod(np.arange(here, min(here + 1, whole)), share)",
    ),
    (
        "only whole tiles without rows are looked at",
        "fixed-word-of-no-row",
        "np.divmod(np.arange(here, whole), share)",
        "np.divmod(np.arange(whole, whole), share)",
    ),
    (
        "rows of a super-tile without a row are looked for lane by lane",
        "fixed-1-2",
        "lane, tile = np.divmod(np.arange(here, whole), share)",
        "tile, lane = np.divmod(np.arange(here, whole), TILE_ROWS)",
    ),
    (
        "unused bits of the last plane alone are looked at",
        "lowbit-unused-bits-of-a-plane",
        "if used and (packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():",
        "if used and plane == planes(width)[-1] and (packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():",
    ),
    (
        "unused bits of the first plane alone are looked at",
        "lowbit-unused-bits-of-last-plane",
        "if used and (packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():",
        "if used and plane == planes(width)[0] and (packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():",
    ),
    (
        "unused bits are looked for in the first tile",
        "lowbit-unused-bits-of-second-tile",
        "(packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():",
        "(packed.view(np.uint32)[:1, end - 1] >> np.uint32(used)).any():",
    ),
    (
        "the highest unused bit is not looked at",
        "lowbit-highest-unused-bit",
        "(packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():",
        "(packed.view(np.uint32)[:, end - 1] << np.uint32(1) >> np.uint32(used + 1)).any():",
    ),
    (
        "fields of the first tile alone are compared with the grid",
        "lowbit-field-beyond-grid-late",
        "for tile, lines, start, stop in blocks(rows, count, share):",
        "for tile, lines, start, stop in list(blocks(min(rows, 32), count, share))[:1]:",
    ),
    ("the grid's end is refused, too", "fixed-1-2", "if largest > top:", "if largest >= top:"),
    ("one field beyond the grid is allowed", "field-beyond-grid", "if largest > top:", "if largest > top + 1:"),
    (
        "unused bits of vectors are not looked at behind the first",
        "lowrank-unused-bits-of-v",
        "(by_row.view(np.uint32)[:, end - 1]",
        "(by_row.view(np.uint32)[:1, end - 1]",
    ),
)
