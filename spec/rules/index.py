"""Rules of section 7: the index, its encoding and its top level."""

from __future__ import annotations

from container_vectors.endings import ENDINGS

from .rule import Patch, Skip, rule

CANONICAL = "MUST refuse an index that is not the canonical encoding of what it decodes to"
rule(
    "7.1",
    CANONICAL,
    "long-integer signed-integer signed-integer-of-16-bits long-string long-key long-array long-map long-bytes "
    "long-integer-in-entry scaled-long-integer key-twice tensor-twice metadata-twice entry-key-twice",
    Skip("container.canonical", "{} is not in canonical form"),
    others="index-cut index-nested index-endless-array",
    reason="what is no msgpack has no meaning",
)
FIRST = Patch(
    "container.canonical",
    "obj = msgpack.unpackb(data, raw=False, ",
    "obj = (lambda packed, **how: (it := msgpack.Unpacker(**how), it.feed(bytes(packed)), it.unpack())[2])"
    "(data, raw=False, ",
)
rule(
    "7.1",
    CANONICAL,
    "index-trailing-byte entry-trailing-byte",
    FIRST,
    Skip("container.canonical", "{} is not in canonical form"),
)
ANY_ORDER = (
    Patch("format.checks", "tuple(obj) != keys", "set(obj) != set(keys)"),
    Patch("format.checks", "return list(obj.values())", "return [obj[key] for key in keys]"),
)
rule(
    "7.1",
    "map keys are strings, unique, sorted by code point",
    "unsorted-names sorted-by-length sorted-as-utf-16 unsorted-tensors",
    Skip("container.canonical", "the keys are not sorted"),
)
rule(
    "7.1",
    "map keys are strings, unique, sorted by code point",
    "unsorted-keys",
    Patch("container.file_index", "tuple(obj) != keys", "set(obj) != set(keys)"),
)
rule("7.1", "map keys are strings, unique, sorted by code point", "unsorted-entry", *ANY_ORDER)
rule(
    "7.1",
    "map keys are strings, unique, sorted by code point",
    "sorted-by-code-point",
    Patch(
        "container.canonical",
        "list(obj) != sorted(obj)",
        "list(obj) != sorted(obj, key=lambda name: name.encode('utf-16-be'))",
    ),
)
rule(
    "7.1",
    "map keys are strings",
    "integer-key bytes-key",
    Patch("container.canonical", "strict_map_key=True", "strict_map_key=False"),
    Skip("container.canonical", "expected a map with strings for keys"),
    Patch("checkpoint.weight_names", "key, name in metadata.items():", "key, name in dict[str, str]().items():"),
)
rule(
    "7.1",
    "takes its shortest form",
    "short-forms",
    Patch("container.canonical", "msgpack.packb(obj, use_bin_type=True)", "msgpack.packb(obj, use_bin_type=False)"),
)
rule(
    "7.1",
    "strings (valid UTF-8)",
    "string-not-utf-8 string-with-surrogate string-overlong",
    Patch("container.canonical", "raw=False, ", "raw=False, unicode_errors='surrogateescape', "),
    Patch("container.canonical", "obj, use_bin_type=True", "obj, use_bin_type=True, unicode_errors='surrogateescape'"),
)
TEXT = Skip("container.file_index", "a value is not a string")
rule("7.1", "no floats and no extensions", "float-in-index extension-in-index timestamp-in-index", TEXT)
rule(
    "7.1",
    "no floats and no extensions",
    "float-in-entry",
    Patch("format.checks", "type(value) is not int or not 0 <= value <= limit", "not 0 <= value <= limit"),
)
rule(
    "7.1",
    "integers, booleans and nil",
    "boolean-for-integer",
    Patch(
        "format.checks",
        'type(value) is not (str if wanted == "str" else int)',
        'not isinstance(value, str if wanted == "str" else int)',
    ),
)
MAPS = ("section", "attachment", "layout", "replace", "same", "alias", "add", "base", "term", "buffers")
rule(
    "7.1",
    "one that lacks a key or value named below",
    "missing-key",
    Patch(
        "container.file_index",
        'obj = canonical.decode(data, "the index", max_memory)',
        'obj = dict(sorted(({"removed": []} | canonical.decode(data, "the index", max_memory)).items()))',
    ),
    others=" ".join(f"missing-key-{name}" for name in MAPS)
    + " scaled-without-scales index-is-an-array index-of-no-bytes",
    reason="what is not there has no value",
)
rule(
    "7.1",
    "one that has a key not named below",
    "unknown-key",
    Patch("container.file_index", "tuple(obj) != keys", "not set(keys) <= set(obj)"),
)
rule(
    "7.1",
    "one that has a key not named below",
    " ".join(f"unknown-key-{name}" for name in MAPS) + " scaled-unknown-key lowrank-unknown-key",
    Patch("format.checks", "tuple(obj) != keys", "not set(keys) <= set(obj)"),
    Patch("format.checks", "return list(obj.values())", "return [obj[key] for key in keys]"),
)


