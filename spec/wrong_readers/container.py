"""Wrong readers of headers, trailers, sections, chunks, the index and its entries (sections 3 to 9)."""

from __future__ import annotations

from .wrong import Constant, patched, wrong

patched(
    "container.frame",
    ("the header's checksum is taken of 48 bytes", "", "xxh3_64_intdigest(data[:56])", "xxh3_64_intdigest(data[:48])"),
    ("the header's checksum is XXH64", "", "xxh3_64_intdigest(data[:56])", "xxh64_intdigest(data[:56])"),
    ("only four bytes of the magic are compared", "", "startswith(c.HEADER_MAGIC)", "startswith(c.HEADER_MAGIC[:4])"),
    ("only six bytes of the trailer's magic are compared", "", "endswith(c.TRAILER_MAGIC)", "endswith(b'\\r\\n')"),
    ("only the lower 32 feature bits are looked at", "", "incompatible & ~c.K", "incompatible & 0xFFFFFFFF & ~c.K"),
    ("compatible bits are taken for incompatible ones", "", "size, incompatible, _,", "size, _, incompatible,"),
    ("version 1 is called too new", "", "version > c.FORMAT_VERSION", "version >= c.FORMAT_VERSION"),
    ("version 2 is read", "", "version > c.FORMAT_VERSION", "version > 2"),
    ("only the first reserved byte of the header is looked at", "", "or any(reserved):", "or reserved[0]:"),
    ("only the last reserved byte of the trailer is looked at", "", "    if any(reserved):", "    if reserved[-1]:"),
    ("the file's length may be less than the trailer says", "", "total != file_length", "total < file_length"),
    ("the index may not start at 4096", "", "offset < c.SECTION_ALIGNMENT", "offset <= c.SECTION_ALIGNMENT"),
    ("the seal leaves the header out", "", "hasher = blake3(header)", "hasher = blake3()"),
    ("the seal leaves the index out", "", "    hasher.update(index)\n", ""),
    ("the seal leaves the trailer out", "", "hasher.update(covered)", "hasher.update(b'')"),
    ("the seal covers 56 bytes of the trailer", "", "hasher.update(covered)", "hasher.update(covered[:56])"),
    ("the seal is compared in its first 16 bytes", "", ") != trailer.digest:", ")[:16] != trailer.digest[:16]:"),
)
wrong("feature bit 5 is taken for known", "", Constant("format.constants.KNOWN_FEATURES", 7 | 32))
wrong("feature bit 63 is taken for known", "", Constant("format.constants.KNOWN_FEATURES", 7 | 1 << 63))
wrong("feature bit 0 is taken for unknown", "", Constant("format.constants.KNOWN_FEATURES", 6))
wrong("feature bit 2 is taken for unknown", "", Constant("format.constants.KNOWN_FEATURES", 3))
wrong("leading dimensions need bit 0", "", Constant("format.constants.FEATURE_LEADING", 1))
wrong("scaled tensors need bit 1", "", Constant("format.constants.FEATURE_SCALED", 2))

