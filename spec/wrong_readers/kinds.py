"""Wrong readers of lowbit, lowrank and sparse terms (sections 12 to 14)."""

from __future__ import annotations

from .wrong import Constant, patched, wrong

patched(
    "terms.coding",
    ("all grids end at 2**k - 1", "", '(2 if self.grid == "midtread" else 1)', "1"),
    (
        "an asymmetric grid ends at 2**k - 2",
        "",
        '(2 if self.grid == "midtread" else 1)',
        '(1 if self.grid == "midrise" else 2)',
    ),
    (
        "the last scale group is whole",
        "",
        "return -(-count // self.scale_group) if self.scale_group else 1",
        "return max(count // self.scale_group, 1) if self.scale_group else 1",
    ),
    ("a midtread grid may have one bit", "", 'if grid == "midtread" and bits == 1:', "if False:"),
    ("a scale group is 2**16 at most", "", "0 <= scale_group <= MAX_SCALE_GROUP", "0 <= scale_group <= 1 << 16"),
    ("a scale group is 2**31 at most", "", "0 <= scale_group <= MAX_SCALE_GROUP", "0 <= scale_group <= 1 << 31"),
    ("codes have 4 bits at most", "", "1 <= self.bits <= MAX_BITS", "1 <= self.bits <= 4"),
    ("codes have 2 bits at least", "", "1 <= self.bits <= MAX_BITS", "2 <= self.bits <= MAX_BITS"),
)
patched(
    "terms.levels",
    (
        "products are rounded with sums",
        "",
        "out += left[:, None] * right",
        "out[...] = (out + left[:, None].astype(np.float64) * right).astype(np.float32)",
    ),
    (
        "vectors are summed from the last to the first",
        "",
        "zip(u, v, strict=True)",
        "zip(u[::-1], v[::-1], strict=True)",
    ),
    (
        "vectors are summed in float64",
        "",
        "        for left, right in zip(u, v, strict=True):",
        "        out += (u.T.astype(np.float64) @ v).astype(np.float32)\n        for left, right in ():",
    ),
    (
        "zero points are subtracted modulo 256",
        "",
        "(step * codes.astype(np.int32) - offset)",
        "(step * codes.astype(np.int32) - offset if step == 2 else (codes - offset.astype(np.uint8)))",
    ),
    (
        "zero points are added",
        "",
        "(step * codes.astype(np.int32) - offset)",
        "(step * codes.astype(np.int32) - (3 - 2 * step + 2) * offset if step == 2 else codes.astype(np.int32) + offset)",
    ),
    (
        "scale groups are one longer",
        "",
        "size = max(min(group, count), 1)",
        "size = max(min(group + (group < count), count), 1)",
    ),
)
patched(
    "terms.lowbit.codec",
    (
        "asymmetric scales are halved",
        "",
        "arrays.zero_points.astype(np.int32), arrays.scales, 1",
        "arrays.zero_points.astype(np.int32), arrays.scales * np.float32(0.5), 1",
    ),
    (
        "symmetric scales are not halved",
        "",
        "factors, step = arrays.scales * np.float32(0.5), 2",
        "factors, step = arrays.scales, 2",
    ),
    (
        "symmetric levels start at 0",
        "",
        "np.full(factors.shape, coding.top, np.int32)",
        "np.full(factors.shape, 0, np.int32)",
    ),
    (
        "scales of columns are those of rows",
        "",
        "scales = np.broadcast_to(arrays.scales, arrays.codes.shape)",
        "scales = np.broadcast_to(np.resize(arrays.scales, (arrays.codes.shape[0], 1)), arrays.codes.shape)",
    ),
    (
        "zero points are those of other rows",
        "",
        'np.ascontiguousarray(words.from_tiles(run["zero_points"], rows)).view(np.uint8)',
        'np.ascontiguousarray(words.from_tiles(run["zero_points"], rows)[::-1]).view(np.uint8)',
    ),
    ("a zero point may be one beyond the grid", "", "    if largest > coding.top:", "    if largest > coding.top + 1:"),
    (
        "scales of rows that do not exist are not looked at",
        "",
        'check_absent("scales", packed["scales"], rows)',
        "pass",
    ),
    (
        "zero points of rows that do not exist are not looked at",
        "",
        'check_absent("zero_points", packed["zero_points"], rows)',
        "pass",
    ),
)
patched(
    "terms.lowbit.layout",
    (
        "scales of columns stand for every tile",
        "",
        '(columns,) if self.axis == "column"',
        '(tiles(rows), columns) if self.axis == "column"',
    ),
    (
        "zero points are one a row",
        "",
        'forms["zero_points"] = BufferForm("U8", scales)',
        'forms["zero_points"] = BufferForm("U8", (tiles(rows), 1, TILE_ROWS))',
    ),
    (
        "scales are those of rows that exist",
        "",
        "(tiles(rows), self.scales(columns), TILE_ROWS)",
        "(rows, self.scales(columns))",
    ),
    ("columns may not have scales", "", 'if self.axis == "column" and self.scale_group:', 'if self.axis == "column":'),
)
wrong("axis is always row", "", Constant("terms.lowbit.layout.AXES", ("row",)))

