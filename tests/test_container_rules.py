"""Files that a reader refuses although their checksums are right: headers, index, limits."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from containers import NAMES, edited, index_of, replacement, sealed, write_container
from deltafmt.container import canonical
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.errors import DeltafmtError, InvalidFileError, UnsupportedError, UsageError
from deltafmt.format import constants as c
from deltafmt.format.limits import Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.sections import BufferRef
from strategies import examples


def checked_header(version: int = 1, size: int = 64, reserved: bytes = bytes(24)) -> bytes:
    """Build a header with a right checksum, whatever its fields hold."""
    body = struct.pack("<8sIIQQ24s", c.HEADER_MAGIC, version, size, 0, 0, reserved)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (checked_header(version=0), "version 0"),
        (checked_header(size=128), "reserved bytes"),
        (checked_header(reserved=bytes(23) + b"\1"), "reserved bytes"),
        (checked_header()[:-1] + b"\0", "checksum"),
    ],
)
def test_a_wrong_header_is_refused(header: bytes, match: str) -> None:
    data = write_container({"a": b"abc"})
    assert checked_header() == data[:64]
    with pytest.raises(InvalidFileError, match=match) as caught:
        Container(io.BytesIO(sealed(data, canonical.pack(index_of(data)), header)))
    assert not isinstance(caught.value, UnsupportedError)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (1, c.MAX_INDEX_BYTES + 1, "over the limit"),
        (1, 2**64 - 1, "over the limit"),
        (0, 2**64 - 4096, "does not end where the trailer starts"),
        (0, 0, "does not end where the trailer starts"),
        (2, 2**64 - 1, "the trailer speaks of"),
    ],
)
def test_a_wrong_trailer_is_refused(field: int, value: int, match: str) -> None:
    data = bytearray(write_container({"a": b"abc"}))
    struct.pack_into("<Q", data, len(data) - c.TRAILER_SIZE + 8 * field, value)
    with pytest.raises(InvalidFileError, match=match):
        Container(io.BytesIO(data))


def test_reserved_bytes_of_the_trailer_are_zero() -> None:
    data = write_container({"a": b"abc"})
    trailer = bytearray(data[-c.TRAILER_SIZE :])
    trailer[60] = 1
    header, index = data[: c.HEADER_SIZE], canonical.pack(index_of(data))
    # With a digest that fits, so that nothing else can be what is refused.
    trailer[88:120] = blake3(header + index + trailer[:88]).digest()
    with pytest.raises(InvalidFileError, match="reserved bytes of the trailer"):
        Container(io.BytesIO(data[: -c.TRAILER_SIZE] + trailer))


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | NAMES | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(NAMES, inner, max_size=20),
    max_leaves=30,
)


@examples(150)
@given(JSON_LIKE)
def test_canonical_msgpack_comes_back(obj: Any) -> None:
    data = canonical.encode(obj)
    assert canonical.decode(data, "it") == obj
    assert canonical.encode(canonical.decode(memoryview(data), "it")) == data


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\xa1a\x01\xa1a\x02",  # a key twice
        b"\x81\x01\x02",  # a key that is no string
        b"\xde\x00\x01\xa1a\x01",  # a map, an array, a string and bytes with lengths that could be shorter
        b"\xdc\x00\x01\x01",
        b"\xd9\x01a",
        b"\xc5\x00\x01a",
        b"\xcc\x01",  # integers that could be shorter
        b"\xcd\x00\xff",
        b"\xd0\x01",
        b"\xcf\x00\x00\x00\x00\x00\x00\x00\x01",
        b"\xd3\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xca\x3f\x80\x00\x00",  # a float of 32 bits
        b"\x81\xa1a\xc7\x01\x05a",  # an extension whose header could be shorter
        b"\xc1",  # never used
        b"",
        b"\x01\x02",  # trailing bytes
        b"\x80\x00",
        b"\x81\xa1a",  # ends early
        b"\xa2\xff\xfe",  # not UTF-8
        b"\xa3\xed\xa0\x80",  # a surrogate
        b"\xdd\xff\xff\xff\xff",  # lengths beyond the data
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000 + b"\xc0",  # deeper than any parser goes
        b"\x81\xa1a" * 100_000 + b"\xc0",
    ],
)
def test_msgpack_that_is_not_canonical_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidFileError, match=r"^the index "):
        canonical.decode(data, "the index")


@pytest.mark.parametrize("obj", [1.5, {1: 2}, {"a": 2**64}, {"a": "\ud800"}, {"\ud800": 1}, {b"a": 1}, {"a": object()}])
def test_what_an_index_cannot_hold_is_not_written(obj: object) -> None:
    with pytest.raises(DeltafmtError):
        canonical.encode(obj)


def drop(key: str) -> Callable[[Any], object]:
    """Return an edit that drops a key of the index."""
    return lambda index: index.pop(key)


def put(*path: Any) -> Callable[[Any], object]:
    """Return an edit that sets the value at a path (its last item) of the index, with keys in order."""

    def edit(index: Any) -> None:
        *parents, key, value = path
        for parent in parents:
            index = index[parent]
        index[key] = value
        if type(index) is dict:
            pairs = sorted(index.items())
            index.clear()
            index.update(pairs)

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop("removed"), "index: expected the keys"),
        (put("more", 1), "index: expected the keys"),
        (put("profile", "warm"), "unknown profile 'warm'"),
        (put("metadata", "key", 1), "metadata: a value is not a string"),
        (put("removed", ["b", "a"]), "removed: the names are not sorted"),
        (put("removed", ["x", "x"]), "removed: the names are not sorted"),
        (put("removed", ["one"]), "removed: the names are not sorted and distinct from the tensors"),
        (put("sections", []), "sections: they end at 4096"),
        (put("sections", 0, "offset", 8192), r"sections\[0\].offset: 8192 where 4096 is next"),
        (put("sections", 0, "codec", 2), r"sections\[0\].codec: unknown codec 2"),
        (put("sections", 0, "kind", 5), r"sections\[0\].kind: unknown section kind 5"),
        (put("sections", 0, "kind", True), r"sections\[0\].kind: unknown section kind True"),
        (put("sections", 0, "length", 2**62), r"equal lengths"),
        (put("sections", 0, "length", -1), r"sections\[0\].length: -1 is not an integer"),
        (put("sections", 0, "checksum", bytes(15)), "expected 16 bytes"),
        (put("sections", 1, "raw_length", 2**50), r"sections\[1\].raw_length: .* cannot hold"),
        (put("attachments", "../x", {"data": [1, 0, 1], "digest": bytes(32)}), "not a plain relative path"),
        (put("attachments", "a.json", "data", [0, 0, 1]), "section 0 is of another kind"),
        (put("attachments", "a.json", "data", [1, 0, 999]), "leave section 1"),
        (put("tensors", "one", "data", [0, 1, 3]), "offset 1 is not a multiple of 256"),
        (put("tensors", "one", "data", [0, 0, 4]), "4 bytes where the shape needs 3"),
        (put("tensors", "one", "data", [2, 0, 3]), "section 2 is not one of the 2 sections"),
        (put("tensors", "one", "data", [0, 256, 3]), "leave section 0"),
        (put("tensors", "one", "data", [0, 2**62, 3]), "leave section 0"),
        (put("tensors", "one", "dtype", "I4"), "unknown dtype 'I4'"),
        (put("tensors", "one", "shape", [1] * 9), "at most 8 sizes"),
        (put("tensors", "one", "shape", [2**40, 2**40]), "more than 281474976710656 elements"),
        (put("tensors", "one", "shape", [-3]), "-3 is not an integer"),
        (put("tensors", "one", "shape", [True, 3]), "True is not an integer"),
        (put("tensors", "one", "digest", b""), "expected 32 bytes"),
        (put("tensors", "one", "action", "multiply"), "unknown action 'multiply'"),
        (put("tensors", "two", {"action": "alias", "dtype": "U8", "shape": [3], "target": "two"}), "another tensor"),
        (put("tensors", "two", {"action": "alias", "dtype": "U8", "shape": [3], "target": "x"}), "tensor of its own"),
        (put("tensors", "two", {"action": "alias", "dtype": "U8", "shape": [4], "target": "one"}), "dtype or shape"),
        (put("tensors", "", {"action": "alias", "dtype": "U8", "shape": [3], "target": "one"}), "1 to 1024 bytes"),
        (put("tensors", "x" * 1025, {"action": "alias", "dtype": "U8", "shape": [3], "target": "one"}), "1 to 1024"),
    ],
)
def test_an_index_that_breaks_the_rules_is_refused(edit: Callable[[Any], object], match: str) -> None:
    data = write_container({"one": b"abc"}, {"a.json": b"{}"})
    with pytest.raises(InvalidFileError, match=match):
        list(Container(io.BytesIO(edited(data, edit))).entries())


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [0, 0], [0, 3]])
def test_a_delta_without_elements_is_refused(shape: list[int]) -> None:
    layout = {"bits": 4, "grid": "midtread", "group": 16, "index": "seeded", "keep": 4, "kind": "nm"}
    layout |= {"scale_dtype": "BF16", "scale_group": 8, "share": 1}
    nothing = {"codes": [0, 0, 0], "scales": [0, 0, 0]}
    entry = {"action": "add", "base": {"digest": bytes(32), "dtype": "BF16", "shape": shape}, "digest": bytes(32)}
    entry |= {"dtype": "BF16", "shape": shape, "terms": [{"buffers": nothing, "layout": 0, "seed": 0}]}

    def edit(index: Any) -> None:
        index["layouts"] = [dict(sorted(layout.items()))]
        index["tensors"] = {"one": entry}

    data = edited(write_container({"one": b""}), edit)
    # Rows or columns without number would cost no byte, and a loop over them would never end.
    with DeltaFile(io.BytesIO(data)) as opened, pytest.raises(InvalidFileError, match="shape"):
        opened["one"]


def nodes(obj: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every value of a plain object."""
    yield path
    if type(obj) is dict or type(obj) is list:
        for key, value in obj.items() if type(obj) is dict else enumerate(obj):
            yield from nodes(value, (*path, key))


