"""Rules of sections 10 to 14: arithmetic and the four kinds of term."""

from __future__ import annotations

from .rule import Patch, Skip, rule

FLOATS = "terms.floats"
rule(
    "10.1",
    "in the order of the array, each sum rounded to nearest",
    "sum-in-order",
    Patch(
        "delta",
        "total = dense if total is None else total + dense",
        "total = dense if total is None else dense + total * 1.0000001",
    ),
)
rule(
    "10.1",
    "in the order of the array",
    "sum-in-order",
    Patch("delta", "for codec, packed in self._terms:", "for codec, packed in reversed(self._terms):"),
)
rule(
    "10.2",
    "with equal dtypes bit for bit, whatever it is",
    "add-zero-to-nan",
    Patch(FLOATS, "np.where(delta == 0, base, rounded) if base_dtype == dtype else rounded", "rounded"),
)
rule(
    "10.2",
    "Where the delta is zero (of either sign)",
    "add-bf16-to-bf16 add-f32-to-bf16",
    Patch(FLOATS, "np.where(delta == 0, converted, rounded)", "rounded"),
    Patch(FLOATS, "np.where(delta == 0, base, rounded) if base_dtype == dtype else rounded", "rounded"),
)
rule(
    "10.3",
    "rounded once to float32 and then to the fine-tune's dtype",
    "add-bf16-to-bf16 add-f32-to-bf16",
    Patch(
        FLOATS,
        "total = wide + delta",
        "total = (wide.astype(np.float64) + delta + (delta > 0) * 1e-9).astype(np.float32)",
    ),
)
NAN = "convert_nan(base, base_dtype, dtype)"
PAIRS = [f"nan-{base}-to-{new}" for base in ("bf16", "f16", "f32") for new in ("bf16", "f16", "f32")]
rule("10.5", "if the base's element is NaN, whatever the delta", " ".join(PAIRS), Patch(FLOATS, NAN, "NANS[dtype]"))
rule(
    "10.5",
    "it is 0x7FC0 in BF16, 0x7E00 in F16, 0x7FC00000 in F32",
    "add-infinity-to-infinity",
    Patch(
        FLOATS,
        "np.where(np.isnan(total), NANS[dtype], narrow(total, dtype))",
        "narrow(np.where(np.isnan(total), -np.abs(total), total), dtype)",
    ),
)
rule(
    "10.4",
    "subnormal numbers are kept",
    "nm-subnormal-f32-scales",
    Patch(
        "terms.nm.scatter",
        "half = scales * np.float32(0.5)",
        "half = np.where(scales < 2.0**-126, 0, scales * np.float32(0.5))",
    ),
)
rule(
    "10.4",
    "no product is fused with a sum",
    "lowrank-rounded",
    Patch(
        "terms.levels",
        "out += left[:, None] * right",
        "out[...] = (out.astype(np.float64) + left[:, None].astype(np.float64) * right).astype(np.float32)",
    ),
)

NM = "terms.nm.layout"
CODING = "terms.coding"
RANGES = {
    "1 <= N <= M, 2 <= M <= 255": [
        ("nm-keeps-none n-above-m", Skip(NM, "is outside 1 to M")),
        ("nm-m-1 nm-m-256", Skip(NM, "group size M =")),
    ],
    "1, 2, 3, 4, 5, 6, 8 |": [("nm-7-bits nm-9-bits", Skip(NM, "bits k ="))],
    "M a power of two, at most 128": [("seeded-m-12", Skip("terms.nm.index.encodings", "a seeded index needs M"))],
    "C(M, N) < 2^64": [("rank-of-65-bits", Skip("terms.nm.index.encodings", "a rank index needs"))],
    "not in the table of a `hot` file": [
        ("rank-in-hot-file", Skip("container.file_index", "a rank index stands in a hot file"))
    ],
    "`midtread` (k >= 2) or `midrise`": [
        ("nm-grid", Skip(CODING, "grid {} is not one of")),
        ("nm-midtread-1-bit", Skip(CODING, "a midtread grid of 1 bit")),
    ],
    "consecutive rows that keep the same positions": [("nm-share-3 nm-share-16", Skip(NM, "share v ="))],
    "`BF16`, `F32`": [("nm-scale-dtype", Skip(CODING, "scale dtype"))],
    "0 to 2^31 - 1": [("nm-scale-group", Skip(CODING, "scale group {} is outside"))],
}
for _words, _cases in RANGES.items():
    for _vectors, _skip in _cases:
        rule("11.1", _words, _vectors, _skip)