patched(
    "container.reader",
    ("the padding after a section is not read", "", "-end % c.SECTION_ALIGNMENT))", "0))"),
    (
        "the first byte of the padding is not read",
        "",
        "self._read(end, -end % c.S",
        "self._read(end + 1, (-end - 1) % c.S",
    ),
    (
        "checksums are compared in their first 8 bytes",
        "",
        "if found != section.checksum:",
        "if found[:8] != section.checksum[:8]:",
    ),
    ("checksums are little-endian", "", "if found != section.checksum:", "if found[::-1] != section.checksum:"),
    (
        "only one half of the padding after the header is read",
        "",
        "if bytes(head[c.HEADER_SIZE :]) != bytes(len(head) - c.HEADER_SIZE):",
        "if any(head[c.HEADER_SIZE : 512]):",
    ),
)
patched(
    "format.constants",
    (
        "the next multiple is always above",
        "",
        "return -(-offset // alignment) * alignment",
        "return (offset // alignment + 1) * alignment",
    ),
    (
        "positions are rounded down",
        "",
        "return -(-offset // alignment) * alignment",
        "return offset // alignment * alignment",
    ),
    (
        "bits of an element are rounded up to bytes",
        "",
        "element_count(shape) * DTYPE_BITS[dtype] // 8)",
        "element_count(shape) * -(-DTYPE_BITS[dtype] // 8))",
    ),
    (
        "rows are the first dimension",
        "",
        "element_count(shape[:-1] if leading is None",
        "element_count(shape[:1] if leading is None",
    ),
    (
        "columns are all dimensions but the first",
        "",
        "element_count(shape[-1:] if leading is None",
        "element_count(shape[1:] if leading is None",
    ),
    ("leading dimensions are one more", "", "else shape[:leading])", "else shape[: leading + 1])"),
    ("sizes of 0 make a bound shape", "", "count *= size or 1", "count *= size"),
    ("elements are counted in 32 bits", "", "return count <= MAX_ELEMENTS", "return count % 2**32 <= MAX_ELEMENTS"),
    ("elements are counted in 64 bits", "", "return count <= MAX_ELEMENTS", "return count % 2**64 <= MAX_ELEMENTS"),
    ("2**48 elements are too many", "", "return count <= MAX_ELEMENTS", "return count < MAX_ELEMENTS"),
)
wrong("chunks have 2**17 bytes", "", Constant("format.constants.ZSTD_CHUNK", 1 << 17))
wrong("chunks have 2**20 bytes", "", Constant("format.constants.ZSTD_CHUNK", 1 << 20))
wrong("a tensor may have nine dimensions", "", Constant("format.constants.MAX_RANK", 9))
wrong("a tensor may have seven dimensions", "", Constant("format.constants.MAX_RANK", 7))
wrong("names may have 1023 bytes", "", Constant("format.constants.MAX_NAME_BYTES", 1023))
wrong("names may have 1025 bytes", "", Constant("format.constants.MAX_NAME_BYTES", 1025))
wrong("buffers start at multiples of 64", "", Constant("format.constants.BUFFER_ALIGNMENT", 64))
wrong("buffers start at multiples of 512", "", Constant("format.constants.BUFFER_ALIGNMENT", 512))
wrong("sections start at multiples of 512", "", Constant("format.constants.SECTION_ALIGNMENT", 512))
wrong("only F32 tensors have deltas", "", Constant("format.constants.DELTA_DTYPES", ("F32",)))
wrong("F16 tensors have no deltas", "", Constant("format.constants.DELTA_DTYPES", ("BF16", "F32")))
wrong("F64 tensors have deltas", "", Constant("format.constants.DELTA_DTYPES", ("BF16", "F16", "F32", "F64")))
wrong("there is no section of codec 1", "", Constant("format.constants.CODECS", (0,)))
wrong("17 terms are allowed", "", Constant("index.entries.MAX_TERMS", 17))
wrong("15 terms are allowed", "", Constant("index.entries.MAX_TERMS", 15))
wrong("a part of a path may have 256 bytes", "", Constant("index.file_names.MAX_PART_BYTES", 256))
wrong("a window may have 2**28 bytes", "", Constant("format.constants.ZSTD_MAX_WINDOW", 1 << 28))
wrong("a window may have 2**26 bytes", "", Constant("format.constants.ZSTD_MAX_WINDOW", 1 << 26))

