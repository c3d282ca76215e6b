"""Vectors of exact tensors and of files that are restored (sections 7.10 and 17) that a reader must refuse."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3
from draft import Draft
from vector_tools import change, vector

from container_vectors.exact import CHUNK, Made, forms, frame_of, head_of, with_files
from deltafmt.container import frame
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import ExactRef


def one(form: int, data: bytes, count: int = 100, *, checksum: int = 0) -> bytes:
    """Return a file with one exact tensor ``x`` of U8 units in one chunk of any bytes."""
    made = Made()
    values = np.zeros(count, np.uint8)
    row = struct.pack("<QII", checksum, len(data), form)
    made.exact("x", data + row, values, "U8", (count,), ("U8", (count,), values.tobytes()))
    return made.finish()


def raw(buffer: bytes) -> bytes:
    """Return a file with one exact tensor ``x`` of 100 U8 units and any buffer."""
    made = Made()
    made.exact("x", buffer, np.zeros(100, np.uint8), "U8", (100,), None)
    return made.finish()


def edited(edit: Callable[[Any], object], data: bytes | None = None) -> bytes:
    """Return the forms with an edit of the index."""
    return change(forms().finish() if data is None else data, edit)


def entry(**keys: Any) -> Callable[[Any], object]:
    """Return an edit of the first tensor's entry."""
    return lambda index: index["tensors"]["form0"].update(keys)


def part(**keys: Any) -> Callable[[Any], object]:
    """Return an edit of what the first tensor's entry has under ``exact``."""
    return lambda index: index["tensors"]["form0"]["exact"].update(keys)


def without_feature(data: bytes) -> bytes:
    """Return a file whose header lacks feature 3."""
    draft = Draft.of(data)
    draft.header = frame.encode_header()
    return draft.build()


def moved_behind() -> bytes:
    """Return a file whose tensors lie behind an exact tensor."""
    made = Made()
    made.exact("a", struct.pack("<QII", 0, 0, 0), np.zeros(4, np.uint8), "U8", (4,), None)
    data = b"wxyz"
    ref = made.writer.add(data)
    made.entries.append(TensorEntry("b", "replace", "U8", (4,), digest=blake3(data).digest(), data=ref))
    return made.finish()


def in_tensors() -> bytes:
    """Return a file whose exact tensor lies among buffers of tensors."""
    made = Made()
    ref = ExactRef(CHUNK, made.writer.add(bytes(16)), bytes(32))
    made.entries.append(TensorEntry("x", "exact", "U8", (4,), None, exact=ref))
    return made.finish()


def compressed_section() -> bytes:
    """Return a file that says that the section of exact tensors is compressed."""
    draft = Draft.of(forms().finish())
    draft.index["sections"][0]["codec"] = 1
    return draft.build()


FRAME = frame_of(bytes(99) + b"x")
SUMMED = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(99) + b"x")