rule(
    "11.1",
    "0 to 2^31 - 1",
    "nm-scale-group-most",
    Patch(CODING, "0 <= scale_group <= MAX_SCALE_GROUP", "0 <= scale_group < MAX_SCALE_GROUP"),
    others="nm-scale-group-negative",
    reason="a negative group gives a negative number of scales",
)
rule("11.1", "index encoding", others="nm-index", reason="the positions of another encoding are unknown")

UNUSED = "terms.unused"
USED = "if used and (packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():"
ABSENT = "if lane.size and last[tile, :, lane].view(np.uint8).any():"
rule(
    "11.2",
    "unused bits of its last word are zero",
    "unused-bits unused-bits-of-a-plane fixed-unused-bits rank-unused-bits lowbit-unused-bits "
    "lowbit-unused-bits-of-a-plane lowbit-unused-bits-of-last-plane lowbit-unused-bits-of-second-tile "
    "lowbit-highest-unused-bit",
    Patch(UNUSED, USED, "if False:"),
)
rule(
    "11.2",
    "Words of rows that do not exist are zero",
    "word-of-no-row word-of-no-row-late fixed-word-of-no-row rank-word-of-no-row lowbit-word-of-no-row",
    Patch(UNUSED, ABSENT, "if False:"),
)
rule("11.3", "those of rows that do not exist are zero", "scale-of-no-row", Patch(UNUSED, ABSENT, "if False:"))
INDEX = "terms.nm.index.codec"
rule(
    "11.4",
    "Positions MUST be below M",
    "position-above-m",
    Patch(INDEX, "wrong = positions >= m", "wrong = positions > 255"),
)
rule(
    "11.4",
    "and strictly ascending within a group",
    "positions-descend positions-descend-late positions-equal",
    Patch(INDEX, "wrong[:, :, 1:] |= positions[:, :, 1:] <= positions[:, :, :-1]", "pass"),
)
rule(
    "11.4",
    "and strictly ascending within a group",
    "positions-equal",
    Patch(INDEX, "positions[:, :, 1:] <= positions", "positions[:, :, 1:] < positions"),
)
rule("11.4", "It MUST be below C(M, N)", "rank-beyond", Skip("terms.nm.index.rank", "is not below"))
BEYOND = "entry beyond the last column has a code that is not zero"
rule(
    "11.4",
    "its field of `codes` MUST be zero",
    "field-beyond-columns field-beyond-columns-fixed field-beyond-columns-rank field-beyond-columns-late",
    Skip("terms.nm.codec:_check_beyond", BEYOND),
)
FIELD = Skip(f"{UNUSED}:check_fields", "the grid ends at")
rule("11.5", "the field 2^k - 1 MUST NOT occur", "field-beyond-grid", FIELD)
FINITE = Skip("terms.scales:check_scales", "a scale is negative or not finite")
KINDS = ("infinite", "nan", "negative", "minus-zero")
rule(
    "11.5",
    "A scale MUST be finite and not negative (not even -0)",
    " ".join(f"{kind}-scale {kind}-f32-scale" for kind in KINDS),
    FINITE,
)

