"""Tools of the test vectors' generators: registering one, making a term, changing a file behind its seal."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from applied import SIZES, Stored, fine_tuned, meant
from blake3 import blake3
from draft import Draft, Edit
from numpy.typing import NDArray

from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.index.scaled import ScaledRef
from deltafmt.terms.buffers import blank, raw_bytes
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.nm.layout import NMLayout

VECTORS: dict[str, bytes] = {}

Layout = TypeVar("Layout")
Maker = Callable[[], "bytes | WithBase"]
MakeArrays = Callable[..., TermArrays]
MakePositions = Callable[[NMLayout, int, int, int], NDArray[np.uint8]]

# What makes up the content of a term of each kind: (layout, rows, columns, seed) to arrays.
ARRAYS: dict[str, MakeArrays] = {}


def makes_arrays(kind: str) -> Callable[[MakeArrays], MakeArrays]:
    """Register what makes up the content of terms of a kind."""

    def register(make: MakeArrays) -> MakeArrays:
        ARRAYS[kind] = make
        return make

    return register


# What makes up the positions of an index encoding: (layout, seed, mask rows, groups) to positions.
POSITIONS: dict[str, MakePositions] = {}


def makes_positions(index: str) -> Callable[[MakePositions], MakePositions]:
    """Register what makes up the positions of an index encoding that cannot hold any."""

    def register(make: MakePositions) -> MakePositions:
        POSITIONS[index] = make
        return make

    return register


@dataclass(frozen=True)
class WithBase:
    """A file and the base that it is applied to: dtype, shape and bytes of each tensor by name."""

    data: bytes
    base: dict[str, Stored]
    refused: bool = False


def vector(expect: str, comment: str, error: str = "", name: str = "") -> Callable[[Maker], Maker]:
    """Register a generator; its name is the vector's, unless a name is given.

    Args:
        expect: ``ok``, ``invalid`` or ``unsupported``.
        comment: what the file is, in a few words.
        error: words of this implementation's message.
        name: the vector's name, for generators that are made in a loop.
    """

    def register(make: Maker) -> Maker:
        made = make()
        found = name or make.__name__.replace("_", "-")
        assert found not in VECTORS, f"two vectors are called {found}"
        VECTORS[found] = encoded(made if isinstance(made, WithBase) else WithBase(made, {}), expect, comment, error)
        return make

    return register


def encoded(made: WithBase, expect: str, comment: str, error: str) -> bytes:
    """Return the bytes of a vector's file (specification, section 16)."""
    lines = [f"expect: {expect}", f"comment: {comment}"]
    if error:
        lines.append(f"error: {error}")
    if expect == "ok":
        with DeltaFile(io.BytesIO(made.data)) as delta:
            lines.append(f"content_id: {delta.content_id}")
            deltas = {name: delta.delta(name) for name in delta if delta.resolve(name).action == "add"}
            for name, matrix in deltas.items():
                lines.append(f"delta.{name}: {hashlib.sha256(matrix.tobytes()).hexdigest()}")
            for name, (dtype, shape, data) in made.base.items():
                lines.append(f"base.{name}: {dtype} {','.join(map(str, shape))} {data.hex()}")
            if made.refused:
                lines.append("apply: refuse")
            elif made.base:
                for name, data in fine_tuned(delta, deltas, made.base).items():
                    lines.append(f"tensor.{name}: {hashlib.sha256(data).hexdigest()}")
    head = "\n".join(lines) + "\n\n"
    return head.encode() + zlib.compress(made.data, 9)


