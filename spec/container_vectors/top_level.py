"""Vectors of the index's top level (section 7.2), but for attachments."""

from __future__ import annotations

import io
from typing import Any

import msgpack
from blake3 import blake3
from draft import Draft
from vector_tools import change, one_tensor, small, stored, summed, vector

from deltafmt.container.writer import ContainerWriter
from deltafmt.terms.nm.layout import NMLayout


def with_removed(removed: Any) -> bytes:
    """Return a small file with a list of removed tensors."""
    return change(small(), lambda index: index.update(removed=removed))


@vector("ok", "removed tensors, sorted by code point")
def removed() -> bytes:
    return with_removed(["B", "a", "\uffff", "\U00010000"])


@vector("ok", "removed tensors whose names are the beginning of a tensor's name, or begin with one")
def removed_beside() -> bytes:
    return change(stored({"ab": b"x"}), lambda index: index.update(removed=["a", "abc"]))


@vector("invalid", "removed tensors are not sorted", "not sorted and distinct")
def removed_unsorted() -> bytes:
    return with_removed(["b", "a"])


@vector("invalid", "a removed tensor stands twice", "not sorted and distinct")
def removed_twice() -> bytes:
    return with_removed(["a", "a"])


@vector("invalid", "a tensor is removed, and there", "not sorted and distinct")
def removed_but_there() -> bytes:
    return with_removed(["w"])


@vector("invalid", "the name of a removed tensor is a byte string", "a list of names")
def removed_bytes() -> bytes:
    return with_removed([b"a"])


@vector("invalid", "the removed tensors are a map", "a list of names")
def removed_map() -> bytes:
    return with_removed({"a": "b"})


@vector("invalid", "a profile that version 1 does not know", "unknown profile")
def profile() -> bytes:
    return change(small(), lambda index: index.update(profile="warm"))


@vector("invalid", "a value of the metadata is a byte string", "not a string")
def metadata_bytes() -> bytes:
    return change(small(), lambda index: index.update(metadata={"a": b"b"}))


@vector("invalid", "the metadata is an array", "map")
def metadata_array() -> bytes:
    return change(small(), lambda index: index.update(metadata=["a", "b"]))


@vector("invalid", "a layout stands in the table twice; one term has it from either place", "twice")
def layout_twice() -> bytes:
    def edit(index: Any) -> None:
        index["layouts"].append(dict(index["layouts"][0]))
        index["tensors"]["w"]["terms"][1]["layout"] = 1

    return change(summed(NMLayout(1, 4, 4), NMLayout(1, 4, 4), rows=4, columns=8), edit)


@vector("ok", "two terms of one layout, and two tensors with the same seed")
def layout_shared() -> bytes:
    return summed(NMLayout(1, 4, 4), NMLayout(1, 4, 4), rows=4, columns=8)


@vector("invalid", "the layouts are a map without keys", "expected a list")
def layouts_map() -> bytes:
    return change(stored({"a": b"x"}), lambda index: index.update(layouts={}))


@vector("invalid", "the sections are a map without keys, in a file that has none", "expected a list")
def sections_map() -> bytes:
    out = io.BytesIO()
    ContainerWriter(out).finish([])
    return Draft.of(out.getvalue()).build(lambda index: index.update(sections={}))


@vector("invalid", "the tensors are an array without members", "map")
def tensors_array() -> bytes:
    out = io.BytesIO()
    ContainerWriter(out).finish([])
    draft = Draft.of(out.getvalue())
    return draft.build(late=lambda index: index.update(tensors=[]))


@vector("invalid", "a layout of a kind that version 1 does not know", "unknown layout 'ternary'")
def unknown_layout() -> bytes:
    return change(small(), lambda index: index["layouts"][0].update(kind="ternary"))


@vector("invalid", "a tensor's entry is a map, not a byte string that holds one", "expected a byte string")
def entry_is_a_map() -> bytes:
    draft = Draft.of(stored({"a": b"x"}))

    def spell(index: bytes) -> bytes:
        entry = msgpack.packb(draft.index["tensors"]["a"])
        packed = b"\xc4" + bytes([len(entry)]) + entry
        assert packed in index
        return index.replace(packed, entry)

    return draft.build(spell=spell)


@vector("invalid", "a buffer has a fourth number", "a list of section, offset and length")
def buffer_of_four() -> bytes:
    return Draft.of(stored({"a": b"x"})).build(lambda index: index["tensors"]["a"]["data"].append(0))


@vector("invalid", "a buffer lies in a section that does not exist", "is not one of the 1 sections")
def buffer_section() -> bytes:
    return Draft.of(stored({"a": b"x"})).build(lambda index: index["tensors"]["a"].update(data=[1, 0, 1]))


