"""Vectors of the file's arrangement, of sections and of buffers (sections 3 and 5)."""

from __future__ import annotations

import io
from typing import Any

from blake3 import blake3
from draft import Draft, frames
from vector_tools import change, one_tensor, simple, small, stored, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.terms.buffers import blank, raw_bytes
from deltafmt.terms.nm.layout import NMLayout


def three_sections() -> Draft:
    """Return a file of three tensors of 64 bytes, each in a section of its own."""
    draft = Draft.of(stored({name: bytes([i]) * 64 for i, name in enumerate("abc")}))
    raw, index = draft.raw[0], draft.index
    draft.raw = [raw[256 * i :][:64] for i in range(3)]
    index["sections"] = [dict(index["sections"][0]) for _ in range(3)]
    for number, entry in enumerate(index["tensors"].values()):
        entry["data"] = [number, 0, 64]
    return draft


@vector("ok", "no tensor at all: header, index and trailer")
def empty() -> bytes:
    out = io.BytesIO()
    ContainerWriter(out).finish([])
    return out.getvalue()


@vector("invalid", "the last byte is missing", "truncated")
def truncated() -> bytes:
    return simple()[:-1]


@vector("invalid", "a byte follows the trailer", "truncated, or something follows")
def trailing_byte() -> bytes:
    return simple() + b"\0"


@vector("invalid", "the padding after the header is not zero", "padding after the header")
def header_padding() -> bytes:
    draft = Draft.of(small())
    draft.padding[0] = bytes(1000) + b"\1" + bytes(4096 - 64 - 1001)
    return draft.build()


@vector("invalid", "the first byte after the header is not zero", "padding after the header")
def header_padding_first() -> bytes:
    draft = Draft.of(small())
    draft.padding[0] = b"\1" + bytes(4096 - 65)
    return draft.build()


@vector("invalid", "the padding after a section is not zero", "padding after section 0")
def section_padding() -> bytes:
    draft = Draft.of(small())
    draft.padding[1] = bytes(-len(draft.raw[0]) % 4096 - 1) + b"\1"
    return draft.build()


@vector("invalid", "the padding after the second of three sections is not zero", "padding after section 1")
def section_padding_second() -> bytes:
    draft = three_sections()
    draft.padding[2] = b"\1" + bytes(4095 - 64)
    return draft.build()


@vector("ok", "three sections, with a tensor each")
def several_sections() -> bytes:
    return three_sections().build()


@vector("ok", "the sections of two tensors and of attachments stand in any order; the middle one is full to the byte")
def full_section() -> bytes:
    draft = three_sections()
    draft.raw[1] = bytearray(range(256)) * 16
    draft.index["tensors"]["b"].update(shape=[4096], data=[1, 0, 4096])
    return draft.build()


@vector("invalid", "4096 zeros stand between the header's padding and the first section", "is next")
def section_gap() -> bytes:
    draft = Draft.of(small())
    draft.padding[0] = bytes(8192 - 64)
    return draft.build()


@vector("invalid", "4096 zeros too many stand between two sections", "is next")
def section_gap_later() -> bytes:
    draft = three_sections()
    draft.padding[2] = bytes(8192 - 64)
    return draft.build()


@vector("invalid", "4096 zeros too many stand between the last section and the index", "the index starts at")
def index_gap() -> bytes:
    draft = Draft.of(small())
    draft.padding[1] = bytes(8192 - len(draft.raw[0]))
    return draft.build()


@vector("invalid", "two sections lie at the same place", "is next")
def sections_overlap() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64, "b": b"a" * 64}))
    draft.raw = [bytearray(b"a" * 64)] * 2
    draft.index["sections"].append(dict(draft.index["sections"][0]))
    draft.index["tensors"]["b"]["data"] = [1, 0, 64]
    draft.stored[1] = b""
    return draft.build(lambda index: index["sections"].__setitem__(1, dict(index["sections"][0])))