def fields(count: int, top: int, salt: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return fields from 0 to ``top`` that look random and need no generator to reproduce."""
    return ((np.arange(count, dtype=np.uint64) * 2654435761 + salt >> np.uint64(7)) % (top + 1)).astype(np.uint8)


def coded(coding: Coding, rows: int, columns: int, scales: int, salt: int) -> LowbitArrays:
    """Return made-up codes, zero points, and ``scales`` scales for each row."""
    zero_points = fields(rows * scales, coding.top, salt + 1).reshape(rows, scales)
    return LowbitArrays(
        fields(rows * columns, coding.top, salt).reshape(rows, columns),
        (1 + np.arange(rows * scales, dtype=np.float32)).reshape(rows, scales) / 256,
        zero_points if coding.has_zero_points else None,
    )


def add_term(writer: ContainerWriter, layout: TermLayout, rows: int, columns: int, seed: int) -> tuple[Term, bytes]:
    """Write a term with made-up content; return it and its payload's digest."""
    seed = seed if layout.seeded else 0
    arrays = ARRAYS[layout.kind](layout, rows, columns, seed)
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    digest = blake3()
    refs = {}
    for name, array in packed.items():
        refs[name] = writer.add(raw_bytes(array))
        digest.update(raw_bytes(codec.digested_form(name, array)))
    return Term(writer.layout_number(layout), layout, seed, refs, slots), digest.digest()


def one_tensor(layout: TermLayout, rows: int, columns: int, profile: str = "hot", seed: int = 7) -> bytes:
    """Return a file with one BF16 tensor ``w``."""
    out = io.BytesIO()
    writer = ContainerWriter(out, profile)
    term, digest = add_term(writer, layout, rows, columns, seed)
    base = BaseRef(bytes(32), "BF16", (rows, columns))
    writer.finish([TensorEntry("w", "add", "BF16", (rows, columns), base, digest, None, (term,))])
    return out.getvalue()


def summed(*layouts: TermLayout, rows: int, columns: int) -> bytes:
    """Return a file with one F32 tensor ``w`` of several terms."""
    out = io.BytesIO()
    writer = ContainerWriter(out)
    digest = blake3()
    terms = []
    for layout in layouts:
        term, _ = add_term(writer, layout, rows, columns, 11)
        terms.append(term)
        for ref in term.buffers.values():
            digest.update(out.getvalue()[4096 + ref.offset :][: ref.length])
    base = BaseRef(bytes(32), "F32", (rows, columns))
    writer.finish([TensorEntry("w", "add", "F32", (rows, columns), base, digest.digest(), None, tuple(terms))])
    return out.getvalue()


def fingerprint(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """Return the identity of a base tensor (section 7.5)."""
    head = f"deltafmt tensor v1\n{dtype}\n{','.join(map(str, shape))}\n"
    return blake3(head.encode() + data).digest()


def based(data: bytes, base: dict[str, Stored], *, refused: bool = False) -> WithBase:
    """Return a file with a base: the digests of base tensors in its index become those of the base.

    Args:
        data: the file.
        base: the base's tensors, those that it keeps as 8-bit floats and their scales included.
        refused: True if the digests stay as they are, and whoever applies the file must refuse the base.
    """
    draft = Draft.of(data)
    for name, described in draft.index.get("scaled", {}).items():
        scales = described["scales"]
        for ref, of in ((described["codes"], name), *(((scales, scales["name"]),) if scales else ())):
            ref["digest"] = fingerprint(*base[of])
    for name, entry in draft.index["tensors"].items():
        if "base" in entry and not refused:
            ref = entry["base"]
            entry["base"]["digest"] = fingerprint(ref["dtype"], tuple(ref["shape"]), base_bytes(draft, name, ref, base))
    return WithBase(draft.build(), base, refused)


def base_bytes(draft: Draft, name: str, ref: Any, base: dict[str, Stored]) -> bytes:
    """Return the bytes of a base tensor, made of its parts."""

    def values(of: str) -> bytes:
        described = draft.index.get("scaled", {}).get(of)
        if described is None or base[of][0] == "BF16":
            return base[of][2]
        return meant(ScaledRef.from_obj(described, of), of, base)

    if "parts" not in ref:
        return values(name)
    size = SIZES.get(ref["dtype"], 1)
    return b"".join(values(of)[start * size :][: count * size] for of, start, count in ref["parts"])


def unchecked(kind: type[Layout], *args: Any, **parameters: Any) -> Layout:
    """Return a layout whose parameters may be outside the specification."""
    check = kind.__dict__["__post_init__"]
    kind.__post_init__ = lambda _: None  # type: ignore[attr-defined]
    try:
        return kind(*args, **parameters)
    finally:
        kind.__post_init__ = check  # type: ignore[attr-defined]


def layout_is(data: bytes, **parameters: Any) -> bytes:
    """Return a file whose first layout has other parameters, with the same buffers."""
    return change(data, lambda index: index["layouts"][0].update(parameters))


def stored(tensors: dict[str, bytes], profile: str = "hot") -> bytes:
    """Return a file of tensors of bytes (U8, 1-d) that replace the base's, all in one section."""
    out = io.BytesIO()
    writer = ContainerWriter(out, profile)
    entries = [
        TensorEntry(name, "replace", "U8", (len(data),), digest=blake3(data).digest(), data=writer.add(data))
        for name, data in tensors.items()
    ]
    writer.finish(entries)
    return out.getvalue()


def small() -> bytes:
    """Return a small file with one BF16 tensor ``w`` of 4 rows and 8 columns: seeded 1:4, 4 bits."""
    return one_tensor(NMLayout(1, 4, 4), 4, 8)


def simple() -> bytes:
    """Return the file that most bad vectors start from: 40 rows of 50 columns, 2:8, 4 bits."""
    return one_tensor(NMLayout(2, 8, 4, share=4), 40, 50)


def change(data: bytes, edit: Edit, header: bytes | None = None) -> bytes:
    """Edit the decoded index; all that depends on it is computed anew."""
    draft = Draft.of(data)
    draft.header = header or draft.header
    return draft.build(edit)


def change_buffer(data: bytes, buffer: str, position: int, value: int, tensor: str = "w") -> bytes:
    """Set a byte of a buffer of a tensor's first term; checksum, digests and seal follow."""
    draft = Draft.of(data)
    section, offset, _ = draft.index["tensors"][tensor]["terms"][0]["buffers"][buffer]
    draft.raw[section][offset + position] = value
    return draft.build()
