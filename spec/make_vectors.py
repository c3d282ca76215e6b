"""Make the test vectors of deltafmt-v1.md, section 13: one small generator a scenario.

    python spec/make_vectors.py            write spec/vectors/
    python spec/make_vectors.py --check    compare with what is there

Good files come from the writer; bad ones are good ones with one thing changed, and their seal made right again where
the scenario is about what lies behind it.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash
from blake3 import blake3

from deltafmt.codecs import nm
from deltafmt.codecs.positions import seeded
from deltafmt.container import frame
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.layout import constants as c
from deltafmt.layout.entries import BaseRef, NMTerm, TensorEntry
from deltafmt.layout.nm import NMLayout
from deltafmt.layout.sections import Attachment

FOLDER = Path(__file__).parent / "vectors"
VECTORS: dict[str, bytes] = {}

Maker = Callable[[], bytes]


def vector(expect: str, comment: str, error: str = "") -> Callable[[Maker], Maker]:
    """Register a generator; its name is the vector's."""

    def register(make: Maker) -> Maker:
        data = make()
        lines = [f"expect: {expect}", f"comment: {comment}"]
        if error:
            lines.append(f"error: {error}")
        if expect == "ok":
            with DeltaFile(io.BytesIO(data)) as delta:
                lines.append(f"content_id: {delta.content_id}")
                for name in delta:
                    if delta.resolve(name).action == "add":
                        digest = hashlib.sha256(delta.delta(name).tobytes()).hexdigest()
                        lines.append(f"delta.{name}: {digest}")
        head = "\n".join(lines) + "\n\n"
        VECTORS[make.__name__.replace("_", "-")] = head.encode() + zlib.compress(data, 9)
        return make

    return register


