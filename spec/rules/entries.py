"""Rules of sections 7.4, 7.5, 7.8 and 9: tensor entries, bases and limits."""

from __future__ import annotations

from .rule import Patch, Skip, rule

ENTRIES = "index.entries"
rule(
    "7.4",
    "`{digest: bytes 32, dtype, shape}`",
    "digest-long",
    Patch("format.checks", "type(value) is not bytes or len(value) != length", "type(value) is not bytes"),
)
rule("7.4", "Every tensor of the fine-tune has an entry", others="unknown-action", reason="its meaning is unknown")
rule("7.4", "is a name as in safetensors", others="unknown-dtype lower-case-dtype", reason="its size is unknown")
rule(
    "7.4",
    "Elements of fewer than 8 bits are packed without gaps",
    "every-dtype",
    Patch(
        "format.constants",
        "element_count(shape) * DTYPE_BITS[dtype] // 8",
        "element_count(shape) * max(DTYPE_BITS[dtype], 8) // 8",
    ),
)
rule("7.4", "array of sizes", "negative-size", Patch("format.checks", "check_uint(size, where)", "pass"))
rule(
    "7.4",
    "dtype and shape equal",
    "same-other-dtype same-other-shape",
    Skip(ENTRIES, "a tensor that is the same has the base's dtype and shape"),
)
rule(
    "7.4",
    "the bytes of the buffer `data`, C order",
    "replace-short replace-long",
    Skip(f"{ENTRIES}:_parse_replace", "bytes where the shape needs"),
)
TARGET = Skip("container.file_index", "is not a tensor of its own")
rule(
    "7.4",
    "which is not an alias",
    "alias-of-alias aliases-of-each-other",
    TARGET,
    others="alias-of-nothing",
    reason="what is not there has no bytes",
)
rule("7.4", "which is not an alias", "alias-of-itself", TARGET, Skip(ENTRIES, "is not the name of another tensor"))
rule(
    "7.4",
    "has the same dtype and shape (tied weights)",
    "alias-other-dtype alias-other-shape",
    Skip("container.file_index", "has another dtype or shape"),
)
PARTS = Skip(ENTRIES, "has no parts, because its elements share bytes")
rule("7.4", "whose elements MUST have whole bytes", "parts-of-f4", PARTS)
rule(
    "7.4",
    "an array of at least one part",
    "parts-none",
    Patch(ENTRIES, "if type(obj) is not list or not obj:", "if type(obj) is not list:"),
)
rule(
    "7.4",
    "each an array `[name, start, count]`",
    "parts-negative parts-negative-count",
    Patch(ENTRIES, 'check_uint(value, (where, "[", i, "]"), c.MAX_ELEMENTS)', "value"),
    Patch(ENTRIES, 'check_uint(start + count, (where, "[", i, "]"), c.MAX_ELEMENTS)', "pass"),
)
rule(
    "7.4",
    "each an array `[name, start, count]`",
    "part-of-four",
    Patch(ENTRIES, "type(row) is not list or len(row) != 3 or", "type(row) is not list or"),
    Patch(ENTRIES, "for value in row[1:])", "for value in row[1:3])"),
)
rule(
    "7.4",
    "The counts MUST sum to the elements of `shape`",
    "parts-too-few parts-too-many",
    Skip(ENTRIES, "elements where the shape needs"),
)
rule(
    "7.4",
    "in C order",
    "parts-in-any-order base-parts",
    Patch("checkpoint.stitched", "Run(tensor, part.start, ", "Run(tensor, 0, "),
)
rule(
    "7.4",
    "dtype and the base's dtype MUST be BF16, F16 or F32",
    "add-f64 add-to-integers add-integers",
    Skip(ENTRIES, "is not defined"),
)
SHAPES = "if not shape or len(shape) != len(base.shape) or shape[1:] != base.shape[1:]:"
rule("7.4", "at least 1", "add-0d", Patch(ENTRIES, SHAPES, SHAPES.replace("not shape or ", "")))
rule("7.4", "the shapes MUST have the same length", "add-other-dimensions", Patch(ENTRIES, SHAPES, "if False:"))
rule("7.4", "and MUST agree except", "add-other-columns", Patch(ENTRIES, SHAPES, "if False:"))
rule(
    "7.4",
    "the first dimension MAY differ when there are two dimensions or more",
    "add-1d-grown add-1d-shrunk",
    Skip(ENTRIES, "a 1-d tensor cannot grow"),
)
rule(
    "7.4",
    "no size may be 0",
    "add-empty add-to-empty",
    Skip(ENTRIES, "a tensor without elements has no delta"),
)
NEW = Skip(ENTRIES, "new rows take")
rule(
    "7.4",
    "`data` holds the others, in the fine-tune's dtype",
    "add-new-rows-short add-new-rows-missing add-new-rows-of-base",
    NEW,
)
rule("7.4", "otherwise `data` is absent", "add-new-rows-empty add-shrunk-with-data", NEW)
rule("7.4", "an array of 1 to 16 terms", "terms-none terms-17", Skip(ENTRIES, "expected a list of 1 to"))
rule(
    "7.4",
    "of any kinds",
    "sum-of-kinds terms-16",
    Patch(ENTRIES, "<= len(terms_obj) <= MAX_TERMS", "<= len(terms_obj) < 3"),
)
rule(
    "7.4",
    "the number of a layout",
    "layout-negative",
    Patch(ENTRIES, 'check_uint(number, (where, ".layout"))', "pass"),
    others="layout-beyond",
    reason="a term without a layout has no meaning",
)
rule(
    "7.4",
    "a seed (u32",
    "seed-beyond",
    Patch(ENTRIES, 'check_uint(seed, (where, ".seed"), 2**32 - 1)', 'check_uint(seed, (where, ".seed"))'),
)
rule(
    "7.4",
    "0 unless the layout is `nm` with a `seeded` index",
    "seed-of-fixed lowbit-seed lowrank-seed sparse-seed",
    Skip(ENTRIES, "a layout that is not seeded has seed 0"),
)
rule(
    "7.4",
    "with exactly the names and lengths that the layout gives",
    others="buffer-length buffer-longer",
    reason="a buffer of another length has other words in it",
)
rule(
    "7.4",
    "A term of a `sparse` layout has a further key, `slots`",
    others="sparse-without-slots lowbit-with-slots",
    reason="the lengths depend on it; of other kinds, they do not",
)
LEADING = Skip(ENTRIES, "for a tensor of {} dimensions")
rule(
    "7.4",
    "an integer from 1 to the number of dimensions less 2",
    "leading-none leading-all leading-too-many",
    LEADING,
)
rule(
    "7.4",
    "The rows are then those of the first `leading` dimensions",
    "leading-dimensions leading-two",
    Patch(
        "format.constants", "if leading is None else shape[:leading])", "if leading is None else shape[: leading + 1])"
    ),
)

