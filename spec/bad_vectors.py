"""Vectors that a reader must refuse because of the container: good files with one thing changed."""

from __future__ import annotations

import io
from typing import Any

import msgpack
from blake3 import blake3
from vector_tools import change, encode, join, one_attachment, one_tensor, parts, simple, vector

from deltafmt.container import frame
from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.terms.buffers import blank, raw_bytes
from deltafmt.terms.nm.layout import NMLayout


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
    return join(body[:-1] + b"\1", encode(index), simple()[-104:-72])


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
    packed = encode(index).replace(b"\xa5share\x04", b"\xa5share\xcc\x04")
    return join(body, packed, data[-104:-72])


@vector("invalid", "the keys of the index are not sorted", "expected the keys")
def unsorted_keys() -> bytes:
    def edit(index: Any) -> None:
        index["attachments"] = index.pop("attachments")

    return change(simple(), edit)


@vector("invalid", "the names of the metadata are not sorted", "not sorted")
def unsorted_names() -> bytes:
    return change(simple(), lambda index: index.update(metadata={"b": "", "a": ""}))


@vector("invalid", "the index has a key that version 1 does not know", "expected the keys")
def unknown_key() -> bytes:
    return change(simple(), lambda index: index.update(zzz=1))


@vector("invalid", "a float stands in the index", "not a string")
def float_in_index() -> bytes:
    return change(simple(), lambda index: index["metadata"].update(x=1.0))


@vector("invalid", "a float stands in a tensor's entry", "is not an integer")
def float_in_entry() -> bytes:
    return change(simple(), lambda index: index["tensors"]["w"].update(shape=[40.0, 50]))


def with_parts(parts: Any, features: int = c.FEATURE_PARTS) -> bytes:
    """Return a file whose only tensor, of shape [40, 50], has a base made of parts."""

    def edit(index: Any) -> None:
        base = index["tensors"]["w"]["base"]
        index["tensors"]["w"]["base"] = {"digest": base["digest"], "dtype": base["dtype"], "parts": parts}
        index["tensors"]["w"]["base"]["shape"] = base["shape"]

    return change(frame.encode_header(incompatible=features) + simple()[c.HEADER_SIZE :], edit)


@vector("invalid", "a base is made of parts, and the header does not say so", "bit 0")
def parts_without_feature() -> bytes:
    return with_parts([["v", 0, 2000]], 0)


@vector("invalid", "the parts of a base have one element too few", "1999 elements where the shape needs 2000")
def parts_too_few() -> bytes:
    return with_parts([["v", 0, 1000], ["u", 1, 999]])


@vector("invalid", "the list of a base's parts is empty", "at least one part")
def parts_none() -> bytes:
    return with_parts([])


@vector("invalid", "a part starts before its tensor", "is not an integer from 0")
def parts_negative() -> bytes:
    return with_parts([["v", -1, 2000]])


def with_leading(leading: int, shape: list[int], features: int = c.FEATURE_LEADING) -> bytes:
    """Return a file whose only tensor, of 40 rows and 50 columns, has a shape and leading dimensions."""

    def edit(index: Any) -> None:
        old = index["tensors"]["w"]
        new = {key: old[key] for key in ("action", "base", "digest", "dtype")} | {"leading": leading}
        index["tensors"]["w"] = new | {"shape": shape, "terms": old["terms"]}
        index["tensors"]["w"]["base"]["shape"] = shape

    return change(frame.encode_header(incompatible=features) + simple()[c.HEADER_SIZE :], edit)


@vector("invalid", "an entry has leading dimensions, and the header does not say so", "bit 1")
def leading_without_feature() -> bytes:
    return with_leading(1, [40, 5, 10], 0)


@vector("invalid", "no dimension leads", "0 is not 1 to 1")
def leading_none() -> bytes:
    return with_leading(0, [40, 5, 10])


@vector("invalid", "all dimensions but the last lead, which is what the key's absence says", "1 is not 1 to 0")
def leading_all() -> bytes:
    return with_leading(1, [40, 50])