def lengths(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


HEAD = head_of(("one", "U8", (8,), 8))
TWO_FILES = {"model.safetensors": HEAD, "sub/x.safetensors": head_of(("two", "U8", (8,), 8))}
X_SPARSE = lengths(1) + b"\1"


def renamed(name: str) -> bytes:
    """Return a file that restores two weight files and an index, one of the weight files under another name."""

    def edit(index: Any) -> None:
        index["files"][name] = index["files"].pop("model.safetensors")
        index["files"] = dict(sorted(index["files"].items()))

    return change(with_files(), edit)


def no_files() -> bytes:
    """Return a file that says that it restores files, and names none."""

    def edit(index: Any) -> None:
        said = sorted({**index, "files": {}}.items())
        index.clear()
        index.update(said)

    return change(forms().finish(), edit)


def chunk_of(units: int) -> bytes:
    """Return a file whose exact tensor of one chunk says how many units a chunk has."""
    return change(one(0, b""), lambda index: index["tensors"]["x"]["exact"].update(chunk=units))


BAD: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "exact_without_feature": (
        "an exact tensor, and the header lacks feature 3",
        "bit 3",
        lambda: without_feature(forms().finish()),
    ),
    "files_without_feature": (
        "files, and the header lacks feature 3",
        "bit 3",
        lambda: without_feature(with_files()),
    ),
    "exact_section_compressed": ("a section of kind 3 has codec 1", "stored as it is", compressed_section),
    "exact_before_tensors": ("a section of kind 1 lies behind one of kind 3", "lies behind one of exact", moved_behind),
    "exact_among_tensors": ("an exact tensor lies in a section of kind 1", "of another kind", in_tensors),
    "exact_chunk_of_300": ("chunks of 300 units", "not a power of two", lambda: chunk_of(300)),
    "exact_chunk_of_128": ("chunks of 128 units", "not a power of two", lambda: chunk_of(128)),
    "exact_chunk_of_2_25": ("chunks of 2^25 units", "is not an integer", lambda: edited(part(chunk=1 << 25))),
    "exact_short_digest": ("a digest of 31 bytes", "expected 32 bytes", lambda: edited(part(digest=bytes(31)))),
    "exact_base_dtype": (
        "the base of a BF16 tensor is I16",
        "predicts no",
        lambda: edited(entry(base={"digest": bytes(32), "dtype": "I16", "shape": [300]})),
    ),
    "exact_base_columns": (
        "the base has other columns",
        "predicts no",
        lambda: edited(entry(base={"digest": bytes(32), "dtype": "BF16", "shape": [300, 1]})),
    ),
    "exact_with_data": (
        "an exact tensor has new rows, too",
        "expected the keys",
        lambda: edited(entry(data=[0, 0, 0])),
    ),
    "exact_table_too_long": ("a buffer is shorter than its table", "cannot hold a table", lambda: raw(bytes(15))),
    "exact_table_beyond": (
        "the chunks are shorter than the table says",
        "take 4 bytes, not 3",
        lambda: raw(bytes(3) + struct.pack("<QII", 0, 4, 1)),
    ),
    "exact_form_6": ("a chunk has form 6", "unknown form 6", lambda: one(6, b"")),
    "exact_same_with_bytes": ("a chunk of form 0 has a byte", "1 bytes where 0", lambda: one(0, b"x")),
    "exact_stored_short": ("a chunk of form 1 lacks a byte", "99 bytes where 100", lambda: one(1, bytes(99))),
    "exact_stored_checksum": (
        "a chunk of form 1 has another checksum",
        "not what was packed",
        lambda: one(1, bytes(100), checksum=1),
    ),
    "exact_values_checksum": (
        "a chunk of form 2 has another checksum",
        "not what was packed",
        lambda: one(2, lengths(0), checksum=1),
    ),
    "exact_planes_head": ("a chunk is shorter than its lengths", "cannot hold the lengths", lambda: one(3, b"abc")),
    "exact_plane_too_long": (
        "a plane is longer than its content",
        "takes 101",
        lambda: one(3, lengths(101) + b"x" * 101),
    ),
    "exact_plane_of_zeros": (
        "a plane of zeros is stored",
        "a plane of zeros",
        lambda: one(4, lengths(100) + bytes(100)),
    ),
    "exact_planes_end": (
        "a byte follows the planes",
        "bytes where",
        lambda: one(4, lengths(len(FRAME)) + FRAME + b"x"),
    ),
    "exact_frame_size": (
        "a frame declares fewer bytes than the plane has",
        "declares 100 bytes",
        lambda: one(4, lengths(len(FRAME)) + FRAME, 101),
    ),
    "exact_frame_checksum": (
        "a frame has a checksum",
        "checksum",
        lambda: one(4, lengths(len(SUMMED)) + SUMMED),
    ),
    "exact_frame_end": (
        "a byte follows the frame of a plane",
        "does not end where",
        lambda: one(4, lengths(len(FRAME) + 1) + FRAME + b"x"),
    ),
    "exact_places_none": ("a sparse chunk has no place", "0 places", lambda: one(5, lengths(0, 0, 0) + lengths(0))),
    "exact_places_too_many": (
        "a sparse chunk has more places than units",
        "101 places",
        lambda: one(5, lengths(101, 101, 0) + lengths(1) + b"x"),
    ),
    "exact_places_beyond": (
        "a place lies behind the chunk",
        "do not give",
        lambda: one(5, lengths(1, 1, 1) + b"\x64" + X_SPARSE),
    ),
    "exact_places_filler": (
        "the last gap is a filler",
        "do not give",
        lambda: one(5, lengths(1, 2, 2) + b"\1\xff" + X_SPARSE, 256),
    ),
    "exact_places_fillers": (
        "there are more fillers than units need",
        "places in 2 gaps",
        lambda: one(5, lengths(1, 2, 2) + b"\xff\1" + X_SPARSE, 200),
    ),
    "exact_place_same": (
        "a place has the difference 0",
        "has no difference",
        lambda: one(5, lengths(1, 1, 1) + b"\1" + lengths(0)),
    ),
    "files_none": (
        "files, and none is named",
        "at least one",
        no_files,
    ),
    "files_of_another_name": (
        "a file is called weights.bin",
        "not a plain relative path",
        lambda: renamed("weights.bin"),
    ),
    "files_outside": (
        "a file lies outside of the folder",
        "not a plain relative path",
        lambda: renamed("../x.safetensors"),
    ),
    "files_of_no_path": (
        "a file has a colon in its name",
        "not a plain relative path",
        lambda: renamed("a:b.safetensors"),
    ),
    "files_alike": (
        "the names of two files differ in case alone",
        "stands in the place",
        lambda: with_files({"A.safetensors": HEAD, "a.safetensors": b""}),
    ),
    "files_head_of_tensors": (
        "the head of a file lies in a section of kind 3",
        "of another kind",
        lambda: change(with_files(), lambda index: index["files"]["model.safetensors"].update(head=[0, 0, 8])),
    ),
    "files_head_length": (
        "a head has another length than it says",
        "another length",
        lambda: with_files({**TWO_FILES, "model.safetensors": HEAD + b" "}),
    ),
    "files_head_text": (
        "a head is not JSON",
        "the header is not valid",
        lambda: with_files({**TWO_FILES, "model.safetensors": struct.pack("<Q", 1) + b"{"}),
    ),
    "files_of_no_tensor": (
        "a head names a tensor that the file lacks",
        'the delta lacks tensor "other"',
        lambda: with_files({**TWO_FILES, "model.safetensors": head_of(("other", "U8", (8,), 8))}),
    ),
    "files_with_one_twice": (
        "two files have the same tensor",
        "or another file has it",
        lambda: with_files({**TWO_FILES, "second.safetensors": HEAD}),
    ),
    "files_without_a_tensor": (
        "a tensor lies in no file",
        'tensor "sub/two" lies in no weight file',
        lambda: with_files({"model.safetensors": HEAD}),
    ),
    "files_of_another_shape": (
        "a head gives a tensor another shape",
        "another dtype or shape",
        lambda: with_files({**TWO_FILES, "model.safetensors": head_of(("one", "U8", (2, 4), 8))}),
    ),
    "files_with_a_gap": (
        "the tensors do not follow the head",
        "where 0 is next",
        lambda: with_files({**TWO_FILES, "model.safetensors": HEAD.replace(b"[0, 8]", b"[1, 9]")}),
    ),
}

for _name, (_comment, _error, _make) in BAD.items():
    vector("invalid", _comment, _error, _name.replace("_", "-"))(_make)