@vector("invalid", "the index lists the second section first", "is next")
def sections_swapped() -> bytes:
    draft = three_sections()

    def edit(index: Any) -> None:
        index["sections"][:2] = reversed(index["sections"][:2])
        draft.raw[:2] = reversed(draft.raw[:2])
        index["tensors"]["a"]["data"][0], index["tensors"]["b"]["data"][0] = 1, 0

    return draft.build(edit)


@vector("invalid", "a section reaches into the index", "run into the index")
def section_into_index() -> bytes:
    def edit(index: Any) -> None:
        index["sections"][2].update(length=4096 * 4, raw_length=4096 * 4)

    return three_sections().build(edit)


@vector("invalid", "one bit of a section is flipped, and only its checksum tells", "section 0")
def flipped_section() -> bytes:
    draft = Draft.of(small())
    good = dict(Draft.of(small()).index["sections"][0])
    draft.raw[0][4] ^= 1
    return draft.build(lambda index: index["sections"][0].update(checksum=good["checksum"]))


@vector("invalid", "one bit of an attachment is flipped, and only its section's checksum tells", "section 0")
def flipped_attachment() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    writer.finish([], attachments={"config.json": writer.attach(b"{} " * 20)})
    draft = Draft.of(out.getvalue())
    checksum = draft.index["sections"][0]["checksum"]
    draft.raw[0][40] ^= 1
    return draft.build(lambda index: index["sections"][0].update(checksum=checksum))


@vector("invalid", "a section of a kind that version 1 does not know", "unknown section kind")
def section_kind() -> bytes:
    return change(small(), lambda index: index["sections"][0].update(kind=5))


@vector("invalid", "a section of a codec that version 1 does not know", "unknown codec")
def section_codec() -> bytes:
    draft = Draft.of(one_tensor(NMLayout(1, 4, 4), 4, 8, "cold"))
    draft.stored[0] = frames(bytes(draft.raw[0]))
    return draft.build(lambda index: index["sections"][0].update(codec=2))


@vector("invalid", "a section of raw bytes has four bytes behind them", "equal lengths")
def section_lengths() -> bytes:
    draft = Draft.of(small())
    draft.stored[0] = bytes(draft.raw[0]) + bytes(4)
    return draft.build()


@vector("invalid", "a buffer starts at a multiple of 128", "not a multiple of 256")
def buffer_unaligned() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64, "b": b"b" * 64}))
    draft.raw[0] = bytearray(b"a" * 64 + bytes(64) + b"b" * 64)
    draft.index["tensors"]["b"]["data"][1] = 128
    return draft.build()


@vector("invalid", "256 zeros too many stand between two buffers", "is next")
def buffers_gap() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64, "b": b"b" * 64}))
    draft.raw[0] = bytearray(b"a" * 64 + bytes(448) + b"b" * 64)
    draft.index["tensors"]["b"]["data"][1] = 512
    return draft.build()


@vector("invalid", "256 zeros stand before the first buffer", "is next")
def buffers_begin() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64}))
    draft.raw[0] = bytearray(bytes(256) + b"a" * 64)
    draft.index["tensors"]["a"]["data"][1] = 256
    return draft.build()


@vector("invalid", "two tensors share a buffer", "is next")
def buffers_overlap() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64, "b": b"a" * 64}))
    draft.raw[0] = bytearray(b"a" * 64)
    draft.index["tensors"]["b"]["data"][1] = 0
    return draft.build()


@vector("invalid", "a buffer starts inside another", "is next")
def buffers_nest() -> bytes:
    draft = Draft.of(stored({"a": bytes(range(256)) * 2, "b": bytes(range(256))}))
    draft.raw[0] = draft.raw[0][:512]
    draft.index["tensors"]["b"]["data"][1] = 256
    return draft.build()


@vector("invalid", "an empty buffer lies inside another", "is next")
def buffers_empty_inside() -> bytes:
    draft = Draft.of(stored({"a": bytes(range(256)) * 2, "b": b""}))
    draft.raw[0] = draft.raw[0][:512]
    draft.index["tensors"]["b"]["data"][1] = 256
    return draft.build()


