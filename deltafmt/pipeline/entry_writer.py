"""The one place that turns the bytes of a tensor into its entry of the index (spec/deltafmt-v1.md, section 7.4).

``pack``, ``import_lora`` and ``repack`` write the files that they make through an :class:`EntryWriter`; so does
``sizes``, which writes zeros and counts them. An entry is therefore the same whoever writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from blake3 import blake3

from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.container.writer import ContainerWriter
from deltafmt.format.constants import SECTION_KIND_EXACT, element_count
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry, Term
from deltafmt.index.exact import ExactRef
from deltafmt.index.sections import BufferRef
from deltafmt.output import Bytes
from deltafmt.terms.buffers import Packed, raw_bytes
from deltafmt.terms.codecs import AnyCodec
from deltafmt.terms.layout import TermLayout

# Bytes, whole or in pieces.
Pieces = Bytes | Iterable[Bytes]

# Whatever has a name, a dtype and a shape.
Header = Tensor | TensorSpec | TensorEntry


@dataclass(frozen=True, slots=True)
class TermBytes:
    """One term, ready to be written.

    Attributes:
        layout: the term's layout.
        seed: the tensor seed if the layout is seeded; otherwise 0.
        slots: the number of slots if the layout has slots; otherwise 0.
        buffers: what the file stores, by the buffer's name, in the order of the layout's ``buffers``.
        digested: what the tensor's digest is taken over, for those buffers whose stored form is another. For example,
            a ``rank`` index is digested in its ``fixed`` form.
    """

    layout: TermLayout
    seed: int
    slots: int
    buffers: Mapping[str, Pieces]
    digested: Mapping[str, Pieces] = field(default_factory=dict)


def packed_bytes(codec: AnyCodec, packed: Packed) -> TermBytes:
    """Return the bytes of a term that a codec has packed."""
    digested = {}
    for name, array in packed.items():
        form = codec.digested_form(name, array)
        if form is not array:
            digested[name] = raw_bytes(form)
    stored = {name: raw_bytes(array) for name, array in packed.items()}
    return TermBytes(codec.layout, codec.seed, codec.slots, stored, digested)


def base_ref(base: Tensor, digest: bytes, name: str) -> BaseRef:
    """Return the identity of a base tensor, and where it lies in the base unless that is under the entry's own name.

    Args:
        base: the base tensor.
        digest: its fingerprint.
        name: the entry's name.
    """
    parts = base.parts()
    own = parts == (BasePart(name, 0, element_count(base.shape)),)
    return BaseRef(digest, base.dtype, base.shape, () if own else parts)


class EntryWriter:
    """Write the buffers of tensors into a container, and return the tensors' entries.

    Args:
        container: takes the buffers. Whoever uses this writer also calls the container's ``boundary`` and ``finish``.
    """

    def __init__(self, container: ContainerWriter) -> None:
        self._container = container

    def alias(self, tensor: Header, target: str) -> TensorEntry:
        """Return the entry of a tied copy; nothing is written."""
        return TensorEntry(tensor.name, "alias", tensor.dtype, tensor.shape, target=target)

    def same(self, tensor: Header, base: BaseRef) -> TensorEntry:
        """Return the entry of a tensor that equals its base; nothing is written."""
        return TensorEntry(tensor.name, "same", tensor.dtype, tensor.shape, base)

    def replace(self, tensor: Header, data: Pieces, digest: bytes | None = None) -> TensorEntry:
        """Write a tensor that is stored whole.

        Args:
            tensor: its header.
            data: its bytes.
            digest: of the bytes, if it is known; otherwise it is computed while they are written.
        """
        payload = blake3() if digest is None else None
        ref = self._write(data, payload)
        found = digest if payload is None else payload.digest()
        return TensorEntry(tensor.name, "replace", tensor.dtype, tensor.shape, digest=found, data=ref)

    def exact(self, tensor: Header, base: BaseRef | None, chunk: int, data: Pieces, digest: bytes) -> TensorEntry:
        """Write a tensor that is restored bit for bit.

        Args:
            tensor: its header.
            base: the identity of its base, if it has one.
            chunk: units of a chunk.
            data: the chunks and their table.
            digest: the fingerprint of the tensor.
        """
        ref = ExactRef(chunk, self._container.add(data, SECTION_KIND_EXACT), digest)
        return TensorEntry(tensor.name, "exact", tensor.dtype, tensor.shape, base, exact=ref)

    def with_exact(self, entry: TensorEntry, exact: ExactRef, data: Pieces) -> TensorEntry:
        """Write the exact part of a tensor that has terms.

        Args:
            entry: the tensor's entry in the served part.
            exact: what the index says of the exact part; its buffer is taken anew.
            data: the chunks and their table.
        """
        return replace(entry, exact=replace(exact, data=self._container.add(data, SECTION_KIND_EXACT)))

    def add(
        self,
        tensor: Header,
        base: BaseRef,
        terms: Sequence[TermBytes],
        new_rows: Pieces | None = None,
        digest: bytes | None = None,
        leading: int | None = None,
    ) -> TensorEntry:
        """Write a tensor that is its base plus a sum of terms.

        Args:
            tensor: its header.
            base: the identity of its base.
            terms: in the order in which they are summed.
            new_rows: the bytes of the rows that the base lacks, if there are any.
            digest: of the payload (section 7.6), if it is known; otherwise it is computed while the payload is written.
            leading: the number of leading dimensions that give the rows; all but the last if None.
        """
        payload = blake3() if digest is None else None
        written = []
        for term in terms:
            refs = {name: self._write(data, payload, term.digested.get(name)) for name, data in term.buffers.items()}
            number = self._container.layout_number(term.layout)
            written.append(Term(number, term.layout, term.seed, refs, term.slots))
        rows = None if new_rows is None else self._write(new_rows, payload)
        found = digest if payload is None else payload.digest()
        return TensorEntry(
            tensor.name, "add", tensor.dtype, tensor.shape, base, found, rows, tuple(written), leading=leading
        )

    def _write(self, data: Pieces, payload: blake3 | None, digested: Pieces | None = None) -> BufferRef:
        """Write a buffer, and add it, or the form that is digested in its place, to the payload's digest."""
        if payload is None:
            return self._container.add(data)
        if digested is None:
            return self._container.add(_hashed(data, payload))
        for _ in _hashed(digested, payload):
            pass
        return self._container.add(data)


def _hashed(data: Pieces, payload: blake3) -> Iterator[Bytes]:
    """Give the pieces of a buffer, and add each to a digest."""
    for piece in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
        payload.update(piece)
        yield piece
