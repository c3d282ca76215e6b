"""Wrong readers of sparse terms (section 14)."""

from __future__ import annotations

from .wrong import Constant, patched, wrong

patched(
    "terms.sparse.slots",
    (
        "a filler skips F + 1 columns",
        "sparse-bf16-bitmap",
        "np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler)",
        "np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler + 1)",
    ),
    (
        "an entry does not skip its own column",
        "sparse-bf16-bitmap",
        "np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler)",
        "np.where(is_entry, gaps.astype(np.int64), layout.filler)",
    ),
    (
        "gaps go on from the block before",
        "sparse-empty-block",
        "block * layout.span + passed[:, 1:] - passed[:, starts[block]] - 1",
        "passed[:, 1:] - 1",
    ),
    (
        "blocks have twice their columns",
        "sparse-bf16-bitmap",
        "block * layout.span + passed",
        "block * layout.span * 2 + passed",
    ),
    ("codes are not halved", "sparse-gaps-5", "half = (scales * np.float32(0.5))[:, None]", "half = scales[:, None]"),
    (
        "values lie lane by lane",
        "sparse-bf16-bitmap",
        "widen(np.ascontiguousarray(values.T).view(RAW_DTYPES[coding]), coding)",
        "widen(np.ascontiguousarray(values.reshape(TILE_ROWS, -1)).view(RAW_DTYPES[coding]), coding)",
    ),
    (
        "values of entries are added to zero",
        "sparse-minus-zero",
        "out[lane, column[lane, slot]] = wide[lane, slot]",
        "out[lane, column[lane, slot]] += wide[lane, slot]",
    ),
    (
        "the scale is that of the next row",
        "sparse-gaps-5",
        "half = (scales * np.float32(0.5))[:, None]",
        "half = (np.roll(scales, 1) * np.float32(0.5))[:, None]",
    ),
)
patched(
    "terms.sparse.codec",
    (
        "starts lie block by block",
        "sparse-f16-tiles-and-blocks",
        "of_blocks = starts[tile * blocks : (tile + 1) * blocks + 1]",
        (
            "by_block = np.append(starts[:-1].reshape(blocks, -1).T.reshape(-1), starts[-1])\n"
            "            of_blocks = by_block[tile * blocks : (tile + 1) * blocks + 1]"
        ),
    ),
    (
        "starts may begin anywhere",
        "sparse-starts",
        "if starts[0] != 0 or starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():",
        "if starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():",
    ),
    (
        "starts may end anywhere",
        "sparse-starts-end",
        "if starts[0] != 0 or starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():",
        "if starts[0] != 0 or (starts[1:] < starts[:-1]).any():",
    ),
    (
        "blocks without slots are refused",
        "sparse-empty",
        "(starts[1:] < starts[:-1]).any():",
        "(starts[1:] <= starts[:-1]).any():",
    ),
    (
        "lanes without a row may have entries",
        "sparse-entry-of-no-row",
        "if (gaps[lanes:, max(of_last_tile - first, 0) :] != layout.filler).any():",
        "if False:",
    ),
    (
        "lanes without a row are looked at in the first block",
        "sparse-entry-of-no-row-late",
        "if (gaps[lanes:, max(of_last_tile - first, 0) :] != layout.filler).any():",
        "if (gaps[lanes:, max(of_last_tile - first, 0) :][:, :1] != layout.filler).any():",
    ),
    (
        "scales of the first tile serve all",
        "sparse-k1-gaps-16-cold",
        'packed["scales"][tile, 0])',
        'packed["scales"][0, 0])',
    ),
    (
        "unused bits of gaps alone are looked at",
        "sparse-unused-bits-of-codes",
        "if isinstance(self.layout.values, Coding):\n            streams",
        "if False:\n            streams",
    ),
)
patched(
    "terms.sparse.checks",
    (
        "an entry may lie one column beyond its block",
        "sparse-beyond-block",
        "passed[:, first] + widths[used]).any()",
        "passed[:, first] + widths[used] + 1).any()",
    ),
    (
        "the last block has its columns twice",
        "sparse-beyond-columns-of-last-block",
        "rest = columns - (blocks - 1) * layout.span",
        "rest = 2 * (columns - (blocks - 1) * layout.span)",
    ),
    (
        "an entry may not lie in the last column",
        "sparse-bf16-bitmap",
        "passed[:, first] + widths[used]).any()",
        "passed[:, first] + widths[used] - 1).any()",
    ),
    (
        "an entry may lie beyond its block, but not beyond the matrix",
        "sparse-beyond-block",
        "widths = np.where(np.arange(first, stop) % blocks == blocks - 1, rest, layout.span).astype(np.int64)",
        "widths = (columns - np.arange(first, stop) % blocks * layout.span).astype(np.int64)",
    ),
    (
        "fillers skip no column",
        "sparse-beyond-block",
        "passed[:, 1:] = gaps + is_entry",
        "passed[:, 1:] = gaps * is_entry + is_entry",
    ),
    (
        "fillers may have values",
        "sparse-filler-code",
        "if (np.ascontiguousarray(values != 0) > is_entry).any():",
        "if False:",
    ),
    (
        "fillers may be -0",
        "sparse-filler-minus-zero",
        "if (np.ascontiguousarray(values != 0) > is_entry).any():",
        "if (np.ascontiguousarray(values << 1 != 0) > is_entry).any():",
    ),
    (
        "entries may not have the value zero",
        "sparse-bf16-bitmap",
        "if (np.ascontiguousarray(values != 0) > is_entry).any():",
        "if (np.ascontiguousarray(values != 0) != is_entry).any():",
    ),
    (
        "the last slot of a block may be all fillers",
        "sparse-unneeded-slot-of-first-block",
        "if not is_entry[:, last].any(axis=0).all():",
        "if not is_entry[:, last[-1:]].any(axis=0).all():",
    ),
    (
        "the last slot of a block has an entry in every row",
        "sparse-bf16-bitmap",
        "if not is_entry[:, last].any(axis=0).all():",
        "if not is_entry[:, last].all():",
    ),
)
patched(
    "terms.sparse.layout",
    ("the filler is 2**g", "sparse-bf16-bitmap", "return (1 << self.gap_bits) - 1", "return 1 << self.gap_bits"),
    (
        "the last block is whole",
        "sparse-bf16-bitmap",
        "return -(-columns // self.span)",
        "return max(columns // self.span, 1)",
    ),
    (
        "starts have no last element",
        "sparse-bf16-bitmap",
        "(tiles(rows) * self.blocks(columns) + 1,)",
        "(tiles(rows) * self.blocks(columns),)",
    ),
    (
        "scales of an asymmetric grid are allowed",
        "sparse-asymmetric",
        "elif self.values.scale_group or self.values.has_zero_points:",
        "elif self.values.scale_group:",
    ),
)
wrong("gaps may not have 7 bits", "sparse-gaps-7", Constant("terms.sparse.layout.GAP_BITS", (1, 2, 3, 4, 5, 6, 8, 16)))
wrong(
    "a span is 4096 at most",
    "sparse-k1-gaps-16-cold",
    Constant("terms.sparse.layout.SPANS", tuple(2**n for n in range(8, 13))),
)