rule("12.1", "1 to 8", "lowbit-9-bits lowbit-0-bits", Skip(CODING, "bits k ="))
rule("12.1", "`midtread` (k >= 2), `midrise`, `asymmetric`", "lowbit-grid", Skip(CODING, "grid {} is not one of"))
rule(
    "12.1",
    "`midtread` (k >= 2), `midrise`, `asymmetric`",
    "lowbit-midtread-1-bit",
    Skip(CODING, "a midtread grid of 1 bit"),
)
rule("12.1", "`BF16`, `F32`", "lowbit-scale-dtype", Skip(CODING, "scale dtype"))
rule("12.1", "0 to 2^31 - 1", "lowbit-scale-group", Skip(CODING, "scale group {} is outside"))
LOWBIT = "terms.lowbit.layout"
rule(
    "12.1",
    "`row`; `column` with `scale_group` 0",
    others="lowbit-axis",
    reason="how scales of another axis lie is unknown",
)
rule(
    "12.1",
    "`column` with `scale_group` 0",
    "lowbit-column-groups",
    Skip(LOWBIT, "scales of columns have scale group 0"),
)
rule(
    "12.1",
    "and a grid other than `asymmetric`",
    "lowbit-asymmetric-columns",
    Skip(LOWBIT, "an asymmetric grid has its scales along rows"),
    Patch("terms.lowbit.codec", 'check_absent("zero_points", packed["zero_points"], rows)', "pass"),
)
rule(
    "12.2",
    "Scales and zero points of rows that do not exist are zero",
    "lowbit-scale-of-no-row lowbit-scale-of-no-row-later lowbit-zero-point-of-no-row",
    Patch(UNUSED, ABSENT, "if False:"),
)
rule("12.3", "No field", "lowbit-field-beyond-grid lowbit-field-beyond-grid-late", FIELD)
POINT = Skip("terms.lowbit.codec:check_points", "a zero point is")
rule("12.3", "no zero point may exceed `top`", "lowbit-zero-point-beyond-grid", POINT)
rule(
    "12.3",
    "A scale MUST be finite and not negative (not even -0)",
    "lowbit-infinite-scale lowbit-minus-zero-scale lowbit-negative-column-scale",
    FINITE,
)

LOWRANK = "terms.lowrank.layout"
RANK = Skip(LOWRANK, "rank R = {} is outside")
MORE = Skip(LOWRANK, "rank R = {} is more than")
rule(
    "13.1", "1 to 65535", "lowrank-of-rank-0", RANK, others="lowrank-65536", reason="a matrix with so many is too large"
)
rule("13.1", "and at most the rows and at most the columns", "lowrank-above-columns lowrank-above-rows", MORE)
rule("13.1", "as values of that dtype", others="lowrank-f64", reason="what another dtype holds is not float32")
rule("13.1", "with the values of 12.1", "lowrank-9-bits", Skip(CODING, "bits k ="))
rule("13.1", "with the values of 12.1", "lowrank-midtread-1-bit", Skip(CODING, "a midtread grid of 1 bit"))
rule("13.1", "with the values of 12.1", "lowrank-grid", Skip(CODING, "grid {} is not one of"))
rule("13.1", "with the values of 12.1", "lowrank-scale-dtype", Skip(CODING, "scale dtype"))
rule("13.1", "with the values of 12.1", "lowrank-scale-group", Skip(CODING, "scale group {} is outside"))
LINES = "if used and (by_row.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():"
rule(
    "13.2",
    "the words of a row in 11.2, which here follow each other",
    "lowrank-unused-bits lowrank-unused-bits-of-v lowrank-unused-bits-of-a-plane",
    Patch(UNUSED, LINES, "if False:"),
)
CODEC = "terms.lowrank.codec"
rule(
    "13.3",
    "Fields, zero points and scales are bound as there",
    "lowrank-field-beyond-grid",
    Skip(f"{CODEC}:_check_coded", "the grid ends at"),
)
rule("13.3", "Fields, zero points and scales are bound as there", "lowrank-zero-point-beyond-grid", POINT)
rule("13.3", "Fields, zero points and scales are bound as there", "lowrank-negative-scale lowrank-nan-scale", FINITE)
rule(
    "13.3",
    "An element of the buffers `u` and `v`, of factors that are a dtype, MUST be finite",
    "lowrank-infinite lowrank-bf16-not-finite lowrank-f16-not-finite lowrank-f32-not-finite",
    Skip(f"{CODEC}:_check_values", "is not finite"),
)

