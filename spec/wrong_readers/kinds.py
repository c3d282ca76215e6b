"""Wrong readers of lowbit and lowrank terms (sections 12 and 13)."""

from __future__ import annotations

from .wrong import Constant, patched, wrong

patched(
    "terms.coding",
    ("all grids end at 2**k - 1", "lowbit-field-beyond-grid", '(2 if self.grid == "midtread" else 1)', "1"),
    (
        "an asymmetric grid ends at 2**k - 2",
        "lowbit-k3-zero-points",
        '(2 if self.grid == "midtread" else 1)',
        '(1 if self.grid == "midrise" else 2)',
    ),
    (
        "the last scale group is whole",
        "lowbit-k3-zero-points",
        "return -(-count // self.scale_group) if self.scale_group else 1",
        "return max(count // self.scale_group, 1) if self.scale_group else 1",
    ),
    ("a midtread grid may have one bit", "lowbit-midtread-1-bit", 'if grid == "midtread" and bits == 1:', "if False:"),
    (
        "a scale group is 2**16 at most",
        "lowbit-k5-large-group",
        "0 <= scale_group <= MAX_SCALE_GROUP",
        "0 <= scale_group <= 1 << 16",
    ),
    (
        "a scale group is 2**31 at most",
        "lowbit-scale-group",
        "0 <= scale_group <= MAX_SCALE_GROUP",
        "0 <= scale_group <= 1 << 31",
    ),
    ("codes have 4 bits at most", "lowbit-k5-large-group", "1 <= self.bits <= MAX_BITS", "1 <= self.bits <= 4"),
    ("codes have 2 bits at least", "lowbit-k1", "1 <= self.bits <= MAX_BITS", "2 <= self.bits <= MAX_BITS"),
)
patched(
    "terms.levels",
    (
        "products are rounded with sums",
        "lowrank-rounded",
        "out += left[:, None] * right",
        "out[...] = (out + left[:, None].astype(np.float64) * right).astype(np.float32)",
    ),
    (
        "vectors are summed from the last to the first",
        "lowrank-rounded",
        "zip(u, v, strict=True)",
        "zip(u[::-1], v[::-1], strict=True)",
    ),
    (
        "vectors are summed in float64",
        "lowrank-rounded",
        "        for left, right in zip(u, v, strict=True):",
        "        out += (u.T.astype(np.float64) @ v).astype(np.float32)\n        for left, right in ():",
    ),
    (
        "zero points are subtracted modulo 256",
        "lowbit-k3-zero-points",
        "(step * codes.astype(np.int32) - offset)",
        "(step * codes.astype(np.int32) - offset if step == 2 else (codes - offset.astype(np.uint8)))",
    ),
    (
        "zero points are added",
        "lowbit-k3-zero-points",
        "(step * codes.astype(np.int32) - offset)",
        "(step * codes.astype(np.int32) - offset if step == 2 else codes.astype(np.int32) + offset)",
    ),
    (
        "scale groups are one longer",
        "lowbit-k1-columns",
        "size = max(min(group, count), 1)",
        "size = max(min(group + (group < count), count), 1)",
    ),
)
patched(
    "terms.lowbit.codec",
    (
        "asymmetric scales are halved",
        "lowbit-k3-zero-points",
        "arrays.zero_points.astype(np.int32), arrays.scales, 1",
        "arrays.zero_points.astype(np.int32), arrays.scales * np.float32(0.5), 1",
    ),
    (
        "symmetric scales are not halved",
        "lowbit-k1",
        "factors, step = arrays.scales * np.float32(0.5), 2",
        "factors, step = arrays.scales, 2",
    ),
    (
        "symmetric levels start at 0",
        "lowbit-k1",
        "np.full(factors.shape, coding.top, np.int32)",
        "np.full(factors.shape, 0, np.int32)",
    ),
    (
        "scales of columns are those of rows",
        "lowbit-k1-columns",
        "scales = np.broadcast_to(arrays.scales, arrays.codes.shape)",
        "scales = np.broadcast_to(np.resize(arrays.scales, (arrays.codes.shape[0], 1)), arrays.codes.shape)",
    ),
    (
        "zero points are those of other rows",
        "lowbit-k3-zero-points",
        'np.ascontiguousarray(words.from_tiles(run["zero_points"], rows)).view(np.uint8)',
        'np.ascontiguousarray(words.from_tiles(run["zero_points"], rows)[::-1]).view(np.uint8)',
    ),
    (
        "a zero point may be one beyond the grid",
        "lowbit-zero-point-beyond-grid",
        "    if largest > coding.top:",
        "    if largest > coding.top + 1:",
    ),
    (
        "scales of rows that do not exist are not looked at",
        "lowbit-scale-of-no-row",
        'check_absent("scales", packed["scales"], rows)',
        "pass",
    ),
    (
        "zero points of rows that do not exist are not looked at",
        "lowbit-zero-point-of-no-row",
        'check_absent("zero_points", packed["zero_points"], rows)',
        "pass",
    ),
)
patched(
    "terms.lowbit.layout",
    (
        "scales of columns stand for every tile",
        "lowbit-k1-columns",
        '(columns,) if self.axis == "column"',
        '(tiles(rows), columns) if self.axis == "column"',
    ),
    (
        "zero points are one a row",
        "lowbit-k3-zero-points",
        'forms["zero_points"] = BufferForm("U8", scales)',
        'forms["zero_points"] = BufferForm("U8", (tiles(rows), 1, TILE_ROWS))',
    ),
    (
        "scales are those of rows that exist",
        "lowbit-k1",
        "(tiles(rows), self.scales(columns), TILE_ROWS)",
        "(rows, self.scales(columns))",
    ),
    (
        "columns may not have scales",
        "lowbit-k1-columns",
        'if self.axis == "column" and self.scale_group:',
        'if self.axis == "column":',
    ),
)
wrong("axis is always row", "lowbit-k1-columns", Constant("terms.lowbit.layout.AXES", ("row",)))