def named(words: str, names: str, *without: Skip | Patch) -> None:
    """Register a rule of attachments' names."""
    rule("7.9", words, " ".join(f"attachment-{name}" for name in names.split()), *without)


PATHS = "index.file_names"
PART = 'part.startswith(".") or part.endswith((" ", "."))'
named("A part has 1", "empty-part folder absolute without-name", Patch(PATHS, "not part or ", ""))
named("to 255 bytes", "long-part long-part-of-umlauts", Patch(PATHS, " or len(part.encode()) > MAX_PART_BYTES", ""))
named("does not start with a full stop", "path parent hidden hidden-part", Patch(PATHS, PART, "False"))
named("does not end in a space (U+0020)", "space", Patch(PATHS, '(" ", ".")', '(".",)'))
named("does not end in a space (U+0020) or full stop", "full-stop", Patch(PATHS, '(" ", ".")', '(" ",)'))
IS_DEVICE = 'ascii_lower(part.split(".", maxsplit=1)[0].rstrip(" ")) not in DEVICES'
named(
    "A part is not the name of a Windows device",
    "device device-part device-ending device-case device-con device-prn device-com9 device-spaces device-superscript "
    "device-conin device-conout",
    Patch(PATHS, IS_DEVICE, "True"),
)
named("without spaces (U+0020) at its end", "device-spaces", Patch(PATHS, '.rstrip(" ")', ""))
rule("7.9", "without spaces (U+0020) at its end", "attachments-allowed", Patch(PATHS, '.rstrip(" ")', ".rstrip()"))
named("and in lower case", "device-case device", Patch(PATHS, IS_DEVICE, IS_DEVICE.replace("ascii_lower", "")))
named(
    "It has no control characters",
    "nul control delete control-next-line control-late",
    Patch(PATHS, "ord(char) < 32 or 127 <= ord(char) < 160 or ", ""),
)
named(
    "and none of",
    "backslash colon asterisk question-mark quote less greater bar",
    Patch(PATHS, "or char in '\\\\:*?\"<>|' ", ""),
)
COLLIDE = Skip("container.file_index", "stands in the place of the file or of its folder")
named("is, in lower case, the folder of another", "is-a-folder is-a-folders-folder is-a-folder-in-capitals", COLLIDE)
rule("7.9", "No two names are equal in lower case", "attachments-equal", COLLIDE)
WEIGHTS = Skip("index.sections", "a name for weights")
named("as files of weights do", " ".join(f"of-{ending.replace('.', '-')}" for ending in ENDINGS), WEIGHTS)
named("No part ends, in lower case", "of-weights-capitals of-weights-folder", WEIGHTS)
named("which is the index of a variant of weights", "of-weights-index-variant", WEIGHTS)
PROGRAM = Skip("index.sections", "a name for a program")
named(
    "as compiled code does",
    "program-so program-capitals program-dll program-dylib program-exe program-pyc program-pyo",
    PROGRAM,
)
named("It is not `adapter_config.json` in lower case", "program-adapter program-adapter-in-folder", PROGRAM)
rule(
    "7.9",
    "Rules that speak of lower case mean the letters A to Z alone",
    "attachments-allowed",
    Patch(PATHS, "return name.translate(_LOWER)", "return name.lower()"),
)
rule(
    "7.9",
    "Python source is allowed",
    "attachments-allowed",
    Patch(PATHS, "last.endswith(PROGRAM_ENDINGS)", 'last.endswith((*PROGRAM_ENDINGS, ".py"))'),
)
rule(
    "7.9",
    "A part has 1 to 255 bytes",
    "attachment-names",
    Patch(PATHS, "> MAX_PART_BYTES", "> MAX_PART_BYTES - 1"),
)
rule(
    "7.9",
    "A reader MUST refuse a name that breaks one of these rules, and an attachment whose `digest`",
    "attachment-digest",
    Skip("pipeline.verify", "the bytes have another digest"),
)
rule(
    "7.2",
    "a small file that travels along",
    "attachment-empty",
    Patch("container.file_index", "if ref.offset + ref.length > section", "if ref.offset + ref.length >= section"),
)

