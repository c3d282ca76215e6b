"""Vectors of progressive files (sections 17.7 and 17.8) that a reader must accept."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass, replace

import numpy as np
from applied import SIZES, Stored, part_of
from blake3 import blake3
from vector_tools import WithBase, add_term, fingerprint, vector

from container_vectors.exact import CHUNK, buffer_of, stepped, units
from deltafmt.container.writer import About, ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.exact import chunk as chunks
from deltafmt.exact.units import unit_of
from deltafmt.format.constants import FEATURE_EXACT, FEATURE_PROGRESSIVE, SECTION_KIND_ATTACHMENTS, SECTION_KIND_EXACT
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.exact import ExactRef, FileRef
from deltafmt.index.sections import Attachment, BufferRef
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout

FEATURES = FEATURE_EXACT | FEATURE_PROGRESSIVE
# Bits of elements that no sum leaves as they are: zeros, the smallest subnormals, infinity, NaNs of both signs.
SPECIAL = {
    "BF16": [0, 0x8000, 1, 0x7F80, 0x7F81, 0xFFC1],
    "F16": [0, 0x8000, 1, 0x7C00, 0x7C01, 0xFE01],
    "F32": [0, 1 << 31, 1, 0x7F800000, 0x7F800001, 0xFFC00001],
}


@dataclass(frozen=True)
class Kept:
    """A tensor with terms and an exact part.

    Attributes:
        layouts: of its terms.
        factors: what they are multiplied with.
        form: of its chunks.
        shape: its shape.
        rows: of the base.
        dtype, base_dtype: the dtypes.
    """

    layouts: tuple[TermLayout, ...]
    factors: tuple[float, ...]
    form: int = chunks.SORTED
    shape: tuple[int, int] = (20, 20)
    rows: int = 20
    dtype: str = "BF16"
    base_dtype: str = "BF16"


DROPPED = NMLayout(1, 4, 4, share=1)
TENSORS = {
    "dense": Kept((LowbitLayout(3, "midtread"),), (0.75,), dtype="F16", base_dtype="F16"),
    "fewer": Kept((SparseLayout("BF16", 4, 256),), (0.5,), shape=(14, 20), base_dtype="F32"),
    "grown": Kept((NMLayout(2, 8, 3, "fixed", share=1),), (1.0,), shape=(24, 20), dtype="F32", base_dtype="BF16"),
    "nothing": Kept((DROPPED,), (0.25,), chunks.SAME),
    "places": Kept((DROPPED,), (0.25,), chunks.SPARSE),
    "seeded": Kept((DROPPED,), (0.25,)),
    "stored": Kept((DROPPED,), (-0.3,), chunks.DIFFERENCES),
    "sum": Kept(
        (LowRankLayout(2, "F16"), DROPPED, SparseLayout(Coding(2), 8, 256)),
        (1.1, 0.27, 0.1),
        dtype="F32",
        base_dtype="F32",
    ),
}


def base_of(kept: Kept, salt: int) -> Stored:
    """Return the base of a tensor."""
    dtype, shape = kept.base_dtype, (kept.rows, kept.shape[1])
    found = units(kept.rows * kept.shape[1], unit_of(dtype), salt)
    found[: len(SPECIAL[dtype])] = SPECIAL[dtype]
    return dtype, shape, found.tobytes()


def served_entry(writer: ContainerWriter, name: str, kept: Kept, base: Stored) -> TensorEntry:
    """Write the terms of a tensor, and the rows that its base lacks."""
    rows, columns = min(kept.rows, kept.shape[0]), kept.shape[1]
    written = [add_term(writer, layout, rows, columns, 7 + number) for number, layout in enumerate(kept.layouts)]
    new = units((kept.shape[0] - rows) * columns, unit_of(kept.dtype), 3).tobytes()
    data = writer.add(new) if new else None
    reference = BaseRef(fingerprint(*base), *base[:2])
    terms = tuple(term for term, _ in written)
    # The digest of the payload is made once its bytes can be read.
    return TensorEntry(name, "add", kept.dtype, kept.shape, reference, bytes(32), data, terms)


def digested(delta: DeltaFile, entry: TensorEntry) -> TensorEntry:
    """Return an entry with the digest of its payload (section 7.6)."""
    digest = blake3()
    for term in entry.terms:
        for name in sorted(term.buffers):
            digest.update(bytes(delta.container.buffer(term.buffers[name])))
    if entry.data is not None:
        digest.update(bytes(delta.container.buffer(entry.data)))
    return replace(entry, digest=digest.digest())


class Progressive:
    """A progressive file.

    Attributes:
        data: the file.
        base: its base.
        served: bytes of the served part.
    """

    def __init__(self, tensors: dict[str, Kept], *, tied: str = "", files: bool = False) -> None:
        self.base = {name: base_of(kept, number) for number, (name, kept) in enumerate(tensors.items())}
        # Written twice: digests, and what exact parts are made from, are read from the first file.
        first = io.BytesIO()
        entries = self._write(first, tensors, {}, {}, tied)
        with DeltaFile(first) as delta:
            entries = {name: digested(delta, entries[name]) for name in tensors}
            buffers = {name: self._part(delta, entries[name], kept) for name, kept in tensors.items()}
        out = io.BytesIO()
        self._write(out, tensors, entries, buffers, tied, files=files)
        self.data = out.getvalue()

    def _part(self, delta: DeltaFile, entry: TensorEntry, kept: Kept) -> tuple[bytes, ExactRef, bytes]:
        """Return the buffer of an exact part, what the index says of it, and the bytes that it restores."""
        factors = tuple(int(bits) for bits in np.array(kept.factors, "<f4").view("<u4"))
        data = self.base[entry.name][2][: entry.delta_rows * entry.columns * SIZES[kept.base_dtype]]
        predicted, marked = part_of(delta, entry, data, factors)
        unit = unit_of(kept.dtype)
        prediction, marks = np.array(predicted, unit.dtype), np.array(marked)
        every = {chunks.SAME: 10**6, chunks.SPARSE: 37}.get(kept.form, 1)
        values = prediction if kept.form == chunks.SAME else stepped(prediction, every)
        restored = values.tobytes()
        digest = fingerprint(kept.dtype, kept.shape, restored)
        buffer = buffer_of(kept.form, values, prediction, unit, marks)
        return buffer, ExactRef(CHUNK, BufferRef(0, 0, 0), digest, factors), restored

    def _write(
        self,
        out: io.BytesIO,
        tensors: dict[str, Kept],
        entries: dict[str, TensorEntry],
        buffers: dict[str, tuple[bytes, ExactRef, bytes]],
        tied: str,
        *,
        files: bool = False,
    ) -> dict[str, TensorEntry]:
        """Write the file; without ``buffers``, one that is not progressive. Return the entries of the served part."""
        writer = ContainerWriter(out, features=FEATURES if buffers else 0)
        made = {name: served_entry(writer, name, kept, self.base[name]) for name, kept in tensors.items()}
        made = {name: replace(entry, digest=entries[name].digest) if entries else entry for name, entry in made.items()}
        if tied:
            target = made[tied]
            made["tied"] = TensorEntry("tied", "alias", target.dtype, target.shape, target=tied)
        note = b"a note\n"
        attached = Attachment(writer.add(note, SECTION_KIND_ATTACHMENTS), blake3(note).digest())
        about = About(attachments={"note.txt": attached}, metadata={"method": "by hand"})
        if not buffers:
            writer.finish(made.values(), **about)
            return made
        writer.serve(made.values(), **about)
        self.served = writer.sections[-1].offset + writer.sections[-1].length
        whole = dict(made)
        for name, (buffer, ref, _) in buffers.items():
            whole[name] = replace(made[name], exact=replace(ref, data=writer.add(buffer, SECTION_KIND_EXACT)))
        if files:
            about["files"] = {"model.safetensors": self._file(writer, tensors, buffers)}
        writer.finish(whole.values(), **about)
        return made

    def _file(
        self, writer: ContainerWriter, tensors: dict[str, Kept], buffers: dict[str, tuple[bytes, ExactRef, bytes]]
    ) -> FileRef:
        """Write the head of a weight file."""
        header, body = {}, b""
        for name, (_, _, restored) in buffers.items():
            places = [len(body), len(body) + len(restored)]
            header[name] = {"data_offsets": places, "dtype": tensors[name].dtype, "shape": list(tensors[name].shape)}
            body += restored
        text = json.dumps(header).encode()
        head = struct.pack("<Q", len(text)) + text
        return FileRef(blake3(head + body).digest(), writer.add(head, SECTION_KIND_ATTACHMENTS))


def every_kind() -> Progressive:
    """Return a file with a tensor for each kind of term, a sum of three, and an alias."""
    return Progressive(TENSORS, tied="seeded")


def one_part(*, files: bool = False) -> Progressive:
    """Return a file with one tensor, ``seeded``."""
    return Progressive({"seeded": TENSORS["seeded"]}, files=files)


@vector("ok", "tensors with an exact part: terms of every kind, a sum, an alias, other rows and dtypes; bits 3 and 4")
def progressive() -> WithBase:
    made = every_kind()
    return WithBase(made.data, made.base)


@vector("ok", "the served part of the vector progressive, cut off: nothing in it needs bits 3 and 4")
def progressive_cut() -> bytes:
    made = every_kind()
    return made.data[: made.served]


@vector("ok", "the same with the base: what is served")
def progressive_served() -> WithBase:
    made = every_kind()
    return WithBase(made.data[: made.served], made.base)


@vector("ok", "a progressive file restores a weight file")
def progressive_files() -> bytes:
    return one_part(files=True).data