@vector("ok", "two empty buffers between others lie where the next one does")
def buffers_empty() -> bytes:
    return stored({"a": b"a" * 64, "b": b"", "c": b"", "d": b"d" * 64})


@vector("invalid", "the padding between two buffers is not zero", "the padding at 64 is not zero")
def buffers_padding() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64, "b": b"b" * 64}))
    draft.raw[0][255] = 1
    return draft.build()


@vector("invalid", "a section goes on behind its last buffer", "no buffer holds the bytes from 64 on")
def section_longer() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64}))
    draft.raw[0] += bytes(192)
    return draft.build()


@vector("invalid", "a section of no bytes has no buffer", "no buffer lies in it")
def section_without_buffer() -> bytes:
    draft = Draft.of(stored({"a": b"a" * 64}))
    draft.raw.append(bytearray())
    draft.index["sections"].append(dict(draft.index["sections"][0]))
    return draft.build()


@vector("invalid", "the buffers of a term lie in two sections", "in several sections")
def two_sections() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    layout = NMLayout(1, 8, 4)
    packed = blank(layout, 4, 8)
    refs = {"codes": writer.add(raw_bytes(packed["codes"]))}
    attachment = writer.attach(b"x")
    refs["scales"] = writer.add(raw_bytes(packed["scales"]))
    digest = blake3(raw_bytes(packed["codes"]))
    digest.update(raw_bytes(packed["scales"]))
    term = Term(writer.layout_number(layout), layout, 1, refs)
    entry = TensorEntry("w", "add", "BF16", (4, 8), BaseRef(bytes(32), "BF16", (4, 8)), digest.digest(), None, (term,))
    writer.finish([entry], attachments={"x.json": attachment})
    return out.getvalue()


@vector("invalid", "the new rows of a tensor lie in another section than its terms", "in several sections")
def two_sections_data() -> bytes:
    draft = Draft.of(small())
    draft.raw.append(bytearray(range(16)))
    draft.index["sections"].append(dict(draft.index["sections"][0]))
    draft.entry["shape"] = [5, 8]
    draft.index["tensors"]["w"] = dict(sorted({**draft.entry, "data": [1, 0, 16]}.items()))
    return draft.build()


@vector("invalid", "a hot file has a compressed section of tensors", "stores its tensors as they are")
def hot_but_compressed() -> bytes:
    return change(one_tensor(NMLayout(1, 8, 4), 32, 64, "cold"), lambda index: index.update(profile="hot"))


@vector("ok", "a cold file may store its tensors as they are")
def cold_but_stored() -> bytes:
    return change(small(), lambda index: index.update(profile="cold"))


@vector("ok", "a tensor without elements behind one of 300 bytes: its buffer lies at 512, where the section ends")
def empty_last_buffer() -> bytes:
    return stored({"a": bytes(range(150)) * 2, "b": b""})


@vector("ok", "sections of no bytes: a tensor without elements, an attached file without bytes")
def empty_sections() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out)
    ref = writer.add(b"")
    entry = TensorEntry("b", "replace", "F32", (0, 7), digest=blake3(b"").digest(), data=ref)
    writer.finish([entry], attachments={"notes.txt": writer.attach(b"")})
    return out.getvalue()


@vector("invalid", "a buffer of length 0, the last one, lies where the buffer before it ends, at 300", "of 256")
def empty_buffer_unaligned() -> bytes:
    draft = Draft.of(empty_last_buffer())
    draft.raw[0] = draft.raw[0][:300]
    draft.index["tensors"]["b"]["data"][1] = 300
    return draft.build()


@vector("invalid", "a buffer of length 0, the last one, lies 256 bytes too far", "768, where 512 is next")
def empty_buffer_too_far() -> bytes:
    draft = Draft.of(empty_last_buffer())
    draft.raw[0] += bytes(256)
    draft.index["tensors"]["b"]["data"][1] = 768
    return draft.build()
