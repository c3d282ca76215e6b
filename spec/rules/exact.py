"""Rules of sections 5.7, 7.10 and 17: exact tensors, and files that are restored."""

from __future__ import annotations

from .rule import Patch, Skip, rule

INDEX, CHUNK, CODING, RESTORED = "container.file_index", "exact.chunk", "exact.coding", "checkpoint.restored"

rule(
    "4.4",
    "MUST be set if an entry has `exact` (17), the index has `files` (7.10) or a section has kind 3",
    others="exact-without-feature files-without-feature",
    reason="a section of kind 3, an entry and the index each ask for the bit, and the files have two of them",
)
rule(
    "5.7",
    "Sections of kind 3 MUST have codec 0",
    others="exact-section-compressed",
    reason="buffers of a compressed section are read through another way",
)
rule(
    "5.7",
    "MUST lie behind all sections of kind 1",
    "exact-before-tensors",
    Skip(INDEX, "a section of tensors lies behind one of exact tensors"),
)
rule(
    "7.10",
    "The name of such a file is a path that keeps the rules of 7.9, except that it ends as a weight file does",
    "files-of-another-name files-of-no-path",
    Skip("index.exact", "not a plain relative path of a weight file, or of an index of weight files"),
    others="files-outside",
    reason="the tensors of a folder have its name in front of theirs",
)
rule(
    "7.10",
    "Its folders keep all of 7.9",
    "files-in-folder-of-weights files-in-folder-in-capitals",
    Skip("index.exact", "not a plain relative path of a weight file, or of an index of weight files"),
)
rule(
    "7.10",
    "a key MUST NOT stand twice",
    "files-head-tensor-twice files-head-metadata-twice files-head-metadata-key-twice files-head-key-twice",
    Skip("checkpoint.safetensors_file", "a key stands twice"),
)
rule(
    "7.10",
    "Under `__metadata__`, which may be missing, it has an object of strings",
    "files-head-metadata-number",
    Skip(RESTORED, "is not a map from string to string"),
)
rule(
    "7.10",
    "the keys `dtype`, `shape` and `data_offsets`, and no others",
    "files-head-unknown-key",
    Skip(RESTORED, "expected the keys"),
)
rule(
    "7.10",
    "sizes and offsets are written as digits alone",
    "files-head-minus-zero",
    Skip(RESTORED, "is not an integer from 0 on"),
    others="files-head-fraction files-head-three-places",
    reason="what is no list of integers, or not as long, is no shape and no place",
)
rule(
    "7.10",
    "This is a JSON object in UTF-8",
    others="files-head-half-a-character files-head-zero-byte files-head-utf-16",
    reason="what is no JSON in UTF-8 has no value",
)
rule(
    "7.10",
    "The rules about two names hold for the names in `files` and `attachments` together",
    others="files-alike",
    reason="the second file has no head",
)
rule("7.10", "its `head`, which lies in a section of kind 2", others="files-head-of-tensors", reason="it is no head")
rule(
    "7.10",
    "which is the length of the rest of the head, and a safetensors header",
    others="files-head-length files-head-text",
    reason="without a header there are no tensors",
)
rule(
    "7.10",
    "The header's tensors MUST cover the bytes behind the head exactly",
    "files-with-a-gap",
    Skip(RESTORED, "where {} is next"),
)
rule(
    "7.10",
    "MUST have the dtypes and shapes of their entries",
    "files-of-another-shape",
    Skip(RESTORED, "has another dtype or shape"),
)
rule(
    "7.10",
    "Every tensor MUST lie in exactly one of the files",
    "files-without-a-tensor",
    Skip(RESTORED, "lies in no weight file"),
    others="files-of-no-tensor files-with-one-twice",
    reason="a tensor that is not there has no bytes",
)
rule("7.2", "at least one", "files-none", Skip(INDEX, "expected at least one file"))
rule(
    "17.1",
    "a power of two from 2^8 to 2^24",
    "exact-chunk-of-128 exact-chunk-of-300",
    Skip("index.exact", "is not a power of two from"),
    others="exact-chunk-of-2-25",
    reason="its size is checked as every number is",
)
rule("17.1", "a buffer in a section of kind 3", others="exact-among-tensors", reason="its section is another one")
rule(
    "17.1",
    "and the identity (7.5) of the *fine-tuned* tensor",
    others="exact-short-digest exact-with-data",
    reason="every map and every digest of the index is checked so",
)
PREDICTS = Skip("index.entries", "predicts no")
rule(
    "17.1",
    "the two shapes MUST have the same length, MUST agree except for the first dimension, and no size may be 0",
    "exact-base-columns",
    PREDICTS,
)
rule("17.1", "The dtypes MUST be equal, or both of BF16, F16 and F32", "exact-base-dtype", PREDICTS)
rule(
    "17.4",
    "The lengths MUST sum to the length of the buffer less the table",
    others="exact-table-beyond exact-table-too-long",
    reason="the chunks lie elsewhere",
)
rule(
    "17.4",
    "Whoever restores one MUST compare the checksum",
    "exact-stored-checksum exact-values-checksum",
    Skip(CODING, "what it restores is not what was packed"),
)
rule("17.5", "the chunk's bytes are", others="exact-form-6", reason="its meaning is unknown")
rule(
    "17.5",
    "planes of the units",
    others="exact-same-with-bytes exact-stored-short exact-planes-head exact-planes-end",
    reason="the bytes are not there, or one check is that of several forms",
)
rule("17.5", "A plane of zeros MUST have length 0", "exact-plane-of-zeros", Skip(CHUNK, "a plane of zeros is stored"))
rule(
    "17.5",
    "Any other has a length below c, and is one zstd frame that keeps the rules of 6.2",
    "exact-frame-end exact-frame-checksum",
    Skip("exact.frames", "a frame does not end where its plane ends"),
    Patch("exact.frames", "rest = reader.read(1)", 'rest = b""'),  # zstd itself refuses what follows
    Skip("format.zstd_frame", "the frame uses a dictionary or a checksum"),
    others="exact-frame-size exact-plane-too-long",
    reason="the content has another size",
)
rule(
    "17.5",
    "There MUST be m places, all inside the chunk",
    others="exact-places-none exact-places-too-many exact-places-beyond",
    reason="there are no such units",
)
GAPS = Skip(CHUNK, "the gaps do not give")
rule("17.5", "the last gap MUST NOT be 255", "exact-places-filler", GAPS)
rule(
    "17.5",
    "g MUST be at most m + ⌊c / 255⌋ for a chunk of c units",
    others="exact-places-fillers",
    reason="the places then lie behind the chunk",
)
rule("17.5", "No z at a place may be 0", "exact-place-same", Skip(CHUNK, "a place has no difference"))
rule(
    "4.4",
    "MUST be set if a section has kind 4 (5.1)",
    "progressive-without-feature",
    Skip(INDEX, "a served part needs feature bit 4"),
    others="progressive-without-feature-3",
    reason="sections of kind 3 and entries ask for bit 3",
)
rule(
    "5.8",
    "It MUST have codec 0",
    others="progressive-end-compressed",
    reason="its bytes are then those of frames, not of an index",
)
rule(
    "5.8",
    "MUST lie behind all sections of kind 1",
    "progressive-tensors-behind",
    Skip(INDEX, "a section of tensors lies behind the served part"),
)
ENDS = Skip(INDEX, "a served part ends behind another one, or behind exact tensors")
rule("5.8", "A file has at most one section of kind 4", others="progressive-twice", reason="the first one decides")
rule(
    "5.8",
    "MUST lie before all sections of kind 3",
    others="progressive-exact-before",
    reason="the served part then has a section of kind 3, in which no buffer lies",
)
SERVED = Skip("container.served", "it does not end the served part of this file")
rule(
    "17.7",
    "They MUST be those of the served part",
    "progressive-other-content-id progressive-other-index progressive-short-end",
    SERVED,
)
rule("17.7", "A verifier MUST compare the section's bytes", "progressive-other-content-id", SERVED)
rule(
    "17.7",
    "every attachment MUST lie in a section before this one",
    "progressive-attachment-behind",
    Skip(INDEX, "it lies behind the served part"),
)
rule(
    "17.7",
    "every head (7.10) MUST lie in one behind it",
    "progressive-head-before",
    Skip(INDEX, "its head lies in the served part"),
)
rule(
    "17.7",
    "no entry may have the action `exact`",
    "progressive-exact-tensor",
    Skip(INDEX, "a file with a served part has an exact tensor, which nobody can serve"),
)
rule(
    "17.7",
    "An `add` MUST NOT have `exact` in a file that is not progressive",
    "progressive-no-served-part",
    Skip(INDEX, "a tensor has an exact part, and the file has no served part"),
)
rule(
    "17.8",
    "the bits of a float32 c, which MUST be finite",
    "progressive-factor-nan progressive-factor-infinite",
    Skip("index.exact", "is no finite float32"),
    others="progressive-factor-of-33-bits",
    reason="every integer of the index is checked so",
)
rule(
    "17.8",
    "`factors` is an array with a u32 for each term",
    others="progressive-without-factors progressive-factors-too-many",
    reason="a term without a factor has no prediction",
)