patched(
    "terms.lowrank.codec",
    (
        "groups of a vector start anew in other vectors",
        "",
        "zero_points = None if arrays.zero_points is None else arrays.zero_points[:, at]",
        "zero_points = None if arrays.zero_points is None else arrays.zero_points[:1, at].repeat(len(arrays.codes), 0)",
    ),
    (
        "scales of the first vector are those of all",
        "",
        "part = LowbitArrays(arrays.codes, arrays.scales[:, at], zero_points)",
        "part = LowbitArrays(arrays.codes, arrays.scales[:1, at].repeat(len(arrays.codes), 0), zero_points)",
    ),
    ("v has as many elements as rows", "", 'return self.shape[0 if side == "u" else 1]', "return self.shape[0]"),
    (
        "only values of u are looked at",
        "",
        '        for side in ("u", "v"):\n            if isinstance(self.layout.factors, str):',
        '        for side in ("u",):\n            if isinstance(self.layout.factors, str):',
    ),
    (
        "only values of v are looked at",
        "",
        '        for side in ("u", "v"):\n            if isinstance(self.layout.factors, str):',
        '        for side in ("v",):\n            if isinstance(self.layout.factors, str):',
    ),
    ("fields of vectors are not compared with the grid", "", "if largest > coding.top:", "if False:"),
)
patched(
    "terms.lowrank.layout",
    (
        "a rank may be as high as the larger side",
        "",
        "if self.rank > min(rows, columns):",
        "if self.rank > max(rows, columns):",
    ),
    (
        "a rank is below the smaller side",
        "",
        "if self.rank > min(rows, columns):",
        "if self.rank >= min(rows, columns):",
    ),
    (
        "u and v are exchanged",
        "",
        '{**self._factor("u", rows), **self._factor("v", columns)}',
        '{**self._factor("u", columns), **self._factor("v", rows)}',
    ),
    (
        "vectors are in tiles",
        "",
        'BufferForm("U32", (self.rank, coding.words(length)))',
        'BufferForm("U32", (-(-self.rank // 32) * 32, coding.words(length)))',
    ),
    ("a rank of 0 is allowed", "", "if not 1 <= self.rank <= MAX_VECTORS:", "if not 0 <= self.rank <= MAX_VECTORS:"),
)
wrong("factors may not be F16", "", Constant("terms.lowrank.layout.RAW_FACTORS", ("BF16", "F32")))

