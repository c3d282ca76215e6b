"""Wrong readers of positions (section 11.4)."""

from __future__ import annotations

from .wrong import Constant, patched, wrong

HASHING = "terms.nm.hashing"
for _name in ("ROW_STEP", "BLOCK_STEP", "MIX_FIRST", "MIX_SECOND", "FOLD", "SPREAD"):
    wrong(f"{_name} is another number", "seeded-1-128-many-groups", Constant(f"{HASHING}.{_name}", 0x9E3779B9))
patched(
    HASHING,
    (
        "the first shift of mix is 15",
        "cold-but-stored",
        "x = x ^ x >> np.uint32(16)\n    x = x * np.uint32(MIX_FIRST)",
        "x = x ^ x >> np.uint32(15)\n    x = x * np.uint32(MIX_FIRST)",
    ),
    ("the second shift of mix is 16", "cold-but-stored", "x = x ^ x >> np.uint32(15)", "x = x ^ x >> np.uint32(16)"),
    ("the last shift of mix is left out", "cold-but-stored", "return x ^ x >> np.uint32(16)", "return x"),
    ("the shift of mix64 is left out", "cold-but-stored", "wide = (x ^ x >> np.uint32(16)).astype", "wide = x.astype"),
    (
        "the first product of mix64 has 32 bits",
        "cold-but-stored",
        "wide = (x ^ x >> np.uint32(16)).astype(np.uint64) * np.uint64(FOLD)",
        "wide = ((x ^ x >> np.uint32(16)).astype(np.uint64) * np.uint64(FOLD)) & np.uint64(0xFFFFFFFF)",
    ),
    (
        "mix64 folds by adding",
        "cold-but-stored",
        "(wide >> np.uint64(32) ^ wide & np.uint64(0xFFFFFFFF))",
        "((wide >> np.uint64(32)) + (wide & np.uint64(0xFFFFFFFF)))",
    ),
    (
        "a group with one entry uses as many bits as others",
        "seeded-1-128-many-groups",
        "log_m if n == 1 else 2 * log_m - 1",
        "2 * log_m - 1",
    ),
    (
        "a group uses 8 bits at least",
        "cold-but-stored",
        "return 4 if needed <= 4 else 8 if",
        "return 8 if needed <= 4 else 8 if",
    ),
    ("a group uses log2 M bits rounded up", "seeded-2-128-k8", "log_m if n == 1 else 2 * log_m - 1", "log_m"),
    (
        "a hash serves half as many groups",
        "seeded-1-128-many-groups",
        "per_hash = HASH_BITS // width",
        "per_hash = HASH_BITS // width // 2",
    ),
    (
        "a hash serves groups without end",
        "seeded-1-128-many-groups",
        "blocks = g // np.uint32(per_hash)",
        "blocks = g * np.uint32(0)",
    ),
    (
        "the seed is mixed before the row is added",
        "cold-but-stored",
        "key = mix(np.uint32(seed) + rows * np.uint32(ROW_STEP))",
        "key = mix(np.full(1, seed, np.uint32)) + rows * np.uint32(ROW_STEP)",
    ),
    (
        "mask rows count from 1",
        "cold-but-stored",
        "np.arange(first, first + count, dtype=np.uint64)",
        "np.arange(first + 1, first + count + 1, dtype=np.uint64)",
    ),
    (
        "lanes count from the top",
        "cold-but-stored",
        "(h >> (g % np.uint32(per_hash) * np.uint32(width))",
        "(h >> ((np.uint32(per_hash - 1) - g % np.uint32(per_hash)) * np.uint32(width))",
    ),
    (
        "b takes the next bits, and a the lowest",
        "cold-but-stored",
        "b = lane & mask",
        "b = lane >> np.uint32(log_m) & mask",
    ),
    (
        "a begins at bit log2 M",
        "seeded-2-128-k8",
        "a = lane >> np.uint32(log_m - 1) & mask",
        "a = lane >> np.uint32(log_m) & mask",
    ),
    ("a need not be odd", "seeded-2-128-k8", "& mask | np.uint32(1)", "& mask"),
    (
        "entries count from 1",
        "cold-but-stored",
        "i = np.arange(n, dtype=np.uint32)",
        "i = np.arange(1, n + 1, dtype=np.uint32)",
    ),
    (
        "entries of a group are sorted",
        "seeded-2-128-k8",
        "return ((a[:, :, None] * i + b[:, :, None]) & mask).astype(np.uint8)",
        "return np.sort((a[:, :, None] * i + b[:, :, None]) & mask).astype(np.uint8)",
    ),
    (
        "positions are (b * i + a) mod M",
        "cold-but-stored",
        "(a[:, :, None] * i + b[:, :, None])",
        "(b[:, :, None] * i + a[:, :, None])",
    ),
)
patched(
    "terms.nm.index.encodings",
    ("positions of M = 2**n take a bit more", "fixed-1-2", "return (m - 1).bit_length()", "return m.bit_length()"),
    (
        "ranks of 2**n sets take a bit more",
        "rank-8-8-cold",
        "return (math.comb(m, n) - 1).bit_length()",
        "return math.comb(m, n).bit_length()",
    ),
    (
        "ranks of one set take a bit",
        "rank-8-8-cold",
        "return (math.comb(m, n) - 1).bit_length()",
        "return max((math.comb(m, n) - 1).bit_length(), 1)",
    ),
    (
        "a rank index takes positions' words",
        "rank-31-66-cold",
        "return stream_words(groups, rank_bits(n, m))",
        "return stream_words(groups * n, position_bits(m))",
    ),
)
patched(
    "terms.nm.index.rank",
    (
        "ranks are in lexicographic order",
        "rank-1-7-cold",
        "    return positions\n\n\ndef _check_below",
        "    return np.uint8(m - 1) - positions[:, :, ::-1]\n\n\ndef _check_below",
    ),
    ("the binomials are those of p + 1", "rank-1-7-cold", "math.comb(p, i + 1)", "math.comb(p + 1, i + 1)"),
    ("the largest p is searched below", "rank-1-7-cold", 'side="right") - 1', 'side="left") - 1'),
    ("a rank may be C(M, N)", "rank-beyond", "int(ranks.max()) >= total", "int(ranks.max()) > total"),
)
patched(
    "terms.nm.index.codec",
    ("a position may be M", "position-above-m", "wrong = positions >= m", "wrong = positions > m"),
    (
        "positions may be equal",
        "positions-descend",
        "positions[:, :, 1:] <= positions",
        "positions[:, :, 1:] < positions",
    ),
    (
        "positions may descend",
        "positions-descend",
        "wrong[:, :, 1:] |= positions[:, :, 1:] <= positions[:, :, :-1]",
        "pass",
    ),
    (
        "positions ascend in a whole row",
        "fixed-1-2",
        "    wrong = positions >= m\n",
        "    wrong = positions >= m\n    wrong[:, 1:, :1] |= positions[:, 1:, :1] <= positions[:, :-1, -1:]\n",
    ),
)
patched(
    "terms.nm.codec",
    (
        "the first mask row of a run is its first row",
        "seeded-1-128-long",
        "return codec.decode(index, layout, seed, first // layout.share, mask_rows, groups), scales",
        "return codec.decode(index, layout, seed, first, mask_rows, groups), scales",
    ),
    (
        "an entry at the last column counts as beyond",
        "fixed-3-7-k3",
        "(last.astype(np.int64) + (groups - 1) * layout.m >= columns)",
        "(last.astype(np.int64) + (groups - 1) * layout.m >= columns - 1)",
    ),
    (
        "an entry at the first column beyond is allowed",
        "field-beyond-columns",
        "(last.astype(np.int64) + (groups - 1) * layout.m >= columns)",
        "(last.astype(np.int64) + (groups - 1) * layout.m > columns)",
    ),
    (
        "rows share masks in another order",
        "fixed-3-7-k3",
        ")[np.arange(here) // layout.share]\n            if codes",
        ")[np.arange(here) % mask_rows]\n            if codes",
    ),
)
patched(
    "terms.nm.scatter",
    (
        "row r uses mask row r mod n",
        "fixed-1-2",
        "positions[np.arange(rows) // share]",
        "positions[np.arange(rows) % positions.shape[0]]",
    ),
    (
        "scale groups count columns",
        "fixed-3-255",
        "np.repeat(half, min(scale_group or kept, kept), axis=1)[:, :kept]",
        "half[:, np.arange(kept) // n * m // (scale_group or kept * m)]",
    ),
    (
        "scale groups start anew in each group",
        "fixed-3-255",
        "np.repeat(half, min(scale_group or kept, kept), axis=1)[:, :kept]",
        "half[:, np.arange(kept) % n // (scale_group or kept)]",
    ),
    (
        "values are halved after the product",
        "nm-subnormal-f32-scales",
        "half = scales * np.float32(0.5)",
        "half = scales.astype(np.float64) * 0.5",
    ),
    ("values are not halved", "cold-but-stored", "half = scales * np.float32(0.5)", "half = scales"),
    (
        "fields count from the other end",
        "cold-but-stored",
        "(2 * codes.astype(np.int32) - top)",
        "(top - 2 * codes.astype(np.int32))",
    ),
    (
        "entries beyond the last column wrap",
        "fixed-3-255",
        "return np.ascontiguousarray(out.reshape(rows, groups * m)[:, :columns])",
        "return np.ascontiguousarray(np.roll(out.reshape(rows, groups * m), groups * m - columns, 1)[:, :columns])",
    ),
)
patched(
    "terms.nm.layout",
    (
        "both grids end at 2**k - 1",
        "cold-but-stored",
        'return (1 << self.bits) - (2 if self.grid == "midtread" else 1)',
        "return (1 << self.bits) - 1",
    ),
    (
        "both grids end at 2**k - 2",
        "nm-subnormal-f32-scales",
        'return (1 << self.bits) - (2 if self.grid == "midtread" else 1)',
        "return (1 << self.bits) - 2",
    ),
    (
        "a row has the scales of its columns",
        "fixed-3-255",
        "return -(-self.kept(columns) // self.scale_group)",
        "return -(-columns // self.scale_group)",
    ),
    (
        "the last scale group of a row is whole",
        "fixed-3-255",
        "return -(-self.kept(columns) // self.scale_group)",
        "return self.kept(columns) // self.scale_group",
    ),
    ("the last group of a row is whole", "fixed-3-255", "return -(-columns // self.m)", "return columns // self.m"),
    ("the index has a mask row for each row", "fixed-1-2", "return -(-rows // self.share)", "return rows"),
    ("M may be 256", "nm-m-256", "2 <= self.m <= MAX_M", "2 <= self.m <= 256"),
    ("M may not be 255", "fixed-3-255", "2 <= self.m <= MAX_M", "2 <= self.m < MAX_M"),
    ("M may be 1", "nm-m-1", "2 <= self.m <= MAX_M", "1 <= self.m <= MAX_M"),
    ("N may not be M", "fixed-16-16-k5", "1 <= self.n <= self.m", "1 <= self.n < self.m"),
    ("N may be above M", "n-above-m", "1 <= self.n <= self.m", "1 <= self.n"),
)
wrong("codes may have 7 bits", "nm-7-bits", Constant("terms.nm.layout.BITS", (1, 2, 3, 4, 5, 6, 7, 8)))
wrong("codes may not have 5 bits", "fixed-16-16-k5", Constant("terms.nm.layout.BITS", (1, 2, 3, 4, 6, 8)))
wrong("masks may be shared by 16 rows", "nm-share-16", Constant("terms.nm.layout.SHARES", (1, 2, 4, 8, 16)))
wrong("masks may be shared by 4 rows at most", "rank-1-7-cold", Constant("terms.nm.layout.SHARES", (1, 2, 4)))
wrong("a seeded M is 64 at most", "seeded-1-128-many-groups", Constant("terms.nm.index.encodings.MAX_SEEDED_M", 64))
