"""Valid delta files below 64 KiB that ask for as much as they can; every limit of docs/security.md has one."""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from blake3 import blake3
from make_corpus import weights, write_checkpoint

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.container.writer import ContainerWriter
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry, Term
from deltafmt.index.exact import ExactRef
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.buffers import views as term_views
from deltafmt.terms.codecs import term_codec
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout

MIB = 1 << 20
SCALES = b"\x80\x3f"  # the BF16 1.0
SMALL_FILE = 64 << 10
BASE_SHAPE = (1024, 1024)
BASE_TENSOR = "model.layers.0.mlp.up_proj.weight"


class Writer:
    """Writes cold files of zeros, which are small whatever they claim to hold."""

    def __init__(self, features: int = 0) -> None:
        self.sink = io.BytesIO()
        self.writer = ContainerWriter(self.sink, "cold", features=features)
        self.entries: list[TensorEntry] = []

    def add(
        self,
        name: str,
        shape: tuple[int, int],
        layouts: Sequence[TermLayout],
        base: BaseRef | None = None,
        pattern: bytes = b"\0",
    ) -> None:
        """Add a tensor that is the base's plus terms whose buffers repeat a pattern."""
        rows, columns = shape
        terms, digest = [], blake3()
        for layout in layouts:
            buffers, views = {}, {}
            for key, length in layout.buffer_lengths(rows, columns, 0).items():
                data = (SCALES if "scales" in key else pattern) * length
                buffers[key] = self.writer.add(data[:length])
                views[key] = memoryview(data[:length])
            codec = term_codec(layout, rows, columns)
            for key, array in term_views(layout, rows, columns, views).items():
                for piece in codec.digested_pieces(key, array):
                    digest.update(raw_bytes(piece))
            terms.append(Term(self.writer.layout_number(layout), layout, 0, buffers))
        reference = base or BaseRef(bytes(32), "BF16", shape)
        self._put(TensorEntry(name, "add", "BF16", shape, reference, digest.digest(), None, tuple(terms)))

    def part(self, chunk: int) -> None:
        """Give every tensor an exact part that restores the base's matrix: its terms count for nothing (factors of 0).

        Nothing is added after it. The entries of the served part, and of the whole file, differ in this alone.
        """
        dtype, shape, data = base_matrix()
        step = chunk * 2
        rows = (
            struct.pack("<QII", xxhash.xxh3_64_intdigest(data[i : i + step]), 0, 0) for i in range(0, len(data), step)
        )
        table, digest = b"".join(rows), hasher(dtype, shape)
        digest.update(data)
        self.writer.serve(self.entries)
        for number, entry in enumerate(self.entries):
            ref = ExactRef(
                chunk, self.writer.add(table, c.SECTION_KIND_EXACT), digest.digest(), (0,) * len(entry.terms)
            )
            self.entries[number] = dataclasses.replace(entry, exact=ref)

    def same(self, name: str, shape: tuple[int, ...]) -> None:
        """Add a tensor that is the base's."""
        self._put(TensorEntry(name, "same", "BF16", shape, BaseRef(bytes(32), "BF16", shape)))

    def replace(self, name: str, size: int) -> None:
        """Add a tensor of zeros that is stored whole."""
        ref = self.writer.add(bytes(size))
        self._put(TensorEntry(name, "replace", "U8", (size,), digest=blake3(bytes(size)).digest(), data=ref))

    def alias(self, name: str, target: str) -> None:
        """Add another name of a tensor."""
        entry = next(entry for entry in self.entries if entry.name == target)
        self._put(TensorEntry(name, "alias", entry.dtype, entry.shape, target=target))

    def _put(self, entry: TensorEntry) -> None:
        self.entries.append(entry)
        self.writer.boundary()

    def write(
        self, path: Path, attachments: dict[str, bytes] | None = None, metadata: dict[str, str] | None = None
    ) -> Path:
        """Write the file, and check that it is small."""
        attached = {name: self.writer.attach(data) for name, data in (attachments or {}).items()}
        self.writer.finish(self.entries, attachments=attached, metadata=metadata)
        path.write_bytes(self.sink.getvalue())
        assert path.stat().st_size < SMALL_FILE
        return path


HUGE: dict[str, tuple[tuple[int, int], list[TermLayout]]] = {
    "empty sparse": ((2**24, 2**18), [SparseLayout("BF16", 16, 65536)]),
    "one bit lowrank": ((2**24, 2**24), [LowRankLayout(1, Coding(1, "midrise"))]),
    "16 terms": ((2**20, 2**20), [LowRankLayout(1, Coding(8 if n else 7, "midrise")) for n in range(2)] * 8),
    "nm 1:128": ((32, 2**26), [NMLayout(1, 128, 1, "seeded", "midrise")]),
    "lowbit": ((32, 2**22), [LowbitLayout(1, "midrise")]),
}