patched(
    "terms.lowrank.codec",
    (
        "groups of a vector start anew in other vectors",
        "lowrank-2-k7-zero-points",
        "zero_points = None if arrays.zero_points is None else arrays.zero_points[:, at]",
        "zero_points = None if arrays.zero_points is None else arrays.zero_points[:1, at].repeat(len(arrays.codes), 0)",
    ),
    (
        "scales of the first vector are those of all",
        "lowrank-2-k7-zero-points",
        "part = LowbitArrays(arrays.codes, arrays.scales[:, at], zero_points)",
        "part = LowbitArrays(arrays.codes, arrays.scales[:1, at].repeat(len(arrays.codes), 0), zero_points)",
    ),
    (
        "v has as many elements as rows",
        "lowrank-1-k8",
        'return self.shape[0 if side == "u" else 1]',
        "return self.shape[0]",
    ),
    (
        "only values of u are looked at",
        "lowrank-field-beyond-grid",
        '        for side in ("u", "v"):\n            if isinstance(self.layout.factors, str):',
        '        for side in ("u",):\n            if isinstance(self.layout.factors, str):',
    ),
    (
        "only values of v are looked at",
        "lowrank-bf16-not-finite",
        '        for side in ("u", "v"):\n            if isinstance(self.layout.factors, str):',
        '        for side in ("v",):\n            if isinstance(self.layout.factors, str):',
    ),
    (
        "fields of vectors are not compared with the grid",
        "lowrank-field-beyond-grid",
        "if largest > coding.top:",
        "if False:",
    ),
)
patched(
    "terms.lowrank.layout",
    (
        "a rank may be as high as the larger side",
        "lowrank-above-columns",
        "if self.rank > min(rows, columns):",
        "if self.rank > max(rows, columns):",
    ),
    (
        "a rank is below the smaller side",
        "lowrank-33-k2-cold",
        "if self.rank > min(rows, columns):",
        "if self.rank >= min(rows, columns):",
    ),
    (
        "u and v are exchanged",
        "lowrank-1-k8",
        '{**self._factor("u", rows), **self._factor("v", columns)}',
        '{**self._factor("u", columns), **self._factor("v", rows)}',
    ),
    (
        "vectors are in tiles",
        "lowrank-1-k8",
        'BufferForm("U32", (self.rank, coding.words(length)))',
        'BufferForm("U32", (-(-self.rank // 32) * 32, coding.words(length)))',
    ),
    (
        "a rank of 0 is allowed",
        "lowrank-of-rank-0",
        "if not 1 <= self.rank <= MAX_VECTORS:",
        "if not 0 <= self.rank <= MAX_VECTORS:",
    ),
)
wrong("factors may not be F16", "lowrank-2-f16", Constant("terms.lowrank.layout.RAW_FACTORS", ("BF16", "F32")))
