"""A file taken apart, to be changed in one place and put together with everything else right.

A bad vector isolates a rule only if all other rules are kept. So checksums, digests, the content id and the seal are
computed from what the changed file says. This module knows the bytes of sections 3 to 8 by itself: the package's own
writer refuses to write most of what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import msgpack
import numpy as np
import xxhash
import zstandard
from blake3 import blake3

from deltafmt.terms import words
from deltafmt.terms.nm.index.encodings import position_bits, rank_bits
from deltafmt.terms.nm.index.rank import positions_of

Edit = Callable[[Any], object]
Spelling = Callable[[bytes], bytes]
Place = tuple[str, str]

HEADER, BLOCK, CHUNK = 64, 4096, 262144
MAGIC, END_MAGIC = b"\x89DLT\r\n\x1a\n", b"DLTEND\r\n"


def header(
    version: int = 1,
    incompatible: int = 0,
    compatible: int = 0,
    *,
    magic: bytes = MAGIC,
    size: int = HEADER,
    reserved: bytes = bytes(24),
) -> bytes:
    """Return the 64 bytes of a header, with its checksum."""
    numbers = (version, 4), (size, 4), (incompatible, 8), (compatible, 8)
    body = magic + b"".join(value.to_bytes(length, "little") for value, length in numbers) + reserved
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def trailer(
    head: bytes,
    index: bytes,
    offset: int,
    content_id: bytes,
    *,
    length: int | None = None,
    total: int | None = None,
    reserved: bytes = bytes(32),
    magic: bytes = END_MAGIC,
) -> bytes:
    """Return the 128 bytes of a trailer for an index at ``offset``, with its seal."""
    numbers = offset, len(index) if length is None else length, total or offset + len(index) + 128
    covered = b"".join(value.to_bytes(8, "little") for value in numbers) + content_id + reserved
    return covered + blake3(head + index + covered).digest() + magic


def aligned(position: int, to: int = BLOCK) -> int:
    """Return the least multiple that is not below a position."""
    return -(-position // to) * to


def pack(obj: Any) -> bytes:
    """Encode an object; the keys of its maps keep their order."""
    # A string that is not UTF-8 is written as Python reads it: its bytes stand for surrogates.
    packed: bytes = msgpack.packb(obj, unicode_errors="surrogateescape")
    return packed


def by_key(obj: Any) -> Any:
    """Return an object whose maps are sorted."""
    if isinstance(obj, dict):
        return {key: by_key(obj[key]) for key in sorted(obj)}
    return [by_key(value) for value in obj] if type(obj) in {list, tuple} else obj


def frames(raw: bytes) -> bytes:
    """Return the stored bytes of a section of codec 1."""
    made = [zstandard.ZstdCompressor(level=9).compress(raw[i : i + CHUNK]) for i in range(0, len(raw), CHUNK)]
    return b"".join(made) + b"".join(len(frame).to_bytes(4, "little") for frame in made)


def encode(index: Any, spell: Mapping[Place, Spelling] = MappingProxyType({})) -> bytes:
    """Encode an index whose entries and descriptions are maps; all keys keep their order.

    Args:
        index: the decoded index.
        spell: spells a packed entry or description in another way, by its place, such as ("tensors", "w").
    """
    out = dict(index)
    for key in {"tensors", "scaled"} & out.keys():
        if isinstance(out[key], dict):
            out[key] = {name: entry if isinstance(entry, bytes) else pack(entry) for name, entry in out[key].items()}
    for (key, name), spelling in spell.items():
        out[key][name] = spelling(out[key][name])
    return pack(out)


@dataclass
class Draft:
    """A file taken apart.

    Attributes:
        header: its 64 bytes.
        index: the decoded index, in which entries and descriptions are decoded, too.
        raw: the raw bytes of every section.
        stored: stored bytes of some sections, in the place of those that their raw bytes give.
        padding: bytes behind the header (0) or behind a section (its number and 1), in the place of zeros.
        spell: spells a packed entry or description in another way, by its place, such as ("tensors", "w").
        serves: False if the end of a served part (section 17.7) stays as it is, whatever the index says.
    """

    header: bytes
    index: Any
    raw: list[bytearray]
    stored: dict[int, bytes] = field(default_factory=dict)
    padding: dict[int, bytes] = field(default_factory=dict)
    spell: dict[Place, Spelling] = field(default_factory=dict)
    serves: bool = True

    @classmethod
    def of(cls, data: bytes) -> Draft:
        """Take a valid file apart."""
        offset, length = (int.from_bytes(data[-128:][i : i + 8], "little") for i in (0, 8))
        index = msgpack.unpackb(data[offset : offset + length])
        for key in {"tensors", "scaled"} & index.keys():
            index[key] = {name: msgpack.unpackb(entry) for name, entry in index[key].items()}
        raw = []
        for row in index["sections"]:
            stored = data[row["offset"] :][: row["length"]]
            raw.append(bytearray(stored if row["codec"] == 0 else _decompressed(stored, row["raw_length"])))
        return cls(data[:HEADER], index, raw)

    @property
    def entry(self) -> Any:
        """The entry of tensor ``w``."""
        return self.index["tensors"]["w"]

    @property
    def term(self) -> Any:
        """The first term of tensor ``w``."""
        return self.entry["terms"][0]

    def body(self) -> bytes:
        """Return the bytes before the index, and write offsets, lengths and checksums into the index."""
        out = bytearray(self.header)
        self._pad(out, 0)
        for number, row in enumerate(self.index["sections"]):
            raw = bytes(self.raw[number])
            stored = self.stored.get(number, raw if row["codec"] == 0 else frames(raw))
            row["checksum"] = xxhash.xxh3_128_digest(stored)
            row["length"], row["offset"], row["raw_length"] = len(stored), len(out), len(raw)
            out += stored
            self._pad(out, number + 1)
        return bytes(out)

    def _pad(self, out: bytearray, number: int) -> None:
        out += self.padding.get(number, bytes(aligned(len(out)) - len(out)))

    def build(
        self,
        edit: Edit | None = None,
        *,
        late: Edit | None = None,
        content_id: bytes | None = None,
        spell: Spelling | None = None,
    ) -> bytes:
        """Return the file.

        Args:
            edit: changes the index once its sections are right. A digest that it changes stays as it is; the other
                digests, the content id and the seal follow what the index then says.
            late: changes the index once the content id is known: what a reader that reads on does not see.
            content_id: in the place of the right one.
            spell: spells the encoded index in another way.
        """
        body = self.body()
        before = {name: entry.get("digest") for name, entry in self.index["tensors"].items()}
        attached = {name: row.get("digest") for name, row in self.index["attachments"].items()}
        if edit is not None:
            edit(self.index)
        for name, entry in self.index["tensors"].items():
            if isinstance(entry, dict) and "digest" in entry and before.get(name, entry["digest"]) == entry["digest"]:
                entry["digest"] = self.payload(entry)
        for name, row in self.index.get("attachments", {}).items():
            if "digest" in row and attached.get(name, row["digest"]) == row["digest"]:
                row["digest"] = blake3(self._bytes(row["data"])).digest()
        if self.serves and any(row.get("kind") == 4 for row in self.index.get("sections", [])):
            self._serve()
            body = self.body()
        identity = self.content_id() if content_id is None else content_id
        if late is not None:
            late(self.index)
        found = encode(self.index, self.spell)
        found = found if spell is None else spell(found)
        return body + found + trailer(self.header, found, len(body), identity)

    def _serve(self) -> None:
        """Make the end of the served part anew (section 17.7); the index says all of it."""
        number = [row["kind"] for row in self.index["sections"]].index(4)
        kept = {key: value for key, value in self.index.items() if key != "files"}
        tensors = {
            name: {key: value for key, value in entry.items() if key != "exact"}
            for name, entry in self.index["tensors"].items()
        }
        served = replace(self, index={**kept, "sections": self.index["sections"][:number], "tensors": tensors})
        index, offset = encode(served.index, self.spell), self.index["sections"][number]["offset"]
        self.raw[number] = bytearray(index + trailer(self.header, index, offset, served.content_id()))

    def payload(self, entry: Any) -> bytes:
        """Return the digest of an entry's payload (section 7.6), also where buffers are not as they should be."""
        digest = blake3()
        for term in entry.get("terms", []):
            layout = self._layout(term)
            for name in sorted(term.get("buffers", {})):
                data = self._bytes(term["buffers"][name])
                ranks = name == "index" and layout.get("index") == "rank"
                digest.update(_fixed(layout, data, entry) if ranks else data)
        if "data" in entry:
            digest.update(self._bytes(entry["data"]))
        return digest.digest()

    def _bytes(self, ref: Any) -> bytes:
        if not isinstance(ref, list) or len(ref) < 3 or ref[0] >= len(self.raw):
            return b""
        section, offset, length = ref[:3]
        raw = bytes(self.raw[section])
        # A reader that does not ask whether a buffer ends in its section finds the zeros behind it.
        return (raw + bytes(aligned(len(raw)) - len(raw)))[max(offset, 0) :][: max(length, 0)]

    def content_id(self) -> bytes:
        """Return the content id (section 7.6) of what the index says."""
        index, said = self.index, {}
        said["attachments"] = {name: row.get("digest") for name, row in index.get("attachments", {}).items()}
        if index.get("files"):
            said["files"] = {name: row.get("digest") for name, row in index["files"].items()}
        said["metadata"], said["removed"] = index.get("metadata", {}), index.get("removed", [])
        if "parent" in index:
            said["parent"] = index["parent"]
        if "scaled" in index:
            said["scaled"] = {name: _decoded(entry) for name, entry in index["scaled"].items()}
        said["tensors"] = {name: self._said(_decoded(entry)) for name, entry in index["tensors"].items()}
        return blake3(pack(by_key(said))).digest()

    def _said(self, entry: Any) -> Any:
        entry = {key: value for key, value in entry.items() if key != "data"}
        if isinstance(entry.get("exact"), dict):
            entry["exact"] = {"digest": entry["exact"].get("digest")}
        if isinstance(entry.get("terms"), list):
            entry["terms"] = [self._term(term) for term in entry["terms"]]
            if not entry["terms"]:
                del entry["terms"]
        return entry

    def _layout(self, term: Any) -> Any:
        layouts, number = self.index["layouts"], term.get("layout", 0)
        return layouts[number] if -1 <= number < len(layouts) else {}

    def _term(self, term: Any) -> Any:
        layout = self._layout(term)
        if layout.get("index") == "rank":
            layout = {**layout, "index": "fixed"}
        rest = {key: value for key, value in term.items() if key not in {"buffers", "layout"}}
        return {**rest, "layout": layout}


def _decoded(entry: Any) -> Any:
    return msgpack.unpackb(entry) if isinstance(entry, bytes) else entry


def _decompressed(stored: bytes, raw_length: int) -> bytes:
    count = -(-raw_length // CHUNK)
    lengths = np.frombuffer(stored[len(stored) - 4 * count :], "<u4")
    ends = np.cumsum(lengths)
    parts = [stored[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return b"".join(zstandard.ZstdDecompressor().decompress(part) for part in parts)


def _fixed(layout: Any, data: bytes, entry: Any) -> bytes:
    """Return a ``rank`` index as ``fixed``, also where ranks are not below C(M, N)."""
    n, m = layout["keep"], layout["group"]
    columns = entry["shape"][-1]
    rows = math.prod(entry["shape"][:-1])
    groups, mask_rows = -(-columns // m), -(-rows // layout["share"])
    packed = np.frombuffer(data, "<u4").reshape(-(-mask_rows // 32), -1, 32)
    ranks = words.unpack(packed, mask_rows, groups, rank_bits(n, m)).astype(np.uint64)
    positions = positions_of.reference(ranks, n, m).reshape(mask_rows, -1)
    return words.pack(positions, position_bits(m)).tobytes()
