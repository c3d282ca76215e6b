"""Wrong readers of floating-point numbers and of base tensors (sections 7.8, 10 and 11.5)."""

from __future__ import annotations

from .wrong import Patch, patched, wrong

FLOATS = "terms.floats"
SUM = "total = wide + delta"
EQUAL = "found = np.where(delta == 0, base, rounded) if base_dtype == dtype else rounded"
CHOICE = "np.where(delta == 0, converted, rounded)"
ROUND = "rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)"
patched(
    FLOATS,
    ("BF16 is cut off", "add-bf16-to-bf16", ROUND, "rounded = bits >> np.uint32(16)"),
    ("ties of BF16 go up", "add-bf16-to-bf16", ROUND, "rounded = bits + np.uint32(0x8000) >> np.uint32(16)"),
    (
        "ties of BF16 go to odd",
        "add-bf16-to-bf16",
        ROUND,
        ROUND.replace("& np.uint32(1))", "& np.uint32(1) ^ np.uint32(1))"),
    ),
    (
        "F16 subnormals are lost",
        "add-bf16-to-f16",
        "return values.astype(np.float16).view(np.uint16)",
        "return np.where(np.abs(values) < 2.0**-14, np.float32(0), values).astype(np.float16).view(np.uint16)",
    ),
    (
        "F16 does not go to infinity",
        "add-bf16-to-f16",
        "return values.astype(np.float16).view(np.uint16)",
        "return np.clip(values, -65504, 65504).astype(np.float16).view(np.uint16)",
    ),
    (
        "F16 subnormals are widened to zero",
        "add-f16-to-bf16",
        "return raw.view(np.float16).astype(np.float32)",
        "return np.where(raw & 0x7C00, raw, raw & 0x8000).astype(np.uint16).view(np.float16).astype(np.float32)",
    ),
    (
        "the delta is rounded to the dtype first",
        "add-bf16-to-bf16",
        SUM,
        "total = wide + widen(narrow(delta, dtype), dtype)",
    ),
    (
        "the base is rounded to the dtype first",
        "add-bf16-to-f16",
        SUM,
        "total = widen(narrow(wide, dtype), dtype) + delta",
    ),
    ("the delta is subtracted", "actions-with-base", SUM, "total = wide - delta"),
    ("a delta of zero is added, too", "add-bf16-to-f16", CHOICE, "rounded"),
    (
        "a delta of -0 changes a NaN of the base",
        "add-zero-to-nan",
        EQUAL,
        EQUAL.replace("delta == 0", "delta.view(np.uint32) == 0"),
    ),
    (
        "a base of zero gets the delta's sign",
        "add-bf16-to-f16",
        CHOICE,
        "np.where((delta == 0) & (wide != 0), converted, rounded)",
    ),
    ("a NaN of the base is made quiet", "add-zero-to-nan", EQUAL, "found = rounded"),
    (
        "a NaN keeps its place where the dtype stays",
        "nan-bf16-to-bf16",
        EQUAL,
        "found = np.where(np.isnan(wide), base, rounded) if base_dtype == dtype else rounded",
    ),
    ("a NaN's fraction is shifted down", "nan-bf16-to-f32", "bits << 16\n", "bits << 16 | bits & 0x3F\n"),
    ("the fraction of an F16 NaN keeps its lowest place", "nan-f16-to-bf16", "(bits & 0x3FF) << 13", "bits & 0x3FF"),
    ("the sign of an F16 NaN is lost", "nan-f16-to-bf16", "(bits & 0x8000) << 16 | ", ""),
    ("a NaN is not made quiet", "nan-bf16-to-bf16", 'bits = bits | NANS["F32"]', "bits = bits | 0x7F800000"),
    (
        "a NaN of the sum is negative",
        "add-infinity-to-infinity",
        "np.where(np.isnan(total), NANS[dtype], narrow(total, dtype))",
        "np.where(np.isnan(total), NANS[dtype] | 1 << (31 if dtype == 'F32' else 15), narrow(total, dtype))",
    ),
)
wrong(
    "the sum is rounded to BF16 in one step",
    "add-bf16-to-bf16",
    Patch(
        FLOATS,
        SUM,
        "exact = wide.astype(np.float64) + delta; near = exact.astype(np.float32); "
        "total = np.where((near != exact) & (near.view(np.uint32) & 0xFFFF == 0x8000), "
        "np.nextafter(near, np.where(exact > near, np.inf, -np.inf).astype(np.float32)), near)",
    ),
)
patched(
    "terms.scales",
    (
        "a scale may be -0",
        "lowbit-minus-zero-scale",
        'if bits.size and int(bits.max()) >= (0x7F80 if dtype == "BF16" else 0x7F800000):',
        (
            "bits = np.where(bits << 1, bits, 0).astype(bits.dtype)\n"
            '    if bits.size and int(bits.max()) >= (0x7F80 if dtype == "BF16" else 0x7F800000):'
        ),
    ),
    (
        "a scale may be infinite",
        "infinite-f32-scale",
        'int(bits.max()) >= (0x7F80 if dtype == "BF16" else 0x7F800000):',
        'int(bits.max()) > (0x7F80 if dtype == "BF16" else 0x7F800000):',
    ),
    (
        "the largest scales are refused",
        "nm-subnormal-f32-scales",
        '(0x7F80 if dtype == "BF16" else 0x7F800000):',
        '(0x7F00 if dtype == "BF16" else 0x7F000000):',
    ),
    (
        "subnormal scales are zero",
        "lowbit-rounded",
        "scales = widen(np.ascontiguousarray(raw).view(RAW_DTYPES[dtype]), dtype)",
        (
            "scales = widen(np.ascontiguousarray(raw).view(RAW_DTYPES[dtype]), dtype)\n"
            "    scales = np.where(scales < 2.0**-126, np.float32(0), scales)"
        ),
    ),
    ("F16 values may be infinite", "lowrank-f16-not-finite", '"F16": 0x7C00', '"F16": 0xFFFF'),
    ("BF16 values may not be finite", "lowrank-bf16-not-finite", '{"BF16": 0x7F80, "F16"', '{"BF16": 0xFFFF, "F16"'),
    (
        "F32 values may not be finite",
        "lowrank-f32-not-finite",
        '"F32": 0x7F800000}[dtype])',
        '"F32": 0xFFFFFFFF}[dtype])',
    ),
)
FLOAT8 = "checkpoint.float8"
patched(
    FLOAT8,
    ("E4M3 has bias 8", "scaled-base", '"F8_E4M3": (3, 7)', '"F8_E4M3": (3, 8)'),
    ("E5M2 has bias 16", "scaled-base", '"F8_E5M2": (2, 15)', '"F8_E5M2": (2, 16)'),
    (
        "E4M3 has an infinity",
        "scaled-f8-e4m3-alone",
        "values[codes & 0x7F == 0x7F] = np.nan",
        "values[codes & 0x7F == 0x7F] = np.inf",
    ),
    ("E4M3 has no NaN", "scaled-f8-e4m3-alone", "values[codes & 0x7F == 0x7F] = np.nan", "pass"),
    ("E5M2 has no infinity", "scaled-f8-e5m2-alone", "np.where(mantissa[top] == 0, np.inf, np.nan)", "np.nan"),
    (
        "subnormal codes are zero",
        "scaled-base",
        "(normal << bits) + mantissa",
        "np.where(normal, (normal << bits) + mantissa, 0)",
    ),
    ("E8M0 has bias 128", "scaled-f8-e4m3-f8-e8m0", "np.ldexp(1.0, codes - 127)", "np.ldexp(1.0, codes - 128)"),
    ("E8M0 0 is zero", "scaled-f8-e4m3-f8-e8m0", "values[255] = np.nan", "values[0] = 0"),
    ("a value that is no number keeps its bits", "scaled-f8-e4m3-alone", "    if lost.any():", "    if False:"),
    ("values are cut off", "scaled-base", "bits += np.uint32(0x7FFF)", "bits -= odd"),
    (
        "the scale of a block is that of the next row",
        "scaled-base",
        "place // step for place, step in zip(places, block, strict=False)",
        "np.minimum(place + 1, size - 1) // step for place, step, size in zip(places, block, shape, strict=False)",
    ),
    ("scales divide", "scaled-base", "values *= scales", "values /= scales"),
    (
        "the block's columns are one less",
        "scaled-base",
        "np.repeat(found, block[-1], axis=1)",
        "np.repeat(found, max(block[-1] - 1, 1), axis=1)",
    ),
)
patched(
    "delta",
    (
        "terms are summed from the last to the first",
        "sum-beyond",
        "for codec, packed in self._terms:",
        "for codec, packed in reversed(self._terms):",
    ),
    (
        "only the first term counts",
        "layout-shared",
        "total = dense if total is None else total + dense",
        "total = dense if total is None else total",
    ),
    (
        "terms are summed in float64",
        "sum-beyond",
        "total = dense if total is None else total + dense",
        "total = dense.astype(np.float64) if total is None else total + dense",
    ),
)