LIKE = "same = tensor is not None and (tensor.dtype, tensor.shape) == (base.dtype, base.shape)"
DIFFERS = Patch("pipeline.unpack", "if base is not None and digest != base.digest:", "if False:")
COMPARE = "Whoever applies a delta MUST compare the digest and MUST refuse a base that differs"
rule("7.5", COMPARE, "wrong-base wrong-base-same", DIFFERS)
rule(
    "18",
    "MUST compare the digests of every base (7.5) that it uses",
    "parent-of-another-base",
    DIFFERS,
)
rule(
    "7.5",
    COMPARE,
    "wrong-base-shape wrong-base-dtype",
    DIFFERS,
    Patch("pipeline.bases", LIKE, "same = tensor is not None"),
    others="wrong-base-missing",
    reason="what is not there cannot be added to",
)
rule(
    "7.5",
    "followed by the tensor's bytes in C order",
    "add-1d add-3d actions-with-base",
    Patch("checkpoint.fingerprint", "deltafmt tensor v1\\n", "deltafmt tensor v2\\n"),
)
rule(
    "7.4",
    "Every named tensor MUST have the dtype `dtype`",
    "part-of-other-dtype",
    DIFFERS,
    Patch("checkpoint.stitched", "tensor.dtype != dtype or ", ""),
)
rule(
    "7.4",
    "at least `start + count` elements, whatever its shape",
    others="part-beyond-its-tensor",
    reason="elements that are not there cannot be added to",
)