patched(
    "container.canonical",
    (
        "only the length of the index in its shortest form is compared",
        "",
        "if again != data:",
        "if len(again) != len(data):",
    ),
    (
        "names are sorted as UTF-16 sorts",
        "",
        "if list(obj) != sorted(obj):",
        "if list(obj) != sorted(obj, key=lambda name: name.encode('utf-16-be')):",
    ),
    (
        "names are sorted by length first",
        "",
        "if list(obj) != sorted(obj):",
        "if list(obj) != sorted(obj, key=lambda name: (len(name), name)):",
    ),
    (
        "names are sorted whatever their case",
        "",
        "if list(obj) != sorted(obj):",
        "if list(obj) != sorted(obj, key=str.lower):",
    ),
    ("names need not be sorted", "", "if list(obj) != sorted(obj):", "if False:"),
)
patched(
    "container.file_index",
    ("attachments are stored as they are in hot files", "", "and section.kind == c.SECTION_KIND_TENSORS ", ""),
    (
        "cold files may not store sections as they are",
        "",
        'if profile == "hot" and section.kind == c.SECTION_KIND_TENSORS and section.codec != c.CODEC_STORED:',
        'if (profile == "hot") == bool(section.codec) and section.kind == 1:',
    ),
    (
        "a rank index is refused in cold files",
        "",
        'if profile == "hot" and any(layout.cold_only',
        "if any(layout.cold_only",
    ),
    (
        "a buffer may not end where its section does",
        "",
        "if ref.offset + ref.length > section.raw_length:",
        "if ref.offset + ref.length >= section.raw_length:",
    ),
    ("only the first buffer's section is looked at", "", "if ref.section != refs[0][1].section:", "if False:"),
    (
        "an alias may have another dtype",
        "",
        'if [target.get("dtype"), target.get("shape")] != [entry.dtype, list(entry.shape)]:',
        'if target.get("shape") != list(entry.shape):',
    ),
    (
        "an alias may have another shape",
        "",
        'if [target.get("dtype"), target.get("shape")] != [entry.dtype, list(entry.shape)]:',
        'if target.get("dtype") != entry.dtype:',
    ),
    ("removed names may stand twice", "", "names != sorted(set(names))", "names != sorted(names)"),
    ("removed names need not be sorted", "", "names != sorted(set(names))", "len(names) != len(set(names))"),
    ("layouts may stand twice", "", "if len(set(layouts)) != len(layouts):", "if False:"),
    ("the index may start after zeros", "", "if position != index_offset:", "if position > index_offset:"),
    (
        "a removed tensor's name may not be a beginning of a tensor's",
        "",
        "any(name in tensors for name in names)",
        "any(key.startswith(name) for key in tensors for name in names)",
    ),
)
patched(
    "index.file_names",
    ("U+001F is allowed", "", "ord(char) < 32", "ord(char) < 31"),
    ("U+007F is allowed", "", "127 <= ord(char)", "128 <= ord(char)"),
    ("U+009F is allowed", "", "< 160", "< 159"),
    ("U+00A0 is refused", "", "< 160", "<= 160"),
    ("parts are measured in characters", "", "len(part.encode()) >", "len(part) >"),
    ("names are measured in characters", "", 'len(name.encode("utf-8", "surrogatepass")) > c.M', "len(name) > c.M"),
    (
        "only a name that starts with a full stop is hidden",
        "",
        'all(map(_is_safe_part, name.split("/")))',
        "_is_safe_part(name)",
    ),
    ("names of devices count with their endings", "", 'part.split(".", maxsplit=1)[0]', "part"),
    (
        "names of devices count up to their last full stop",
        "",
        'part.split(".", maxsplit=1)[0]',
        'part.rsplit(".", maxsplit=1)[0]',
    ),
    (
        "only the last part can be a device",
        "",
        'all(map(_is_safe_part, name.split("/")))',
        'all(map(_is_safe_part, name.split("/")[-1:]))',
    ),
    (
        "only the name's own folder is looked at",
        "",
        "for depth in range(1, len(parts)):",
        "for depth in range(max(len(parts) - 1, 1), len(parts)):",
    ),
    (
        "a name may not be the beginning of another",
        "",
        "    for name in listed:\n        parts",
        "    for name in listed:\n"
        "        if any(other != name and other.startswith(name) for other in listed):\n"
        "            return name, name\n"
        "        parts",
    ),
    ("lower case is that of Unicode", "", "return name.translate(_LOWER)", "return name.lower()"),
    ("names are compared in their own case", "", "return name.translate(_LOWER)", "return name"),
    (
        "only the last part can be a file of weights",
        "",
        'for part in lower.split("/")',
        'for part in lower.split("/")[-1:]',
    ),
)
patched(
    "container.chunks",
    ("the table is big-endian", "", 'f"<{count}I"', 'f">{count}I"'),
    (
        "there is one chunk more than needed where the last is full",
        "",
        "count = -(-raw_length // ZSTD_CHUNK)",
        "count = raw_length // ZSTD_CHUNK + 1",
    ),
    (
        "the last chunk is as long as the others",
        "",
        "expected = min(ZSTD_CHUNK, self._raw_length - number * ZSTD_CHUNK)",
        "expected = min(ZSTD_CHUNK, self._raw_length)",
    ),
    ("a range stays in its first chunk", "", "position += len(part)", "position = length"),
    ("what follows a frame is ignored", "", " or decoder.unused_data", ""),
    ("a dictionary ID is refused whatever it is", "", "if parameters.dict_id or", "if frame[4] & 3 or"),
)
patched(
    "container.content",
    (
        "the content id leaves out attachments",
        "",
        '"attachments": {name: attachments[name].digest for name in sorted(attachments)},',
        '"attachments": {},',
    ),
    (
        "the content id leaves out the metadata",
        "",
        '"metadata": {key: metadata[key] for key in sorted(metadata)},',
        '"metadata": {},',
    ),
    ("the content id leaves out removed tensors", "", '"removed": list(removed),', '"removed": [],'),
    ("the content id leaves out scaled tensors", "", "if scaled else {}", "if False else {}"),
    (
        "the content id always has scaled tensors",
        "",
        '**({"scaled": {name: scaled[name].to_obj() for name in sorted(scaled)}} if scaled else {}),',
        '"scaled": {name: scaled[name].to_obj() for name in sorted(scaled or {})},',
    ),
    ("the content id has the places of new rows", "", 'obj.pop("data", None)', "pass"),
    ("the content id has a rank index as it is", "", "term.layout.plain().to_obj()", "term.layout.to_obj()"),
    (
        "the content id has the numbers of layouts",
        "",
        '"layout": term.layout.plain().to_obj()',
        '"layout": term.layout_number',
    ),
    ("the content id leaves out seeds and slots", "", ", **term.numbers()}", "}"),
)
patched(
    "index.entries",
    ("the content id leaves out slots", "", '**({"slots": self.slots} if self.layout.has_slots else {})', "**{}"),
    ("new rows are of the base's dtype", "", "c.byte_count(dtype, (columns,))", "c.byte_count(base.dtype, (columns,))"),
    (
        "terms cover all rows of the fine-tune",
        "",
        "shared = min(rows, c.row_count(base.shape, leading))",
        "shared = rows",
    ),
    (
        "terms cover all rows of the base",
        "",
        "shared = min(rows, c.row_count(base.shape, leading))",
        "shared = c.row_count(base.shape, leading)",
    ),
    (
        "a tensor that shrank is refused",
        "",
        "shape[1:] != base.shape[1:]:",
        "shape[1:] != base.shape[1:] or shape[0] < base.shape[0]:",
    ),
    (
        "a tensor that grew is refused",
        "",
        "shape[1:] != base.shape[1:]:",
        "shape[1:] != base.shape[1:] or shape[0] > base.shape[0]:",
    ),
    ("a 1-d tensor has no delta", "", "if len(shape) == 1 and shape != base.shape:", "if len(shape) == 1:"),
    (
        "an add of other dtypes is refused",
        "",
        "if dtype not in c.DELTA_DTYPES or base.dtype not in c.DELTA_DTYPES:",
        "if dtype != base.dtype:",
    ),
    ("the base's dtype of a delta is not looked at", "", " or base.dtype not in c.DELTA_DTYPES:", ":"),
    ("the fine-tune's dtype of a delta is not looked at", "", "if dtype not in c.DELTA_DTYPES or ", "if "),
    ("leading dimensions may be all but the last", "", "<= len(shape) - 2:", "<= len(shape) - 1:"),
    (
        "a tensor may be the same in another shape",
        "",
        "if (base.dtype, base.shape) != (entry.dtype, entry.shape):",
        "if base.dtype != entry.dtype:",
    ),
    (
        "a tensor may be the same in another dtype",
        "",
        "if (base.dtype, base.shape) != (entry.dtype, entry.shape):",
        "if base.shape != entry.shape:",
    ),
    ("bytes may be more than the shape needs", "", "if data.length != entry.nbytes:", "if data.length < entry.nbytes:"),
    ("bytes may be less than the shape needs", "", "if data.length != entry.nbytes:", "if data.length > entry.nbytes:"),
    ("a seed has 31 bits", "", "2**32 - 1)", "2**31 - 1)"),
    ("parts may be more than the shape needs", "", "if total != needed:", "if total < needed:"),
    ("parts may be less than the shape needs", "", "if total != needed:", "if total > needed:"),
    ("parts may not be empty", "", "check_uint(start + count,", "count or fail(where, '0'); check_uint(start + count,"),
)
patched(
    "index.scaled",
    (
        "a block may be larger than its tensor in no dimension",
        "",
        "or 0 in sizes:",
        "or 0 in sizes or any(b > n for b, n in zip(sizes, codes.shape)):",
    ),
    ("blocks that reach beyond the tensor have no scale", "", "-(-size // step) for", "size // step for"),
    ("scales of U8 are refused", "", "if scales.dtype not in c.SCALE_DTYPES:", 'if scales.dtype == "U8":'),
    ("codes without scales are refused", "", "if scales_obj is None:", "if False:"),
)
patched(
    "pipeline.verify",
    (
        "buffers are compared in the order of their entries",
        "",
        "sorted(refs, key=lambda ref: (ref.offset, ref.length))",
        "refs",
    ),
    (
        "buffers of length 0 are not compared",
        "",
        "sorted(refs, key=lambda ref: (ref.offset, ref.length))",
        "sorted((ref for ref in refs if ref.length), key=lambda ref: (ref.offset, ref.length))",
    ),
    ("the padding between buffers is not read", "", "if any(map(any, container.pieces(padding))):", "if False:"),
    (
        "a section may go on behind its last buffer",
        "",
        "if position != container.sections[number].raw_length:",
        "if False:",
    ),
    (
        "new rows come first in a digest",
        "",
        "    digest = blake3()\n    for term in entry.terms:",
        "    digest = blake3(b'' if entry.data is None else bytes(delta.container.buffer(entry.data)))\n"
        "    for term in entry.terms:",
    ),
    (
        "a digest leaves new rows out",
        "",
        "    if entry.data is not None:\n        for data",
        "    if not entry.terms:\n        for data",
    ),
    (
        "terms are digested from the last to the first",
        "",
        "    for term in entry.terms:\n        codec = codec_of(entry, term)\n        limits",
        "    for term in reversed(entry.terms):\n        codec = codec_of(entry, term)\n        limits",
    ),
    (
        "digests are compared in their first 16 bytes",
        "",
        "payload_digest(delta, entry) != entry.digest:",
        "payload_digest(delta, entry)[:1] != entry.digest[:1] and False:",
    ),
    (
        "only sections of tensors are checked",
        "",
        "for number in range(len(container.sections)):",
        "for number in range(len(container.sections) - 1):",
    ),
)
patched(
    "checkpoint.weight_names",
    ("names of weight files may lie in folders", "", 'if "/" in name or not', "if not"),
    (
        "components of weight files are not looked at",
        "",
        'whole = name if key == METADATA_WEIGHTS else f"{component}/{name}"',
        "whole = name",
    ),
    (
        "every key that starts with weights names a file",
        "",
        'if key not in (METADATA_WEIGHTS, f"{METADATA_WEIGHTS}/{component}"):',
        "if not key.startswith(METADATA_WEIGHTS):",
    ),
)
patched(
    "checkpoint.fingerprint",
    ("a fingerprint leaves the dtype out", "", "\\n{dtype}\\n", "\\n"),
    ("a fingerprint leaves the shape out", "", "{sizes}\\n", "\\n"),
    ("a fingerprint joins sizes by x", "", '",".join(map(str, shape))', '"x".join(map(str, shape))'),
)
patched(
    "checkpoint.stitched",
    ("parts start at their tensors' beginning", "", "Run(tensor, part.start, ", "Run(tensor, 0, "),
    ("parts may end behind their tensors", "", " or part.start + part.elements > c.element_count(tensor.shape)", ""),
)