@vector("invalid", "a tensor's entry is not a byte string", "expected a byte string")
def entry_is_a_map() -> bytes:
    data = simple()
    body, index = parts(data)
    packed = encode({**index, "tensors": {}}).replace(b"\xa7tensors\x80", b"\xa7tensors\x81\xa1w\x80")
    return join(body, packed, data[-104:-72])


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
    return one_attachment("../x")


@vector("invalid", "an attachment would be read by git", "not a plain relative path")
def attachment_hidden() -> bytes:
    return one_attachment(".git/config")


@vector("invalid", "the buffers of a tensor lie in two sections", "in several sections")
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


@vector("invalid", "an attachment would be taken for weights", "a name for weights")
def attachment_of_weights() -> bytes:
    return one_attachment("model.safetensors")


@vector("invalid", "a size of 0 beside sizes beyond all bounds", "more than")
def endless_shape() -> bytes:
    out = io.BytesIO()
    shape = (1 << 40, 1 << 40, 0)
    entry = TensorEntry("w", "same", "BF16", shape, BaseRef(bytes(32), "BF16", shape))
    ContainerWriter(out).finish([entry])
    return out.getvalue()


@vector("invalid", "a layout of a kind that version 1 does not know", "unknown layout 'ternary'")
def unknown_layout() -> bytes:
    return change(simple(), lambda index: index["layouts"][0].update(kind="ternary"))


def with_scaled(features: int = c.FEATURE_SCALED, **changes: Any) -> bytes:
    """Return a file whose base keeps tensor ``w``, of shape [40, 50], as 8-bit floats with two scales."""
    stored = {"digest": bytes(32), "dtype": "F32", "name": "s", "shape": [2, 1]}
    codes = {"digest": bytes(32), "dtype": "F8_E4M3", "shape": [40, 50]}
    described = {"block": [20, 50], "codes": codes, "scales": stored} | changes

    def edit(index: Any) -> None:
        index["scaled"] = {"w": msgpack.packb(described)}
        for key in ("sections", "tensors"):
            index[key] = index.pop(key)

    return change(frame.encode_header(incompatible=features) + simple()[c.HEADER_SIZE :], edit)


@vector("invalid", "the base's tensors are scaled, and the header does not say so", "bit 2")
def scaled_without_feature() -> bytes:
    return with_scaled(0)


@vector("invalid", "a block has a size of zero", "is no block of a tensor")
def scaled_empty_block() -> bytes:
    return with_scaled(block=[0, 50])


@vector("invalid", "a block has one dimension more than its tensor", "is no block of a tensor")
def scaled_block_of_three() -> bytes:
    return with_scaled(block=[1, 20, 50])


@vector("invalid", "there are two scales, and the blocks need three", "2 scales where the blocks need 3")
def scaled_too_few() -> bytes:
    return with_scaled(block=[19, 50])


@vector("invalid", "scaled codes are 8-bit integers", "is not one of F8_E4M3, F8_E5M2")
def scaled_integers() -> bytes:
    return with_scaled(codes={"digest": bytes(32), "dtype": "I8", "shape": [40, 50]})


@vector("invalid", "scales are 64-bit floats", "is not one of BF16")
def scaled_wide_scales() -> bytes:
    return with_scaled(scales={"digest": bytes(32), "dtype": "F64", "name": "s", "shape": [2, 1]})


@vector("invalid", "the payload is not what its digest says", "another digest")
def payload_digest() -> bytes:
    return change(simple(), lambda index: index["tensors"]["w"].update(digest=bytes(32)))


@vector("invalid", "the content id is not that of the content", "content id")
def wrong_content_id() -> bytes:
    data = simple()
    body, index = parts(data)
    return join(body, encode(index), bytes(32))


@vector("invalid", "a hot file has a compressed section of tensors", "stores its tensors as they are")
def hot_but_compressed() -> bytes:
    return change(one_tensor(NMLayout(1, 8, 4), 32, 64, "cold"), lambda index: index.update(profile="hot"))


@vector("invalid", "a zstd frame declares another size than its chunk has", "declares")
def zstd_wrong_size() -> bytes:
    def edit(index: Any) -> None:
        index["sections"][0]["raw_length"] += 256

    return change(one_tensor(NMLayout(1, 8, 4), 32, 64, "cold"), edit)
