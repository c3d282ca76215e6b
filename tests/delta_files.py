"""Delta files of random layouts, shapes and actions, written without packing anything."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3
from hypothesis import strategies as st

from deltafmt.container import writer as container_writer
from deltafmt.container.writer import ContainerWriter
from deltafmt.format.constants import DTYPE_BITS, byte_count, element_count
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.layout import NMLayout
from index_words import encoded
from strategies import dense_layouts, fitting, generators, layouts, shapes, sparse_layouts

DIGEST = bytes(32)


@dataclass
class DeltaWriter:
    """Write tensors of random bytes, each with the action asked for.

    Args:
        rng: of the bytes.
        profile: of the file.
        section_bytes: a section closes when it has reached this size; small ones let small files have several.
    """

    rng: np.random.Generator
    profile: str = "hot"
    section_bytes: int = 4 << 20
    entries: list[TensorEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sink = io.BytesIO()
        self.writer = ContainerWriter(self.sink, self.profile)

    def add(self, name: str, shape: tuple[int, int], terms: Sequence[TermLayout], new_rows: int = 0) -> None:
        """Add a tensor that is the base's plus some terms."""
        rows, columns = shape
        written = []
        for layout in terms:
            buffers = {}
            slots = int(self.rng.integers(0, min(columns, 60))) if layout.has_slots else 0
            for key, length in layout.buffer_lengths(rows, columns, slots).items():
                data = self.rng.bytes(length)
                if key == "index" and layout.cold_only:
                    assert isinstance(layout, NMLayout)
                    data = random_ranks(self.rng, layout, rows, columns).tobytes()
                buffers[key] = self.writer.add(data)
            seed = int(self.rng.integers(2**32)) if layout.seeded else 0
            written.append(Term(self.writer.layout_number(layout), layout, seed, buffers, slots))
        grown = self.writer.add(self.rng.bytes(new_rows * columns * 2)) if new_rows else None
        base = BaseRef(DIGEST, "BF16", shape)
        full = (rows + new_rows, columns)
        self._put(TensorEntry(name, "add", "BF16", full, base, DIGEST, grown, tuple(written)))

    def replace(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Add a tensor of random bytes."""
        data = self.rng.bytes(byte_count(dtype, shape))
        if dtype == "BOOL":
            data = bytes(byte & 1 for byte in data)
        ref = self.writer.add(data)
        self._put(TensorEntry(name, "replace", dtype, shape, digest=blake3(data).digest(), data=ref))

    def same(self, name: str) -> None:
        """Add a tensor that is the base's."""
        self._put(TensorEntry(name, "same", "F16", (3, 4), BaseRef(DIGEST, "F16", (3, 4))))

    def alias(self, name: str, target: str) -> None:
        """Add another name of a tensor."""
        entry = next(entry for entry in self.entries if entry.name == target)
        self._put(TensorEntry(name, "alias", entry.dtype, entry.shape, target=target))

    def _put(self, entry: TensorEntry) -> None:
        self.entries.append(entry)
        before, container_writer.SECTION_TARGET = container_writer.SECTION_TARGET, self.section_bytes
        self.writer.boundary()
        container_writer.SECTION_TARGET = before

    def finish(self) -> bytes:
        """Return the file."""
        self.writer.finish(self.entries, metadata={"made": "by a test"})
        return self.sink.getvalue()


def random_ranks(rng: np.random.Generator, layout: NMLayout, rows: int, columns: int) -> np.ndarray:
    shape = (layout.mask_rows(rows), layout.groups(columns))
    drawn = np.argsort(rng.random((*shape, layout.m)), axis=2)[:, :, : layout.n]
    return encoded(np.sort(drawn, axis=2).astype(np.uint8), layout)


@st.composite
def delta_files(draw: st.DrawFn) -> bytes:
    """Give files with every kind of tensor, hot and cold."""
    profile = draw(st.sampled_from(("hot", "cold")))
    encodings = ("seeded", "fixed") if profile == "hot" else ("seeded", "fixed", "rank")
    any_layout = st.one_of(st.sampled_from(encodings).flatmap(layouts), dense_layouts(), sparse_layouts())
    section_bytes = draw(st.sampled_from((1, 3000, 60_000, 4 << 20)))
    made = DeltaWriter(draw(generators()), profile, section_bytes)
    for number in range(draw(st.integers(0, 6))):
        name = f"{draw(st.sampled_from('abc'))}.{number}"
        kind = draw(st.sampled_from(("add", "add", "sum", "grown", "replace", "same", "alias")))
        targets = [entry.name for entry in made.entries if entry.action != "alias"]
        if kind == "alias" and targets:
            made.alias(name, draw(st.sampled_from(targets)))
        elif kind == "replace":
            shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
            whole = [dtype for dtype, bits in sorted(DTYPE_BITS.items()) if element_count(shape) * bits % 8 == 0]
            made.replace(name, draw(st.sampled_from(whole)), shape)
        elif kind == "same":
            made.same(name)
        else:
            count = 2 if kind == "sum" else 1
            shape = draw(shapes(140, 120))
            chosen = [fitting(draw(any_layout), *shape) for _ in range(count)]
            made.add(name, shape, chosen, new_rows=3 if kind == "grown" else 0)
    return made.finish()


def views_of(layout: TermLayout, index: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return an index as it must lie on a device: ``fixed``."""
    if not isinstance(layout, NMLayout) or layout.index != "rank":
        return index
    return nm.transcode_index(layout, index, layout.mask_rows(rows), columns, layout.with_index("fixed"))