SUM = Patch(ENTRIES, 'check_uint(start + count, (where, "[", i, "]"), c.MAX_ELEMENTS)', "pass")
rule("7.4", "and their sum MUST be at most 2^48", "parts-beyond", SUM)
rule(
    "7.4",
    "`count` MAY be 0",
    "parts-at-the-ends",
    Patch(
        ENTRIES,
        "parts.append(BasePart(row[0], start, count))",
        "parts.append(BasePart(row[0], start, count or fail(where, '0')))",
    ),
)
METADATA = Skip("container.file_index", "a safetensors file keeps no tensor under this name")
rule(
    "7.4",
    "which MUST NOT be `__metadata__`, alone or behind a last",
    "name-of-metadata name-of-metadata-in-folder",
    METADATA,
)
rule(
    "7.4",
    "which MUST NOT be `__metadata__`, alone or behind a last",
    "names-close-to-metadata",
    Patch("container.file_index", 'name.rpartition("/")[2] == _NO_TENSOR', "True"),
)
WHOLE = Skip("format.checks", "does not take whole bytes")
rule("7.4", "MUST take whole bytes together", "half-a-byte half-a-byte-of-base", WHOLE)

SCALED = "index.scaled"
rule(
    "7.8",
    "array of integers of at least 1, one for each dimension",
    "scaled-empty-block scaled-block-of-three scaled-block-of-one",
    Skip(SCALED, "is no block of a tensor of shape"),
)
rule(
    "7.8",
    "`dtype` is F8_E4M3 or F8_E5M2",
    "scaled-integers",
    Patch(SCALED, "if codes.dtype not in c.CODE_DTYPES:", "if False:"),
)
rule(
    "7.8",
    "`dtype` is F32, BF16, F16, F8_E8M0 or U8",
    "scaled-wide-scales",
    Patch(SCALED, "if scales.dtype not in c.SCALE_DTYPES:", "if False:"),
)
rule(
    "7.8",
    "and as many scales as blocks, in C order",
    "scaled-too-few scaled-too-many",
    Skip(SCALED, "scales where the blocks need"),
)

rule(
    "9",
    "MUST refuse, before it allocates anything for it",
    others="huge-index overflowing-index",
    reason="a larger index is too large for a vector",
)
rule("9", "members of any map or array of the index", reason="a million members are too many for a vector")
rule(
    "9",
    "dimensions of a shape",
    "nine-dimensions",
    Patch("format.checks", "if type(value) is not list or len(value) > c.MAX_RANK:", "if type(value) is not list:"),
)
rule(
    "9",
    "dimensions of a shape",
    "eight-dimensions",
    Patch("format.checks", "len(value) > c.MAX_RANK", "len(value) >= c.MAX_RANK"),
)
rule(
    "9",
    "elements of a shape, sizes of 0 counted as 1",
    "too-many-elements endless-shape overflowing-shape too-many-elements-in-base",
    Skip("format.checks", "has more than {} elements"),
)
rule(
    "9",
    "elements of a shape, sizes of 0 counted as 1",
    "most-elements",
    Patch("format.constants", "return count <= MAX_ELEMENTS", "return count < MAX_ELEMENTS"),
)
NAMES = "the name of a tensor, of a part, of a removed or scaled tensor, of scales, or of an attachment"
rule("9", NAMES, "empty-name-tensor long-name-tensor", Skip("container.file_index", "a name has 1 to"))
rule(
    "9",
    NAMES,
    "empty-name-removed long-name-removed empty-name-part long-name-part scaled-nameless-scales scaled-nameless",
    Skip("format.checks", "a name has 1 to"),
)
rule("9", NAMES, "attachment-long-name", Patch("index.file_names", "> c.MAX_NAME_BYTES:", "> c.MAX_INDEX_BYTES:"))
rule(
    "9",
    "1 to 1,024 bytes",
    "longest-names",
    Patch("format.checks", '"surrogatepass")) <= c.MAX_NAME_BYTES', '"surrogatepass")) < c.MAX_NAME_BYTES'),
)
rule("9", "terms of a tensor", "terms-17", Skip(ENTRIES, "expected a list of 1 to"))
rule("9", "raw lengths of all sections, summed", reason="2^40 raw bytes take 54 MB of frames, too many for a vector")
rule(
    "9",
    "MUST NOT decide an allocation before it has been checked",
    others="zstd-too-little-stored endless-shape index-endless-array",
    reason="what a reader allocates is not seen in its answer",
)