def fields(count: int, top: int, salt: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return fields from 0 to ``top`` that look random and need no generator to reproduce."""
    return ((np.arange(count, dtype=np.uint64) * 2654435761 + salt >> np.uint64(7)) % (top + 1)).astype(np.uint8)


def add_term(writer: ContainerWriter, layout: NMLayout, rows: int, columns: int, seed: int) -> tuple[NMTerm, bytes]:
    """Write a term with made-up content; return it and its payload's digest."""
    groups, kept = layout.groups(columns), layout.kept(columns)
    mask_rows = layout.mask_rows(rows)
    if layout.index == "seeded":
        positions = seeded(seed, 0, mask_rows, groups, layout.keep, layout.group)
    else:
        keys = np.arange(mask_rows * groups * layout.group, dtype=np.uint64) * 0x9E3779B97F4A7C15 >> np.uint64(20)
        order = np.argsort(keys.reshape(mask_rows, groups, layout.group), axis=2, kind="stable")
        positions = np.sort(order[:, :, : layout.keep], axis=2).astype(np.uint8)
        seed = 0
    codes = fields(rows * kept, layout.top, seed).reshape(rows, kept)
    scales = (1 + np.arange(rows * layout.scales_per_row(columns), dtype=np.float32)) / 256
    arrays = nm.NMArrays(positions, codes, scales.reshape(rows, -1))
    arrays.codes[nm.outside(layout, arrays, columns)] = 0
    packed = nm.blank(layout, rows, columns)
    nm.encode(layout, arrays, packed)
    digest = blake3()
    refs = {}
    for name, array in packed.items():
        refs[name] = writer.add(nm.raw_bytes(array))
        if name == "index" and layout.index == "rank":
            fixed = layout.with_index("fixed")
            array = nm.transcode_index(layout, array.view(np.uint32), mask_rows, columns, fixed)  # noqa: PLW2901
        digest.update(nm.raw_bytes(array))
    return NMTerm(writer.layout_number(layout), layout, seed, refs), digest.digest()


def one_tensor(layout: NMLayout, rows: int, columns: int, profile: str = "hot", seed: int = 7) -> bytes:
    """Return a file with one BF16 tensor ``w``."""
    out = io.BytesIO()
    writer = ContainerWriter(out, profile)
    term, digest = add_term(writer, layout, rows, columns, seed)
    base = BaseRef(bytes(32), "BF16", (rows, columns))
    writer.finish([TensorEntry("w", "add", "BF16", (rows, columns), base, digest, None, (term,))])
    return out.getvalue()


def simple() -> bytes:
    """Return the file that most bad vectors start from: 40 rows of 50 columns, 2:8, 4 bits."""
    return one_tensor(NMLayout(2, 8, 4, share=4), 40, 50)


def parts(data: bytes) -> tuple[bytes, Any]:
    """Split a file into what lies before the index and the decoded index."""
    offset = int.from_bytes(data[-c.TRAILER_SIZE :][:8], "little")
    length = int.from_bytes(data[-c.TRAILER_SIZE :][8:16], "little")
    return data[:offset], msgpack.unpackb(data[offset : offset + length])


def join(body: bytes, index: bytes, content_id: bytes) -> bytes:
    """Put an index behind a body, with a trailer that is right."""
    return body + index + frame.encode_trailer(body[: c.HEADER_SIZE], index, len(body), content_id)


def change(data: bytes, edit: Callable[[Any], object]) -> bytes:
    """Edit the decoded index and seal the file again."""
    body, index = parts(data)
    edit(index)
    return join(body, msgpack.packb(index), data[-104:-72])


def change_buffer(data: bytes, buffer: str, position: int, value: int) -> bytes:
    """Set a byte of a buffer of tensor ``w``; mend the section's checksum and the seal."""
    body, index = parts(data)
    section, offset, _ = index["tensors"]["w"]["terms"][0]["buffers"][buffer]
    row = index["sections"][section]
    patched = bytearray(body)
    patched[row["offset"] + offset + position] = value
    row["checksum"] = xxhash.xxh3_128_digest(bytes(patched[row["offset"] : row["offset"] + row["length"]]))
    return join(bytes(patched), msgpack.packb(index), data[-104:-72])


@vector("ok", "no tensor at all: header, index and trailer")
def empty() -> bytes:
    out = io.BytesIO()
    ContainerWriter(out).finish([])
    return out.getvalue()


@vector("ok", "seeded 4:16, 4 bits midtread, masks shared by 4 rows, ragged rows")
def seeded_4_16_k4() -> bytes:
    return one_tensor(NMLayout(4, 16, 4, share=4), 70, 64)


@vector("ok", "seeded 1:32, 4 bits: one position a group needs 8 bits of a hash")
def seeded_1_32_k4() -> bytes:
    return one_tensor(NMLayout(1, 32, 4, share=1), 33, 100)


@vector("ok", "seeded 2:128, 8 bits, masks shared by 8 rows: 16 bits of a hash a group")
def seeded_2_128_k8() -> bytes:
    return one_tensor(NMLayout(2, 128, 8, share=8), 9, 300)


@vector("ok", "seeded 1:8, 1 bit midrise: 4 bits of a hash a group")
def seeded_1_8_k1() -> bytes:
    return one_tensor(NMLayout(1, 8, 1, grid="midrise", share=4), 64, 128)


@vector("ok", "seeded 2:16, 2 bits midrise, F32 scales for every 5 entries")
def seeded_2_16_k2_groups() -> bytes:
    return one_tensor(NMLayout(2, 16, 2, grid="midrise", share=2, scale_dtype="F32", scale_group=5), 35, 70)


@vector("ok", "fixed 3:7, 3 bits: M is no power of two, fields straddle words")
def fixed_3_7_k3() -> bytes:
    return one_tensor(NMLayout(3, 7, 3, "fixed", share=2), 37, 45)


@vector("ok", "fixed 16:16, 5 bits: every element is kept")
def fixed_16_16_k5() -> bytes:
    return one_tensor(NMLayout(16, 16, 5, "fixed"), 3, 32)


@vector("ok", "rank 4:16, 6 bits, in a cold file")
def rank_4_16_k6_cold() -> bytes:
    return one_tensor(NMLayout(4, 16, 6, "rank", share=4), 40, 100, "cold")


@vector("ok", "rank 31:66: ranks of 63 bits")
def rank_31_66_cold() -> bytes:
    return one_tensor(NMLayout(31, 66, 2, "rank", grid="midrise"), 2, 140, "cold")


@vector(
    "ok", "every action: same, replace (also 0-d and empty), add with new rows, alias; an attachment, a removed tensor"
)
def every_action() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    layout = NMLayout(1, 4, 4)
    term, _ = add_term(writer, layout, 5, 8, 3)
    new_rows = bytes(range(32))
    data = writer.add(new_rows)
    digest = blake3()
    for name in ("codes", "scales"):
        ref = term.buffers[name]
        digest.update(out.getvalue()[4096 + ref.offset :][: ref.length])
    digest.update(new_rows)
    grown = TensorEntry(
        "grown", "add", "BF16", (7, 8), BaseRef(bytes(32), "BF16", (5, 8)), digest.digest(), data, (term,)
    )
    number, nothing = np.float32(1.5).tobytes(), b""
    entries = [
        grown,
        TensorEntry("tied", "alias", "BF16", (7, 8), target="grown"),
        TensorEntry("kept", "same", "I64", (3,), BaseRef(bytes(32), "I64", (3,))),
        TensorEntry("scalar", "replace", "F32", (), digest=blake3(number).digest(), data=writer.add(number)),
        TensorEntry("void", "replace", "F16", (0, 4), digest=blake3(nothing).digest(), data=writer.add(nothing)),
    ]
    config = b"{}\n"
    attachment = Attachment(writer.add(config, c.KIND_ATTACHMENTS), blake3(config).digest())
    writer.finish(entries, removed=["gone"], attachments={"config.json": attachment}, metadata={"method": "made up"})
    return out.getvalue()


@vector("ok", "two terms: their float32 sum is the delta")
def sum_of_terms() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    digest = blake3()
    terms = []
    for layout in (NMLayout(1, 4, 4), NMLayout(2, 16, 2, grid="midrise", share=8)):
        term, _ = add_term(writer, layout, 20, 32, 11)
        terms.append(term)
        for ref in term.buffers.values():
            digest.update(out.getvalue()[4096 + ref.offset :][: ref.length])
    base = BaseRef(bytes(32), "F32", (20, 32))
    writer.finish([TensorEntry("w", "add", "F32", (20, 32), base, digest.digest(), None, tuple(terms))])
    return out.getvalue()


@vector("invalid", "an empty file", "the file is empty")
def empty_file() -> bytes:
    return b""


@vector("invalid", "some other file", "not a deltafmt file")
def foreign() -> bytes:
    return b"PK\x03\x04" + bytes(200)


@vector("invalid", "CR LF became LF on the way", "text mode")
def text_mode() -> bytes:
    return simple().replace(b"\r\n", b"\n", 1)


@vector("invalid", "the header's checksum does not match", "checksum")
def header_checksum() -> bytes:
    data = bytearray(simple())
    data[40] = 1
    return bytes(data)


@vector("unsupported", "the file asks for a reader of version 2", "version 2")
def newer_version() -> bytes:
    return frame.encode_header(version=2) + simple()[c.HEADER_SIZE :]


@vector("unsupported", "incompatible feature bit 5 is set", "bit 5")
def incompatible_bit() -> bytes:
    return frame.encode_header(incompatible=1 << 5) + simple()[c.HEADER_SIZE :]


@vector("ok", "compatible feature bit 9 is set, which a reader ignores")
def compatible_bit() -> bytes:
    body, index = parts(simple())
    body = frame.encode_header(compatible=1 << 9) + body[c.HEADER_SIZE :]
    return join(body, msgpack.packb(index), simple()[-104:-72])


@vector("invalid", "the last byte is missing", "truncated")
def truncated() -> bytes:
    return simple()[:-1]


@vector("invalid", "a byte follows the trailer", "truncated, or something follows")
def trailing_byte() -> bytes:
    return simple() + b"\0"


@vector("invalid", "one bit of the index is flipped", "digest of header, index and trailer")
def flipped_index() -> bytes:
    data = bytearray(simple())
    data[-c.TRAILER_SIZE - 5] ^= 1
    return bytes(data)


@vector("invalid", "one bit of a section is flipped", "section 0")
def flipped_section() -> bytes:
    data = bytearray(simple())
    data[4100] ^= 1
    return bytes(data)


@vector("invalid", "the padding after the header is not zero", "padding after the header")
def header_padding() -> bytes:
    data = bytearray(simple())
    data[1000] = 1
    return bytes(data)


@vector("invalid", "the padding after a section is not zero", "padding after section 0")
def section_padding() -> bytes:
    body, index = parts(simple())
    return join(body[:-1] + b"\1", msgpack.packb(index), simple()[-104:-72])


@vector("invalid", "the index is 2**40 bytes long, it says", "over the limit")
def huge_index() -> bytes:
    data = simple()
    trailer = bytearray(data[-c.TRAILER_SIZE :])
    trailer[8:16] = (1 << 40).to_bytes(8, "little")
    return data[: -c.TRAILER_SIZE] + bytes(trailer)


@vector("invalid", "an integer of the index is not in its shortest form", "canonical")
def long_integer() -> bytes:
    data = simple()
    body, index = parts(data)
    packed = msgpack.packb(index).replace(b"\xa5share\x04", b"\xa5share\xcc\x04")
    return join(body, packed, data[-104:-72])


@vector("invalid", "the keys of the index are not sorted", "sorted")
def unsorted_keys() -> bytes:
    def edit(index: Any) -> None:
        index["attachments"] = index.pop("attachments")

    return change(simple(), edit)


@vector("invalid", "the index has a key that version 1 does not know", "expected the keys")
def unknown_key() -> bytes:
    return change(simple(), lambda index: index.update(zzz=1))


@vector("invalid", "a float stands in the index", "float")
def float_in_index() -> bytes:
    return change(simple(), lambda index: index["metadata"].update(x=1.0))


@vector("invalid", "the section starts 4096 bytes late", "is next")
def section_gap() -> bytes:
    return change(simple(), lambda index: index["sections"][0].update(offset=8192))


@vector("invalid", "a buffer leaves its section", "leave section 0")
def buffer_outside() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"]["terms"][0]["buffers"]["scales"][1] = 1 << 20

    return change(simple(), edit)


@vector("invalid", "a buffer is shorter than the shape needs", "where the shape needs")
def buffer_length() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"]["terms"][0]["buffers"]["codes"][2] -= 128

    return change(simple(), edit)


@vector("invalid", "two buffers overlap", "is next")
def buffers_overlap() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"]["terms"][0]["buffers"]["scales"][1] = 0

    return change(simple(), edit)


@vector("invalid", "N is larger than M", "outside 1 to M")
def n_above_m() -> bytes:
    return change(simple(), lambda index: index["layouts"][0].update(keep=9))


@vector("invalid", "a seeded index with M = 12", "power of two")
def seeded_m_12() -> bytes:
    return change(simple(), lambda index: index["layouts"][0].update(group=12))


@vector("invalid", "an alias of an alias", "not a tensor of its own")
def alias_of_alias() -> bytes:
    def edit(index: Any) -> None:
        tied = {"action": "alias", "dtype": "BF16", "shape": [40, 50]}
        index["tensors"] = {
            "a": {**tied, "target": "b"},
            "b": {**tied, "target": "w"},
            "w": index["tensors"]["w"],
        }

    return change(simple(), edit)


@vector("invalid", "an attachment would be written outside its folder", "not a plain relative path")
def attachment_path() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    ref = writer.add(b"x", c.KIND_ATTACHMENTS)
    writer.finish([], attachments={"../x": Attachment(ref, blake3(b"x").digest())})
    return out.getvalue()


@vector("invalid", "a field of 15 on a midtread grid of 4 bits", "the grid ends at 14")
def field_beyond_grid() -> bytes:
    return change_buffer(simple(), "codes", 0, 0xFF)


@vector("invalid", "unused bits of a last word are set", "unused bits of the codes")
def unused_bits() -> bytes:
    layout = NMLayout(1, 8, 4)
    data = one_tensor(layout, 32, 24)
    return change_buffer(data, "codes", 3, 0x10)


@vector("invalid", "an entry beyond the last column has a field", "beyond the last column")
def field_beyond_columns() -> bytes:
    layout = NMLayout(8, 8, 4, share=1)
    data = one_tensor(layout, 32, 7)
    position = int(np.argmax(seeded(7, 0, 32, 1, 8, 8)[0, 0] == 7))
    with DeltaFile(io.BytesIO(data)) as delta:
        byte = delta.buffers("w")["codes"].view(np.uint8).reshape(-1)[position // 2]
    return change_buffer(data, "codes", position // 2, int(byte) | (1 << (4 * (position % 2))))


@vector("invalid", "a scale is negative", "negative or not finite")
def negative_scale() -> bytes:
    return change_buffer(simple(), "scales", 1, 0xBF)


@vector("invalid", "the positions of a group do not ascend", "not ascending")
def positions_descend() -> bytes:
    data = one_tensor(NMLayout(2, 16, 4, "fixed"), 32, 16)
    return change_buffer(data, "index", 0, 0x00)


@vector("invalid", "a position is not below M", "not ascending and below 7")
def position_above_m() -> bytes:
    data = one_tensor(NMLayout(1, 7, 4, "fixed"), 32, 7)
    return change_buffer(data, "index", 0, 0x07)


@vector("invalid", "the payload is not what its digest says", "another digest")
def payload_digest() -> bytes:
    return change(simple(), lambda index: index["tensors"]["w"].update(digest=bytes(32)))


@vector("invalid", "the content id is not that of the content", "content id")
def wrong_content_id() -> bytes:
    data = simple()
    body, index = parts(data)
    return join(body, msgpack.packb(index), bytes(32))


@vector("invalid", "a hot file has a compressed section of tensors", "stores its tensors as they are")
def hot_but_compressed() -> bytes:
    return change(one_tensor(NMLayout(1, 8, 4), 32, 64, "cold"), lambda index: index.update(profile="hot"))


@vector("invalid", "a zstd frame declares another size than its chunk has", "declares")
def zstd_wrong_size() -> bytes:
    def edit(index: Any) -> None:
        index["sections"][0]["raw_length"] += 256

    return change(one_tensor(NMLayout(1, 8, 4), 32, 64, "cold"), edit)


def main() -> int:
    """Write the vectors, or compare them with what is there."""
    if sys.argv[1:] == ["--check"]:
        found = {path.stem: path.read_bytes() for path in FOLDER.glob("*.vec")}
        wrong = sorted(name for name in found.keys() | VECTORS.keys() if found.get(name) != VECTORS.get(name))
        for name in wrong:
            print(f"{name}.vec is not what its generator makes")
        return 1 if wrong else 0
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.vec"):
        path.unlink()
    for name, data in VECTORS.items():
        (FOLDER / f"{name}.vec").write_bytes(data)
    print(f"{len(VECTORS)} vectors, {sum(map(len, VECTORS.values())):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
