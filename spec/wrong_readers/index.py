"""Wrong readers of the index, of its entries and of digests (section 7)."""

from __future__ import annotations

from .wrong import patched

patched(
    "container.canonical",
    (
        "only the length of the index in its shortest form is compared",
        "signed-integer-of-16-bits",
        "if again != data:",
        "if len(again) != len(data):",
    ),
    (
        "names are sorted as UTF-16 sorts",
        "short-forms",
        "if list(obj) != sorted(obj):",
        "if list(obj) != sorted(obj, key=lambda name: name.encode('utf-16-be')):",
    ),
    (
        "names are sorted by length first",
        "attachment-names",
        "if list(obj) != sorted(obj):",
        "if list(obj) != sorted(obj, key=lambda name: (len(name), name)):",
    ),
    (
        "names are sorted whatever their case",
        "attachment-names",
        "if list(obj) != sorted(obj):",
        "if list(obj) != sorted(obj, key=str.lower):",
    ),
    ("names need not be sorted", "sorted-as-utf-16", "if list(obj) != sorted(obj):", "if False:"),
)
patched(
    "container.file_index",
    (
        "attachments are stored as they are in hot files",
        "attachment-empty",
        "and section.kind == c.SECTION_KIND_TENSORS ",
        "",
    ),
    (
        "cold files may not store sections as they are",
        "cold-but-stored",
        'if profile == "hot" and section.kind == c.SECTION_KIND_TENSORS and section.codec != c.CODEC_STORED:',
        'if (profile == "hot") == bool(section.codec) and section.kind == 1:',
    ),
    (
        "a rank index is refused in cold files",
        "rank-1-7-cold",
        'if profile == "hot" and any(layout.cold_only',
        "if any(layout.cold_only",
    ),
    (
        "a buffer may not end where its section does",
        "attachment-empty",
        "if ref.offset + ref.length > section.raw_length:",
        "if ref.offset + ref.length >= section.raw_length:",
    ),
    (
        "only the first buffer's section is looked at",
        "two-sections",
        "if ref.section != refs[0][1].section:",
        "if False:",
    ),
    (
        "an alias may have another dtype",
        "alias-other-dtype",
        'if [target.get("dtype"), target.get("shape")] != [entry.dtype, list(entry.shape)]:',
        'if target.get("shape") != list(entry.shape):',
    ),
    (
        "an alias may have another shape",
        "alias-other-shape",
        'if [target.get("dtype"), target.get("shape")] != [entry.dtype, list(entry.shape)]:',
        'if target.get("dtype") != entry.dtype:',
    ),
    ("removed names may stand twice", "removed-twice", "names != sorted(set(names))", "names != sorted(names)"),
    (
        "removed names need not be sorted",
        "removed-unsorted",
        "names != sorted(set(names))",
        "len(names) != len(set(names))",
    ),
    ("layouts may stand twice", "layout-twice", "if len(set(layouts)) != len(layouts):", "if False:"),
    ("the index may start after zeros", "index-gap", "if position != index_offset:", "if position > index_offset:"),
    (
        "a removed tensor's name may not be a beginning of a tensor's",
        "removed-beside",
        "any(name in tensors for name in names)",
        "any(key.startswith(name) for key in tensors for name in names)",
    ),
)
patched(
    "index.file_names",
    ("U+001F is allowed", "attachment-control", "ord(char) < 32", "ord(char) < 31"),
    ("U+007F is allowed", "attachment-delete", "127 <= ord(char)", "128 <= ord(char)"),
    ("U+009F is allowed", "attachment-control-late", "< 160", "< 159"),
    ("U+00A0 is refused", "attachment-names", "< 160", "<= 160"),
    ("parts are measured in characters", "attachment-long-part-of-umlauts", "len(part.encode()) >", "len(part) >"),
    (
        "names are measured in characters",
        "attachment-long-name",
        'len(name.encode("utf-8", "surrogatepass")) > c.M',
        "len(name) > c.M",
    ),
    (
        "only a name that starts with a full stop is hidden",
        "attachment-absolute",
        'all(map(_is_safe_part, name.split("/")))',
        "_is_safe_part(name)",
    ),
    ("names of devices count with their endings", "attachment-device-case", 'part.split(".", maxsplit=1)[0]', "part"),
    (
        "names of devices count up to their last full stop",
        "attachment-device-ending",
        'part.split(".", maxsplit=1)[0]',
        'part.rsplit(".", maxsplit=1)[0]',
    ),
    (
        "only the last part can be a device",
        "attachment-absolute",
        'all(map(_is_safe_part, name.split("/")))',
        'all(map(_is_safe_part, name.split("/")[-1:]))',
    ),
    (
        "only the name's own folder is looked at",
        "attachment-is-a-folders-folder",
        "for depth in range(1, len(parts)):",
        "for depth in range(max(len(parts) - 1, 1), len(parts)):",
    ),
    (
        "a name may not be the beginning of another",
        "attachment-names",
        "    for name in listed:\n        parts",
        (
            "    for name in listed:\n"
            "        if any(other != name and other.startswith(name) for other in listed):\n"
            "            return name, name\n"
            "        parts"
        ),
    ),
    ("lower case is that of Unicode", "attachments-allowed", "return name.translate(_LOWER)", "return name.lower()"),
    ("names are compared in their own case", "attachment-device", "return name.translate(_LOWER)", "return name"),
    (
        "only the last part can be a file of weights",
        "attachment-of-weights-folder",
        'for part in lower.split("/")',
        'for part in lower.split("/")[-1:]',
    ),
)
patched(
    "container.content",
    (
        "the content id leaves out attachments",
        "attachment-empty",
        '"attachments": {name: attachments[name].digest for name in sorted(attachments)},',
        '"attachments": {},',
    ),
    (
        "the content id leaves out the metadata",
        "every-action",
        '"metadata": {key: metadata[key] for key in sorted(metadata)},',
        '"metadata": {},',
    ),
    ("the content id leaves out removed tensors", "every-action", '"removed": list(removed),', '"removed": [],'),
    ("the content id leaves out scaled tensors", "scaled-rows", "if scaled is not None else {}", "if False else {}"),
    ("the content id leaves out scaled where it names none", "scaled-empty", "if scaled is not None", "if scaled"),
    (
        "the content id always has scaled tensors",
        "attachment-empty",
        '**({"scaled": {name: scaled[name].to_obj() for name in sorted(scaled)}} if scaled is not None else {}),',
        '"scaled": {name: scaled[name].to_obj() for name in sorted(scaled or {})},',
    ),
    ("the content id has the places of new rows", "buffers-empty", 'obj.pop("data", None)', "pass"),
    (
        "the content id has a rank index as it is",
        "rank-1-7-cold",
        "term.layout.plain().to_obj()",
        "term.layout.to_obj()",
    ),
    (
        "the content id has the numbers of layouts",
        "cold-but-stored",
        '"layout": term.layout.plain().to_obj()',
        '"layout": term.layout_number',
    ),
    ("the content id leaves out seeds and slots", "cold-but-stored", ", **term.numbers()}", "}"),
)
patched(
    "index.entries",
    (
        "the content id leaves out slots",
        "sparse-bf16-bitmap",
        '**({"slots": self.slots} if self.layout.has_slots else {})',
        "**{}",
    ),
    (
        "new rows are of the base's dtype",
        "add-new-rows-of-base",
        "c.byte_count(dtype, (columns,))",
        "c.byte_count(base.dtype, (columns,))",
    ),
    (
        "terms cover all rows of the fine-tune",
        "add-new-rows-missing",
        "shared = min(rows, c.row_count(base.shape, leading))",
        "shared = rows",
    ),
    (
        "terms cover all rows of the base",
        "add-shrunk",
        "shared = min(rows, c.row_count(base.shape, leading))",
        "shared = c.row_count(base.shape, leading)",
    ),
    (
        "a tensor that shrank is refused",
        "add-shrunk",
        "shape[1:] != base.shape[1:]:",
        "shape[1:] != base.shape[1:] or shape[0] < base.shape[0]:",
    ),
    (
        "a tensor that grew is refused",
        "every-action",
        "shape[1:] != base.shape[1:]:",
        "shape[1:] != base.shape[1:] or shape[0] > base.shape[0]:",
    ),
    ("a 1-d tensor has no delta", "add-1d", "if len(shape) == 1 and shape != base.shape:", "if len(shape) == 1:"),
    (
        "an add of other dtypes is refused",
        "add-f64",
        "if dtype not in c.DELTA_DTYPES or base.dtype not in c.DELTA_DTYPES:",
        "if dtype != base.dtype:",
    ),
    ("the base's dtype of a delta is not looked at", "add-to-integers", " or base.dtype not in c.DELTA_DTYPES:", ":"),
    ("the fine-tune's dtype of a delta is not looked at", "add-integers", "if dtype not in c.DELTA_DTYPES or ", "if "),
    ("leading dimensions may be all but the last", "leading-all", "<= len(shape) - 2:", "<= len(shape) - 1:"),
    (
        "a tensor may be the same in another shape",
        "same-other-shape",
        "if (base.dtype, base.shape) != (entry.dtype, entry.shape):",
        "if base.dtype != entry.dtype:",
    ),
    (
        "a tensor may be the same in another dtype",
        "same-other-dtype",
        "if (base.dtype, base.shape) != (entry.dtype, entry.shape):",
        "if base.shape != entry.shape:",
    ),
    (
        "bytes may be more than the shape needs",
        "replace-long",
        "if data.length != entry.nbytes:",
        "if data.length < entry.nbytes:",
    ),
    (
        "bytes may be less than the shape needs",
        "replace-short",
        "if data.length != entry.nbytes:",
        "if data.length > entry.nbytes:",
    ),
    ("a seed has 31 bits", "seed-bounds", "2**32 - 1)", "2**31 - 1)"),
    ("parts may be more than the shape needs", "parts-too-many", "if total != needed:", "if total < needed:"),
    ("parts may be less than the shape needs", "parts-too-few", "if total != needed:", "if total > needed:"),
    (
        "parts may not be empty",
        "parts-at-the-ends",
        "check_uint(start + count,",
        "count or fail(where, '0'); check_uint(start + count,",
    ),
)
patched(
    "index.scaled",
    (
        "a block may be larger than its tensor in no dimension",
        "scaled-rows",
        "or 0 in sizes:",
        "or 0 in sizes or any(b > n for b, n in zip(sizes, codes.shape)):",
    ),
    ("blocks that reach beyond the tensor have no scale", "scaled-rows", "-(-size // step) for", "size // step for"),
    (
        "scales of U8 are refused",
        "scaled-wide-scales",
        "if scales.dtype not in c.SCALE_DTYPES:",
        'if scales.dtype == "U8":',
    ),
    ("codes without scales are refused", "scaled-base", "if scales_obj is None:", "if False:"),
)
patched(
    "pipeline.verify",
    (
        "buffers are compared in the order of their entries",
        "attachment-names",
        "sorted(refs, key=lambda ref: (ref.offset, ref.length))",
        "refs",
    ),
    (
        "buffers of length 0 are not compared",
        "buffers-empty-inside",
        "sorted(refs, key=lambda ref: (ref.offset, ref.length))",
        "sorted((ref for ref in refs if ref.length), key=lambda ref: (ref.offset, ref.length))",
    ),
    (
        "the padding between buffers is not read",
        "buffers-padding",
        "if any(map(any, container.pieces(padding))):",
        "if False:",
    ),
    (
        "a section may go on behind its last buffer",
        "section-longer",
        "if position != container.sections[number].raw_length:",
        "if False:",
    ),
)
patched(
    "pipeline.digests",
    (
        "new rows come first in a digest",
        "buffers-empty",
        "    digest = blake3()\n    for term in entry.terms:",
        (
            "    digest = blake3(b'' if entry.data is None else bytes(delta.container.buffer(entry.data)))\n"
            "    for term in entry.terms:"
        ),
    ),
    (
        "a digest leaves new rows out",
        "every-action",
        "    if entry.data is not None:\n        for data",
        "    if not entry.terms:\n        for data",
    ),
    (
        "terms are digested from the last to the first",
        "sum-beyond",
        "    for term in entry.terms:\n        codec = codec_of(entry, term)\n        limits",
        "    for term in reversed(entry.terms):\n        codec = codec_of(entry, term)\n        limits",
    ),
    (
        "digests are compared in their first 16 bytes",
        "payload-digest",
        "payload_digest(delta, entry) != entry.digest:",
        "payload_digest(delta, entry)[:1] != entry.digest[:1] and False:",
    ),
)
patched(
    "checkpoint.weight_names",
    ("names of weight files may lie in folders", "weights-folder", 'if "/" in name or not', "if not"),
    (
        "components of weight files are not looked at",
        "weights-absolute",
        'whole = name if key == METADATA_WEIGHTS else f"{component}/{name}"',
        "whole = name",
    ),
    (
        "every key that starts with weights names a file",
        "weight-names",
        'if key not in (METADATA_WEIGHTS, f"{METADATA_WEIGHTS}/{component}"):',
        "if not key.startswith(METADATA_WEIGHTS):",
    ),
)
patched(
    "checkpoint.fingerprint",
    ("a fingerprint leaves the dtype out", "actions-with-base", "\\n{dtype}\\n", "\\n"),
    ("a fingerprint leaves the shape out", "actions-with-base", "{sizes}\\n", "\\n"),
    ("a fingerprint joins sizes by x", "actions-with-base", '",".join(map(str, shape))', '"x".join(map(str, shape))'),
)
patched(
    "checkpoint.stitched",
    ("parts start at their tensors' beginning", "base-parts", "Run(tensor, part.start, ", "Run(tensor, 0, "),
    (
        "parts may end behind their tensors",
        "part-beyond-its-tensor",
        " or part.start + part.elements > c.element_count(tensor.shape)",
        "",
    ),
)