@vector("invalid", "a buffer ends four bytes behind its section, in the padding", "leave section 0")
def buffer_outside() -> bytes:
    draft = Draft.of(stored({"a": b"x" * 60 + bytes(4)}))
    draft.raw[0] = draft.raw[0][:60]
    return draft.build()


@vector("invalid", "a buffer starts behind its section, in the padding, and is empty", "leave section 0")
def buffer_behind() -> bytes:
    draft = Draft.of(stored({"a": b"x" * 64, "b": b""}))
    draft.raw[0] = draft.raw[0][:64]
    draft.index["tensors"]["b"]["data"] = [0, 512, 0]
    return draft.build()


@vector("invalid", "a buffer's offset and length overflow 64 bits together", "is not an integer from 0")
def buffer_overflows() -> bytes:
    draft = Draft.of(stored({"a": b"x" * 64, "b": b"x" * 64}))
    draft.raw[0] = draft.raw[0][:64]
    draft.index["tensors"]["b"]["data"] = [0, 2**64 - 256, 320]
    return draft.build()


@vector("invalid", "a buffer's offset is negative", "is not an integer from 0")
def buffer_negative() -> bytes:
    draft = Draft.of(stored({"a": b"x" * 64, "b": b"x" * 64}))
    draft.raw[0] = draft.raw[0][:64]
    draft.index["tensors"]["b"]["data"] = [0, -256, 64]
    return draft.build()


@vector("invalid", "a tensor's bytes lie in a section of attachments", "of another kind")
def tensor_among_attachments() -> bytes:
    return change(stored({"a": b"x"}), lambda index: index["sections"][0].update(kind=2))


@vector("invalid", "an attachment lies in a section of tensors", "of another kind")
def attachment_among_tensors() -> bytes:
    out = io.BytesIO()
    writer = ContainerWriter(out, "cold")
    writer.finish([], attachments={"x": writer.attach(b"x")})
    return change(out.getvalue(), lambda index: index["sections"][0].update(kind=1))


@vector("invalid", "a section's checksum has 15 bytes", "expected 16 bytes")
def checksum_short() -> bytes:
    def edit(index: Any) -> None:
        index["sections"][0]["checksum"] = index["sections"][0]["checksum"][:15]

    return change(small(), edit)


@vector("invalid", "a tensor's digest has 33 bytes", "expected 32 bytes")
def digest_long() -> bytes:
    def edit(index: Any) -> None:
        index["tensors"]["w"]["base"]["digest"] += b"\0"

    return change(small(), edit)


@vector("invalid", "the payload of a tensor with terms is not what its digest says", "another digest")
def payload_digest() -> bytes:
    return change(small(), lambda index: index["tensors"]["w"].update(digest=bytes(32)))


@vector("invalid", "only the last byte of a tensor's digest is wrong", "another digest")
def payload_digest_last_byte() -> bytes:
    def edit(index: Any) -> None:
        digest = blake3(b"x").digest()
        index["tensors"]["a"]["digest"] = digest[:-1] + bytes([digest[-1] ^ 1])

    return Draft.of(stored({"a": b"x"})).build(edit)


@vector("invalid", "only the last byte of a section's checksum is wrong", "section 0")
def checksum_last_byte() -> bytes:
    def edit(index: Any) -> None:
        checksum = index["sections"][0]["checksum"]
        index["sections"][0]["checksum"] = checksum[:-1] + bytes([checksum[-1] ^ 1])

    return Draft.of(stored({"a": b"x"})).build(edit)


@vector("invalid", "the bytes of a tensor that replaces the base's are not what its digest says", "another digest")
def payload_digest_replace() -> bytes:
    return change(stored({"a": b"x"}), lambda index: index["tensors"]["a"].update(digest=bytes(32)))


@vector("invalid", "a digest leaves the new rows out", "another digest")
def payload_digest_of_terms() -> bytes:
    draft = Draft.of(small())
    digest = draft.payload(draft.entry)
    end = len(draft.raw[0]) + -len(draft.raw[0]) % 256
    draft.raw[0] += bytes(end - len(draft.raw[0])) + bytes(range(16))
    entry = {**draft.entry, "shape": [5, 8], "data": [0, end, 16], "digest": bytes(32)}
    draft.index["tensors"]["w"] = dict(sorted(entry.items()))
    return draft.build(lambda index: index["tensors"]["w"].update(digest=digest))


@vector("ok", "a tensor with one term in a cold file, whose other name is repeated by two aliases")
def two_aliases() -> bytes:
    def edit(index: Any) -> None:
        tied = {"action": "alias", "dtype": "BF16", "shape": [4, 8], "target": "w"}
        index["tensors"] = {"a": tied, "w": index["tensors"]["w"], "z": tied}

    return change(one_tensor(NMLayout(1, 4, 4), 4, 8, "cold"), edit)