patched(
    "terms.sparse.slots",
    (
        "a filler skips F + 1 columns",
        "",
        "np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler)",
        "np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler + 1)",
    ),
    (
        "an entry does not skip its own column",
        "",
        "np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler)",
        "np.where(is_entry, gaps.astype(np.int64), layout.filler)",
    ),
    (
        "gaps go on from the block before",
        "",
        "block * layout.span + passed[:, 1:] - passed[:, starts[block]] - 1",
        "passed[:, 1:] - 1",
    ),
    ("blocks have twice their columns", "", "block * layout.span + passed", "block * layout.span * 2 + passed"),
    ("codes are not halved", "", "half = (scales * np.float32(0.5))[:, None]", "half = scales[:, None]"),
    (
        "values lie lane by lane",
        "",
        "widen(np.ascontiguousarray(values.T).view(RAW_DTYPES[coding]), coding)",
        "widen(np.ascontiguousarray(values.reshape(TILE_ROWS, -1)).view(RAW_DTYPES[coding]), coding)",
    ),
    (
        "values of entries are added to zero",
        "",
        "out[lane, column[lane, slot]] = wide[lane, slot]",
        "out[lane, column[lane, slot]] += wide[lane, slot]",
    ),
    (
        "the scale is that of the next row",
        "",
        "half = (scales * np.float32(0.5))[:, None]",
        "half = (np.roll(scales, 1) * np.float32(0.5))[:, None]",
    ),
)
patched(
    "terms.sparse.codec",
    (
        "starts lie block by block",
        "",
        "of_blocks = starts[tile * blocks : (tile + 1) * blocks + 1]",
        "of_blocks = np.append(starts[:-1].reshape(blocks, -1).T.reshape(-1), starts[-1])[tile * blocks : (tile + 1) * blocks + 1]",
    ),
    (
        "starts may begin anywhere",
        "",
        "if starts[0] != 0 or starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():",
        "if starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():",
    ),
    (
        "starts may end anywhere",
        "",
        "if starts[0] != 0 or starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():",
        "if starts[0] != 0 or (starts[1:] < starts[:-1]).any():",
    ),
    ("blocks without slots are refused", "", "(starts[1:] < starts[:-1]).any():", "(starts[1:] <= starts[:-1]).any():"),
    (
        "lanes without a row may have entries",
        "",
        "if (gaps[lanes:, max(of_last_tile - first, 0) :] != layout.filler).any():",
        "if False:",
    ),
    (
        "lanes without a row are looked at in the first block",
        "",
        "if (gaps[lanes:, max(of_last_tile - first, 0) :] != layout.filler).any():",
        "if (gaps[lanes:, max(of_last_tile - first, 0) :][:, :1] != layout.filler).any():",
    ),
    ("scales of the first tile serve all", "", 'packed["scales"][tile, 0])', 'packed["scales"][0, 0])'),
    (
        "unused bits of gaps alone are looked at",
        "",
        "if isinstance(self.layout.values, Coding):\n            streams",
        "if False:\n            streams",
    ),
)
patched(
    "terms.sparse.checks",
    (
        "an entry may lie one column beyond its block",
        "",
        "passed[:, first] + widths[used]).any()",
        "passed[:, first] + widths[used] + 1).any()",
    ),
    (
        "an entry may not lie in the last column",
        "",
        "passed[:, first] + widths[used]).any()",
        "passed[:, first] + widths[used] - 1).any()",
    ),
    (
        "an entry may lie beyond its block, but not beyond the matrix",
        "",
        "widths = np.where(np.arange(first, stop) % blocks == blocks - 1, rest, layout.span).astype(np.int64)",
        "widths = (columns - np.arange(first, stop) % blocks * layout.span).astype(np.int64)",
    ),
    ("fillers skip no column", "", "passed[:, 1:] = gaps + is_entry", "passed[:, 1:] = gaps * is_entry + is_entry"),
    ("fillers may have values", "", "if (np.ascontiguousarray(values != 0) > is_entry).any():", "if False:"),
    (
        "fillers may be -0",
        "",
        "if (np.ascontiguousarray(values != 0) > is_entry).any():",
        "if (np.ascontiguousarray(values << 1 != 0) > is_entry).any():",
    ),
    (
        "entries may not have the value zero",
        "",
        "if (np.ascontiguousarray(values != 0) > is_entry).any():",
        "if (np.ascontiguousarray(values != 0) != is_entry).any():",
    ),
    (
        "the last slot of a block may be all fillers",
        "",
        "if not is_entry[:, last].any(axis=0).all():",
        "if not is_entry[:, last[-1:]].any(axis=0).all():",
    ),
    (
        "the last slot of a block has an entry in every row",
        "",
        "if not is_entry[:, last].any(axis=0).all():",
        "if not is_entry[:, last].all():",
    ),
)
patched(
    "terms.sparse.layout",
    ("the filler is 2**g", "", "return (1 << self.gap_bits) - 1", "return 1 << self.gap_bits"),
    ("the last block is whole", "", "return -(-columns // self.span)", "return max(columns // self.span, 1)"),
    (
        "starts have no last element",
        "",
        "(tiles(rows) * self.blocks(columns) + 1,)",
        "(tiles(rows) * self.blocks(columns),)",
    ),
    (
        "scales of an asymmetric grid are allowed",
        "",
        "elif self.values.scale_group or self.values.has_zero_points:",
        "elif self.values.scale_group:",
    ),
)
wrong("gaps may not have 7 bits", "", Constant("terms.sparse.layout.GAP_BITS", (1, 2, 3, 4, 5, 6, 8, 16)))
wrong("a span is 4096 at most", "", Constant("terms.sparse.layout.SPANS", tuple(2**n for n in range(8, 13))))