def with_value(obj: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return a plain object with the value at a path changed."""
    if not path:
        return change(obj)
    copied = obj.copy()
    copied[path[0]] = with_value(obj[path[0]], path[1:], change)
    return copied


STRANGERS = (1.0, 0.0, float("nan"), None, True, -1, 2**64 - 1, "?", b"?", [], {}, [[]], {"?": 1}, {b"?": 1})
EXTENSIONS = (msgpack.ExtType(5, b"abcd"), msgpack.Timestamp(1))


def test_a_value_of_another_kind_is_refused_everywhere(packed: Path) -> None:
    data = packed.read_bytes()
    index = index_of(data)
    index["tensors"] = {name: msgpack.unpackb(entry) for name, entry in index["tensors"].items()}
    accepted = []
    for path in nodes(index):
        old = functools.reduce(lambda value, key: value[key], path, index)
        for stranger in (*STRANGERS, *EXTENSIONS):
            if type(stranger) is type(old):
                continue

            def edit(target: Any, path: tuple[Any, ...] = path, stranger: object = stranger) -> None:
                target.update(with_value(target, path, lambda _: stranger))

            changed = edited(data, edit) if path else sealed(data, msgpack.packb(stranger))
            try:
                list(Container(io.BytesIO(changed)).entries())
                accepted.append((path, stranger))
            except InvalidFileError:
                pass
    assert accepted == []


def test_keys_out_of_order_twice_or_too_many_are_refused_everywhere(packed: Path) -> None:
    data = packed.read_bytes()
    index = index_of(data)
    index["tensors"] = {name: msgpack.unpackb(entry) for name, entry in index["tensors"].items()}
    accepted = []
    for path in nodes(index):
        old = functools.reduce(lambda value, key: value[key], path, index)
        if type(old) is not dict or not old:
            continue
        changes = {"one more": {**old, "~": 0}, "bytes": {key.encode(): value for key, value in old.items()}}
        if len(old) > 1:
            changes["reversed"] = dict(reversed(old.items()))
        for what, change in changes.items():
            whole = with_value(index, path, lambda _, change=change: change)
            tensors = whole.get("tensors", {})
            whole = {**whole, "tensors": {name: msgpack.packb(e) for name, e in tensors.items()}} if tensors else whole
            try:
                list(Container(io.BytesIO(sealed(data, msgpack.packb(whole)))).entries())
                accepted.append((path, what))
            except InvalidFileError:
                pass
    assert accepted == []


def test_entries_are_canonical_too() -> None:
    data = write_container({"one": b"abc"})
    index = index_of(data)
    entry = index["tensors"]["one"]
    for wrong in (entry + b"\xc0", entry[:-1], b"", b"\xde\x00" + bytes([entry[0] & 15]) + entry[1:]):
        index["tensors"]["one"] = wrong
        container = Container(io.BytesIO(sealed(data, msgpack.packb(index))))
        with pytest.raises(InvalidFileError, match=r'tensors\["one"\]'):
            container.entry("one")


def test_the_budget_of_raw_bytes_is_kept() -> None:
    data = write_container({"a": bytes(1000)}, {"a.json": bytes(500)}, "cold")
    assert Container(io.BytesIO(data), limits=Limits(max_output=1500)).keys() == ["a"]
    for opener in (Container, DeltaFile):
        with pytest.raises(InvalidFileError, match=r"the sections decode to 1,500 bytes, and max_output is 1,499"):
            opener(io.BytesIO(data), limits=Limits(max_output=1499))


def test_an_unknown_profile_is_not_written() -> None:
    with pytest.raises(UsageError, match="'warm'"):
        ContainerWriter(io.BytesIO(), "warm")


@pytest.mark.parametrize("kind", ["gap", "unused", "overlap", "padding"])
def test_verify_refuses_bytes_that_no_buffer_accounts_for(kind: str) -> None:
    sink = io.BytesIO()
    writer = ContainerWriter(sink)
    first = replacement(writer, "a", b"abc")
    if kind == "gap":
        writer.add(b"left over")
    second = replacement(writer, "b", b"abc")
    if kind == "unused":
        writer.add(b"left over")
    if kind == "overlap":
        second = TensorEntry("b", "replace", "U8", (3,), digest=first.digest, data=first.data)
    if kind == "padding":
        # The fourth byte lies in front of the next buffer, where padding must stand.
        writer = ContainerWriter(sink := io.BytesIO())
        long = replacement(writer, "a", b"abcd")
        assert long.data is not None
        short = BufferRef(0, long.data.offset, 3)
        first = TensorEntry("a", "replace", "U8", (3,), digest=blake3(b"abc").digest(), data=short)
        second = replacement(writer, "b", b"abc")
    writer.finish([first, second])
    with pytest.raises(InvalidFileError, match="section 0"):
        deltafmt.verify(io.BytesIO(sink.getvalue()), threads=1)  # type: ignore[arg-type]
