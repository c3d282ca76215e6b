"""Vectors of the index's encoding (section 7.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
from draft import Draft
from vector_tools import change, one_tensor, simple, small, stored, vector

from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.nm.layout import NMLayout


def spelled(old: bytes, new: bytes, data: bytes | None = None) -> bytes:
    """Return a small file with some bytes of its index spelled in another way that means the same."""

    def spell(index: bytes) -> bytes:
        assert index.count(old) == 1, index.count(old)
        return index.replace(old, new)

    return Draft.of(data or small()).build(spell=spell)


def with_metadata(metadata: Any) -> bytes:
    """Return a small file with other metadata."""
    return change(small(), lambda index: index.update(metadata=metadata))


@vector(
    "ok", "integers, lengths and strings at every bound of msgpack's short forms, and texts of every length in UTF-8"
)
def short_forms() -> bytes:
    texts = {"a" * n: "b" * n for n in (0, 1, 31, 32, 255, 256)} | {"x" * n: str(n) for n in range(16)}
    metadata = {**texts, "\u00e9": "\u20ac", "\uffff": "\U0001f600", "\U00010000": "\0"}
    draft = Draft.of(stored({"w" * n: bytes(n) for n in (1, 127, 128, 255, 256)}))
    draft.index["metadata"] = dict(sorted(metadata.items()))
    return draft.build()


@vector("ok", "names sorted by code point: U+FFFF stands before U+10000, which UTF-16 sorts the other way")
def sorted_by_code_point() -> bytes:
    return stored({"Z": b"1", "a": b"2", "\uffff": b"3", "\U00010000": b"4"})


@vector("invalid", "an integer of the index is not in its shortest form", "canonical")
def long_integer() -> bytes:
    return spelled(b"\xa5share\x01", b"\xa5share\xcc\x01")


@vector("invalid", "an integer of the index that is not negative is in a form with a sign", "canonical")
def signed_integer() -> bytes:
    return spelled(b"\xa5share\x01", b"\xa5share\xd0\x01")


@vector("invalid", "an integer of the index is in a form with a sign that is as long as that without", "canonical")
def signed_integer_of_16_bits() -> bytes:
    data = one_tensor(NMLayout(1, 4, 4, scale_group=300), 4, 8)
    return spelled(b"\xabscale_group\xcd\x01\x2c", b"\xabscale_group\xd1\x01\x2c", data)


@vector("invalid", "a string of the index has a longer form than it needs", "canonical")
def long_string() -> bytes:
    return spelled(b"\xa3hot", b"\xd9\x03hot")


@vector("invalid", "a key of the index has a longer form than it needs", "canonical")
def long_key() -> bytes:
    return spelled(b"\xa7profile", b"\xd9\x07profile")


@vector("invalid", "an array of the index has a longer form than it needs", "canonical")
def long_array() -> bytes:
    return spelled(b"\xa7removed\x90", b"\xa7removed\xdc\x00\x00")


@vector("invalid", "a map of the index has a longer form than it needs", "canonical")
def long_map() -> bytes:
    return spelled(b"\xa8metadata\x80", b"\xa8metadata\xde\x00\x00")


@vector("invalid", "a byte string of the index has a longer form than it needs", "canonical")
def long_bytes() -> bytes:
    return spelled(b"\xa8checksum\xc4\x10", b"\xa8checksum\xc5\x00\x10")


@vector("invalid", "an integer of a tensor's entry is not in its shortest form", "canonical")
def long_integer_in_entry() -> bytes:
    draft = Draft.of(small())
    draft.spell["tensors", "w"] = lambda entry: entry.replace(b"\xa4seed\x07", b"\xa4seed\xcc\x07")
    return draft.build()


@vector("invalid", "a byte follows the map inside the index", "msgpack")
def index_trailing_byte() -> bytes:
    return Draft.of(small()).build(spell=lambda index: index + b"\xc0")


@vector("invalid", "a byte follows the map of a tensor's entry", "msgpack")
def entry_trailing_byte() -> bytes:
    draft = Draft.of(small())
    draft.spell["tensors", "w"] = lambda entry: entry + b"\xc0"
    return draft.build()


@vector("invalid", "a key stands twice in a tensor's entry", "canonical")
def entry_key_twice() -> bytes:
    draft = Draft.of(stored({"a": b"x"}))
    draft.spell["tensors", "a"] = lambda entry: b"\x86" + entry[1:] + entry[-8:]
    assert draft.index["tensors"]["a"]["shape"] == [1]
    return draft.build()


@vector("invalid", "a name stands twice in the metadata", "canonical")
def metadata_twice() -> bytes:
    return spelled(b"\xa8metadata\x81\xa1a\xa1b", b"\xa8metadata\x82\xa1a\xa1b\xa1a\xa1b", with_metadata({"a": "b"}))


@vector("invalid", "a key stands twice in the index, with the same value", "canonical")
def key_twice() -> bytes:
    return spelled(b"\x87\xabattachments\x80", b"\x88\xabattachments\x80\xabattachments\x80")


@vector("invalid", "a tensor stands twice in the index", "canonical")
def tensor_twice() -> bytes:
    draft = Draft.of(stored({"a": b"x"}))

    def spell(index: bytes) -> bytes:
        place = index.index(b"\xa7tensors\x81")
        return index[:place] + b"\xa7tensors\x82" + index[place + 9 :] * 2

    return draft.build(spell=spell)


@vector("invalid", "the keys of the index are not sorted", "expected the keys")
def unsorted_keys() -> bytes:
    return change(small(), lambda index: index.update(attachments=index.pop("attachments")))


@vector("invalid", "the names of the metadata are not sorted", "not sorted")
def unsorted_names() -> bytes:
    return with_metadata({"b": "", "a": ""})


@vector("invalid", "the names of the metadata are sorted by their length, then by code point", "not sorted")
def sorted_by_length() -> bytes:
    return with_metadata({"b": "", "aa": ""})


@vector("invalid", "the names of the metadata are sorted as UTF-16 sorts", "not sorted")
def sorted_as_utf_16() -> bytes:
    return with_metadata({"\U00010000": "", "\uffff": ""})


@vector("invalid", "the names of the tensors are not sorted", "not sorted")
def unsorted_tensors() -> bytes:
    draft = Draft.of(stored({"a": b"x", "b": b"y"}))
    tensors = draft.index["tensors"]
    draft.index["tensors"] = {name: tensors[name] for name in "ba"}
    return draft.build()


@vector("invalid", "the keys of a tensor's entry are not sorted", "expected the keys")
def unsorted_entry() -> bytes:
    return change(small(), lambda index: index["tensors"]["w"].update(action=index["tensors"]["w"].pop("action")))


@vector("invalid", "a float stands in the metadata", "not a string")
def float_in_index() -> bytes:
    return with_metadata({"x": 1.0})


@vector("invalid", "a float stands in the place of an integer: the seed of a term that has none", "is not an integer")
def float_in_entry() -> bytes:
    data = one_tensor(LowbitLayout(4), 2, 4)
    return change(data, lambda index: index["tensors"]["w"]["terms"][0].update(seed=0.0))


@vector("invalid", "false stands in the place of the integer 0", "is not an integer")
def boolean_for_integer() -> bytes:
    return change(small(), lambda index: index["layouts"][0].update(scale_group=False))


@vector("invalid", "an extension of msgpack stands in the metadata", "not a string")
def extension_in_index() -> bytes:
    return with_metadata({"x": msgpack.ExtType(1, b"")})


@vector("invalid", "a timestamp of msgpack stands in the metadata", "not a string")
def timestamp_in_index() -> bytes:
    return with_metadata({"x": msgpack.Timestamp(0)})


@vector("invalid", "a key of the metadata is an integer", "msgpack")
def integer_key() -> bytes:
    return with_metadata({1: "x"})


@vector("invalid", "a key of the metadata is a byte string", "string")
def bytes_key() -> bytes:
    return with_metadata({b"x": "x"})


@vector("invalid", "a string of the metadata is not UTF-8", "msgpack")
def string_not_utf_8() -> bytes:
    return with_metadata({"a": "\udcff"})


@vector("invalid", "a string of the metadata encodes half of a pair of UTF-16", "msgpack")
def string_with_surrogate() -> bytes:
    return with_metadata({"a": "\udced\udca0\udc80"})


@vector("invalid", "a string of the metadata encodes a character in more bytes than it needs", "msgpack")
def string_overlong() -> bytes:
    return with_metadata({"a": "\udcc0\udcaf"})


@vector("invalid", "the index ends inside a value", "msgpack")
def index_cut() -> bytes:
    return Draft.of(stored({"a": b"x"})).build(spell=lambda index: index[:-1])


@vector("invalid", "maps stand in each other 2000 times", "msgpack")
def index_nested() -> bytes:
    return Draft.of(small()).build(spell=lambda _: b"\x81\xa1a" * 2000 + b"\xc0")


@vector("invalid", "an array says that it has 2**32 - 1 members", "msgpack")
def index_endless_array() -> bytes:
    return spelled(b"\xa7removed\x90", b"\xa7removed\xdd\xff\xff\xff\xff")


@vector("invalid", "the index has a key that version 1 does not know", "expected the keys")
def unknown_key() -> bytes:
    return change(simple(), lambda index: index.update(zzz=1))


def every_map() -> bytes:
    """Return a file with an entry of every action and an attachment."""
    draft = Draft.of(small())
    end = len(draft.raw[0]) + -len(draft.raw[0]) % 256
    draft.raw[0] += bytes(end - len(draft.raw[0])) + b"rr"
    draft.index["sections"].append({**draft.index["sections"][0], "kind": 2})
    draft.raw.append(bytearray(b"x"))
    digest, form = bytes(32), {"dtype": "U8", "shape": [2]}
    draft.index["attachments"] = {"x": {"data": [1, 0, 1], "digest": digest}}
    draft.index["tensors"] = {
        "r": {"action": "replace", "data": [0, end, 2], "digest": digest, **form},
        "s": {"action": "same", "base": {"digest": digest, **form}, **form},
        "t": {"action": "alias", **form, "target": "s"},
        "w": draft.entry,
    }
    return draft.build()


# A map of the file above: its name, what it is, a key that it needs, and the place of the map.
MAPS: list[tuple[str, str, str, Callable[[Any], Any]]] = [
    ("section", "a section", "codec", lambda index: index["sections"][0]),
    ("attachment", "an attachment", "digest", lambda index: index["attachments"]["x"]),
    ("layout", "a layout", "scale_group", lambda index: index["layouts"][0]),
    ("replace", "an entry of action replace", "digest", lambda index: index["tensors"]["r"]),
    ("same", "an entry of action same", "base", lambda index: index["tensors"]["s"]),
    ("alias", "an entry of action alias", "dtype", lambda index: index["tensors"]["t"]),
    ("add", "an entry of action add", "digest", lambda index: index["tensors"]["w"]),
    ("base", "a base", "digest", lambda index: index["tensors"]["w"]["base"]),
    ("term", "a term", "seed", lambda index: index["tensors"]["w"]["terms"][0]),
    ("buffers", "a map of buffers", "scales", lambda index: index["tensors"]["w"]["terms"][0]["buffers"]),
]


def _more(name: str, what: str, place: Callable[[Any], Any]) -> None:
    @vector("invalid", f"{what} has a key that version 1 does not know", "expected the keys", f"unknown-key-{name}")
    def more() -> bytes:
        value = [0, 0, 0] if name == "buffers" else 1
        return Draft.of(every_map()).build(late=lambda index: place(index).update(zzz=value))


def _less(name: str, what: str, key: str, place: Callable[[Any], Any]) -> None:
    @vector("invalid", f"{what} lacks the key {key}", "expected the keys", f"missing-key-{name}")
    def less() -> bytes:
        return change(every_map(), lambda index: place(index).pop(key))


for _name, _what, _key, _place in MAPS:
    _more(_name, _what, _place)
    _less(_name, _what, _key, _place)


@vector("invalid", "the index lacks the key removed", "expected the keys")
def missing_key() -> bytes:
    return change(small(), lambda index: index.pop("removed"))
