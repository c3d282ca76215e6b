"""Vectors of the trailer (section 8)."""

from __future__ import annotations

from draft import Draft, encode, header, pack, trailer
from vector_tools import small, stored, vector


def with_trailer(**changes: object) -> bytes:
    """Return a small file whose trailer differs in some fields; the seal is right."""
    draft = Draft.of(small())
    body, index = draft.body(), encode(draft.index)
    arguments = {"offset": len(body), "content_id": draft.content_id(), **changes}
    return body + index + trailer(draft.header, index, **arguments)  # type: ignore[arg-type]


@vector("invalid", "the first byte of the trailer's magic is another", "no trailer at the end")
def trailer_magic_first_byte() -> bytes:
    return with_trailer(magic=b"ELTEND\r\n")


@vector("invalid", "the last byte of the trailer's magic is another", "no trailer at the end")
def trailer_magic_last_byte() -> bytes:
    return with_trailer(magic=b"DLTEND\r\r")


@vector("invalid", "the trailer says that the file is a byte longer than it is", "the trailer speaks of")
def trailer_file_length() -> bytes:
    return with_trailer(total=len(small()) + 1)


@vector("invalid", "the first reserved byte of the trailer is set", "reserved bytes of the trailer")
def trailer_reserved_first() -> bytes:
    return with_trailer(reserved=b"\1" + bytes(31))


@vector("invalid", "the last reserved byte of the trailer is set", "reserved bytes of the trailer")
def trailer_reserved_last() -> bytes:
    return with_trailer(reserved=bytes(31) + b"\1")


@vector("invalid", "one bit of the seal is flipped", "digest of header, index and trailer")
def seal() -> bytes:
    data = bytearray(small())
    data[-9] ^= 1
    return bytes(data)


@vector("invalid", "one bit of the index is flipped, and only the seal tells", "digest of header, index and trailer")
def flipped_index() -> bytes:
    draft = Draft.of(small())
    draft.index["metadata"] = {"a": "b"}
    good = draft.build()
    draft.index["metadata"] = {"a": "c"}
    data = draft.build()
    return data[:-40] + good[-40:]


@vector("invalid", "one bit of the header is flipped, and only the seal tells", "digest of header, index and trailer")
def flipped_header() -> bytes:
    draft, other = Draft.of(small()), Draft.of(small())
    other.header = header(compatible=1)
    return other.build()[:-40] + draft.build()[-40:]


@vector("invalid", "one bit of the content id is flipped, and only the seal tells", "digest of header, index and")
def flipped_trailer() -> bytes:
    draft = Draft.of(small())
    draft.index["metadata"] = {"a": "b"}
    good, other = draft.build(content_id=bytes(32)), draft.build()
    return other[:-40] + good[-40:]


@vector("invalid", "the content id is not that of the content", "content id")
def wrong_content_id() -> bytes:
    return Draft.of(small()).build(content_id=bytes(32))


@vector("invalid", "only the last byte of the content id is wrong", "content id")
def wrong_content_id_last_byte() -> bytes:
    draft = Draft.of(small())
    right = draft.content_id()
    return draft.build(content_id=right[:-1] + bytes([right[-1] ^ 1]))


@vector("invalid", "a byte stands between the index and the trailer", "does not end where the trailer starts")
def trailer_gap() -> bytes:
    draft = Draft.of(small())
    body, index = draft.body(), encode(draft.index)
    total = len(body) + len(index) + 129
    return body + index + b"\0" + trailer(draft.header, index, len(body), draft.content_id(), total=total)


@vector("invalid", "the index starts at an offset that is no multiple of 4096", "does not end where the trailer starts")
def index_unaligned() -> bytes:
    draft = Draft.of(stored({"a": bytes(range(256)) * 16}))
    draft.padding[1] = bytes(256)
    return draft.build()


@vector("invalid", "the index starts before byte 4096: a file without a body", "the file ends too early")
def index_at_64() -> bytes:
    draft = Draft.of(small())
    draft.index.update(layouts=[], sections=[], tensors={})
    draft.raw, draft.padding = [], {0: b""}
    return draft.build()


@vector("invalid", "the index starts at 0: it is the file's beginning", "does not end where the trailer starts")
def index_at_0() -> bytes:
    draft = Draft.of(small())
    body, index = draft.body(), encode(draft.index)
    whole = body + index
    return whole + trailer(draft.header, whole, 0, draft.content_id())


@vector("invalid", "the index is 2**40 bytes long, it says", "over the limit")
def huge_index() -> bytes:
    return with_trailer(length=1 << 40)


@vector("invalid", "the index's length makes its end overflow 64 bits", "over the limit")
def overflowing_index() -> bytes:
    return with_trailer(length=2**64 - 4096, total=len(small()))


@vector("invalid", "there is no index: its length is 0", "not valid msgpack")
def index_of_no_bytes() -> bytes:
    draft = Draft.of(small())
    body = draft.body()
    return body + trailer(draft.header, b"", len(body), draft.content_id())


@vector("invalid", "the index is an array", "expected the keys")
def index_is_an_array() -> bytes:
    draft = Draft.of(small())
    body, index = draft.body(), pack([])
    return body + index + trailer(draft.header, index, len(body), draft.content_id())