def huge(name: str) -> Callable[[Path, bytes], Path]:
    """Return what writes a file of one tensor of :data:`HUGE`."""

    def write(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
        writer = Writer()
        writer.add(BASE_TENSOR, *HUGE[name])
        return writer.write(path)

    return write


def decoded(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
    """Sections that decode to as much as ``max_output`` allows."""
    writer = Writer()
    writer.replace("w", 24 * MIB)
    return writer.write(path, {"a.json": bytes(9 * MIB)})


def over(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
    """Sections that decode to more than that."""
    writer = Writer()
    writer.replace("w", 40 * MIB)
    return writer.write(path, {"a.json": bytes(30 * MIB)})


def aliases(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
    """Names of one tensor of 4 MiB."""
    writer = Writer()
    writer.replace("w", 4 * MIB)
    for number in range(80):
        writer.alias(f"alias.{number}", "w")
    return writer.write(path)


def ranks(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
    """An index of ranks that becomes 254 times as large."""
    writer = Writer()
    writer.add(BASE_TENSOR, (32 * 255, 255), [NMLayout(254, 255, 1, "rank", "midrise")])
    return writer.write(path)


def vectors(path: Path, base: bytes) -> Path:
    """Many vectors on the base's matrix."""
    writer = Writer()
    layouts = [LowRankLayout(1024, Coding(bits, "midrise")) for bits in (1, 2)]
    writer.add(BASE_TENSOR, BASE_SHAPE, layouts, BaseRef(base, "BF16", BASE_SHAPE), b"\xa5")
    return writer.write(path, metadata={"note": "x" * 50_000})


def terms(path: Path, base: bytes) -> Path:
    """As many terms as a tensor may have, on as many tensors of the base's matrix as the output may have."""
    writer = Writer(c.FEATURE_PARTS)
    layouts: list[TermLayout] = [NMLayout(1, 128, 1, "seeded", "midrise")] * 16
    part = BasePart(BASE_TENSOR, 0, BASE_SHAPE[0] * BASE_SHAPE[1])
    for number in range(24):
        writer.add(f"t{number}", BASE_SHAPE, layouts, BaseRef(base, "BF16", BASE_SHAPE, (part,)))
    return writer.write(path, metadata={"note": "x" * 10_000})


def restored(path: Path, base: bytes) -> Path:
    """As many terms as the limits allow, and exact parts whose prediction needs them all."""
    writer = Writer(c.FEATURE_PARTS | c.FEATURE_EXACT | c.FEATURE_PROGRESSIVE)
    layouts: list[TermLayout] = [NMLayout(1, 128, 1, "seeded", "midrise")] * 16
    part = BasePart(BASE_TENSOR, 0, BASE_SHAPE[0] * BASE_SHAPE[1])
    for number in range(20):
        writer.add(f"t{number}", BASE_SHAPE, layouts, BaseRef(base, "BF16", BASE_SHAPE, (part,)))
    writer.part(1 << 20)
    return writer.write(path)


def small_chunks(path: Path, base: bytes) -> Path:
    """An exact part in chunks much smaller than the runs of rows in which its terms are decoded."""
    writer = Writer(c.FEATURE_EXACT | c.FEATURE_PROGRESSIVE)
    layouts: list[TermLayout] = [NMLayout(1, 128, 1, "seeded", "midrise", share=8)] * 16
    writer.add(BASE_TENSOR, BASE_SHAPE, layouts, BaseRef(base, "BF16", BASE_SHAPE))
    writer.part(1 << 9)
    return writer.write(path)


def adapter(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
    """Factors of a module that become 32 times as large."""
    writer = Writer()
    writer.add(BASE_TENSOR, (2**21, 2**20), [LowRankLayout(16, Coding(1, "midrise"))])
    return writer.write(path)


def names(path: Path, base: bytes) -> Path:  # noqa: ARG001 - as the others
    """As many tensors as fit, of enormous shapes."""
    writer = Writer()
    for number in range(300):
        writer.same(f"t{number}", (2**16, 2**16, 2**16))
    return writer.write(path)


FILES: dict[str, Callable[[Path, bytes], Path]] = {
    **{name: huge(name) for name in HUGE},
    "decodes to the limit": decoded,
    "decodes over the limit": over,
    "80 aliases": aliases,
    "ranks": ranks,
    "2,048 vectors": vectors,
    "384 terms": terms,
    "320 terms, restored": restored,
    "16 terms, small chunks": small_chunks,
    "an adapter": adapter,
    "300 huge shapes": names,
}


@functools.cache
def base_matrix() -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and bytes of the base's matrix."""
    found: tuple[str, tuple[int, ...], bytes] = weights(np.random.default_rng(3), *BASE_SHAPE)
    return found


def make_base(folder: Path) -> tuple[Path, bytes]:
    """Write the base and return it with the fingerprint of its matrix."""
    dtype, shape, data = base_matrix()
    digest = hasher(dtype, shape)
    digest.update(data)
    return write_checkpoint(folder / "base", {BASE_TENSOR: (dtype, shape, data)}, {}), digest.digest()