SPARSE = "terms.sparse.layout"
rule("14.1", "1 to 8, 16", "sparse-gap-bits-9 sparse-gap-bits-0", Skip(SPARSE, "gap bits"))
rule(
    "14.1",
    "a power of two, 256 to 65536",
    "sparse-span sparse-span-128 sparse-span-131072",
    Skip(SPARSE, "is not a power of two"),
)
ONE = Skip(SPARSE, "sparse values have one scale a row")
rule("14.1", "with `scale_group` 0", "sparse-scale-group", ONE)
rule("14.1", "and a grid other than `asymmetric`", "sparse-asymmetric", ONE)
rule("14.1", "as in 13.1", "sparse-grid", Skip(CODING, "grid {} is not one of"))
rule("14.1", "as in 13.1", "sparse-9-bits", Skip(CODING, "bits k ="))
rule("14.1", "as in 13.1", "sparse-scale-dtype", Skip(CODING, "scale dtype"))
rule("14.1", "as values of that dtype", others="sparse-f64", reason="what another dtype holds is not float32")
rule(
    "14.1",
    "it MUST be at most `T * C` and below 2^32",
    others="sparse-too-many-slots",
    reason="of more slots than columns, one is not needed (14.3): the rule keeps a reader from making room for them",
)
CHECK = "terms.sparse.codec"
STARTS = "if starts[0] != 0 or starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():"
rule(
    "14.2",
    "`starts` MUST begin with 0",
    "sparse-starts",
    Patch(CHECK, STARTS, STARTS.replace("starts[0] != 0 or ", "")),
)
rule(
    "14.2",
    "MUST NOT descend",
    "sparse-starts-descend",
    Patch(CHECK, STARTS, "if starts[0] != 0 or starts[-1] != self.slots:"),
)
rule(
    "14.2",
    "and MUST end with `slots`",
    "sparse-starts-end",
    Patch(CHECK, STARTS, STARTS.replace("starts[-1] != self.slots or ", "")),
)
UNUSED_SPARSE = Patch(
    CHECK, "if used and (packed[name].view(np.uint32)[end - 1] >> np.uint32(used)).any():", "if False:"
)
rule(
    "14.2",
    "a word stream of one tile",
    "sparse-unused-bits sparse-unused-bits-of-a-plane sparse-unused-bits-of-codes",
    UNUSED_SPARSE,
)
rule("14.2", "the scales of the R rows, as in 12.2", "sparse-scale-of-no-row", Patch(UNUSED, ABSENT, "if False:"))
CHECKS = "terms.sparse.checks"
rule(
    "14.3",
    "An entry MUST lie before the end of its block",
    "sparse-beyond-columns sparse-beyond-columns-of-last-block sparse-beyond-block sparse-second-beyond-columns",
    Skip(CHECKS, "an entry lies beyond its block"),
)
rule(
    "14.3",
    "as are all those of lanes without a row",
    "sparse-entry-of-no-row sparse-entry-of-no-row-late",
    Skip(f"{CHECK}:check", "a row that does not exist has an entry"),
)
rule(
    "14.3",
    "of a filler MUST be zero",
    "sparse-filler-value sparse-filler-minus-zero sparse-filler-code",
    Skip(CHECKS, "a filler has a value that is not zero"),
)
rule(
    "14.3",
    "its last slot, if it has any, MUST hold an entry",
    "sparse-unneeded-slot sparse-unneeded-slot-of-first-block",
    Skip(f"{CHECKS}:check_run", "a block has a slot that no row needs"),
)
rule("14.4", "fields and scales are bound as there", "sparse-code-beyond-grid", Skip(CHECKS, "the grid ends at"))
rule("14.4", "fields and scales are bound as there", "sparse-negative-scale sparse-minus-zero-scale", FINITE)
rule(
    "14.4",
    "An element of the buffer `values`, of values that are a dtype, MUST be finite",
    "sparse-bf16-not-finite sparse-f16-not-finite sparse-f32-not-finite",
    Skip(CHECKS, "a value is not finite"),
)