rule("7.2", "array of layouts (7.3)", "layouts-map", Skip("container.file_index:_parse_layouts", "expected a list"))
rule("7.2", "array of `{checksum", "sections-map", Skip("container.file_index:_parse_sections", "expected a list"))
rule("7.2", "map from name to byte string", others="tensors-array", reason="an array has no names")
rule("7.2", "each at most once", "layout-twice", Skip("container.file_index", "a layout stands in the table twice"))
rule(
    "7.2",
    "map from string to string",
    "metadata-bytes",
    TEXT,
    others="metadata-array",
    reason="an array has no keys",
)
rule("7.2", '`"hot"` or `"cold"`', "profile", Skip("container.file_index", "unknown profile"))
REMOVED = "names != sorted(set(names)) or "
rule(
    "7.2",
    "array of strings, sorted, unique",
    "removed-unsorted removed-twice",
    Patch("container.file_index", REMOVED, ""),
    others="removed-bytes removed-map",
    reason="a name that is no string cannot be compared with others",
)
rule(
    "7.2",
    "none of them in `tensors`",
    "removed-but-there",
    Patch("container.file_index", " or any(name in tensors for name in names)", ""),
)
rule("7.2", "only with the feature of 4.4", "scaled-without-feature", Skip("container.file_index", "bit 2"))
rule(
    "7.2",
    "only with the feature of 4.4: bytes 32",
    "parent-short parent-text",
    Patch("container.file_index", 'check_bytes(obj["parent"], "parent", DIGEST_BYTES)', 'obj["parent"]'),
)
rule(
    "7.2",
    "array of `{checksum: bytes 16",
    others="checksum-short",
    reason="a checksum of fewer bytes is not the section's",
)
rule(
    "7.2",
    "map from name to byte string",
    "entry-is-a-map",
    Skip("container.file_index", "expected a byte string that holds an entry"),
    Patch(
        "container.file_index",
        "return canonical.decode(self.tensors[name], ",
        "return self.tensors[name] if type(self.tensors[name]) is dict else canonical.decode(self.tensors[name], ",
    ),
)
INSIDE = Skip("container.file_index", "{} bytes at {} leave section")
rule(
    "7.2",
    "A *buffer* is an array `[section, offset, length]`",
    "buffer-of-four",
    Patch("index.sections", "or len(obj) != 3:", "or len(obj) < 3:"),
    Patch("index.sections", "section, offset, length = obj\n", "section, offset, length = obj[:3]\n"),
    others="buffer-section buffer-overflows buffer-negative",
    reason="no bytes are in such places",
)
rule(
    "7.2",
    "a number of a section of the right kind",
    "tensor-among-attachments attachment-among-tensors",
    Skip("container.file_index", "is of another kind"),
)
rule(
    "7.2",
    "an offset in its raw bytes that is a multiple of 256",
    "buffer-unaligned",
    Skip("index.sections", "is not a multiple of"),
    Skip("pipeline.verify", "a buffer starts at {}, where {} is next"),
    Skip("pipeline.verify", "the padding at {} is not zero"),
)
rule(
    "7.2",
    "it MUST lie inside the section",
    "buffer-outside",
    INSIDE,
    Skip("pipeline.verify", "no buffer holds the bytes from"),
    others="buffer-behind",
    reason="the other vector's empty buffer does not lie where the next one would, either",
)
rule(
    "7.3",
    "MUST refuse another kind",
    others="unknown-layout",
    reason="the buffers of another kind are unknown",
)

rule(
    "7.6",
    "The `digest` of an entry is the BLAKE3 of its payload",
    "payload-digest payload-digest-last-byte payload-digest-replace payload-digest-of-terms",
    Skip("pipeline.digests", "the payload has another digest"),
)
rule(
    "7.6",
    "`files` (name to digest), `parent` and",
    "parent parent-not-in-content-id",
    Patch("container.content", '**({"parent": parent} if parent is not None else {}),', ""),
)
rule(
    "7.6",
    "A `rank` index enters in its `fixed` form",
    "rank-4-16-k6-cold",
    Patch(
        "terms.nm.codec",
        'if name == "index" and plain != self.layout:\n            yield',
        "if False:\n            yield",
    ),
)
rule(
    "7.6",
    "without `data`",
    "every-action",
    Patch("container.content", 'obj.pop("data", None)', "pass"),
)
rule(
    "7.6",
    "those of a term in the order of their names",
    "lowbit-k3-zero-points",
    Patch(
        "pipeline.digests",
        "in delta.term_views(entry, term).items():",
        "in reversed(delta.term_views(entry, term).items()):",
    ),
)
WEIGHTS = "ending ending-only folder parent absolute device hidden control case"
rule(
    "7.7",
    "a verifier and whoever writes files by it MUST refuse it otherwise",
    " ".join(f"weights-{name}" for name in WEIGHTS.split()),
    Skip("checkpoint.weight_names", "is not the name of a weight file"),
)
