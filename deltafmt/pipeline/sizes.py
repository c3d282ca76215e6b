"""The size of the file that ``pack`` would write, known from shapes and layouts before a delta is compressed.

The container's writer is run on zeros: sections, alignment and index come out as they will. Sections of a ``cold`` file
are counted as if zstd saved nothing, which makes the size an upper bound there; attachments are compressed as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.index.sections import DIGEST_BYTES
from deltafmt.output import Bytes
from deltafmt.pipeline.plan import Plan, shared_bytes, tensor_seed
from deltafmt.terms.layout import TermLayout

_BLOCK = memoryview(bytes(1 << 20))
_DIGEST = bytes([255]) * DIGEST_BYTES
# What zstd adds to bytes that it cannot compress (ZSTD_compressBound), with the row of the chunk table.
_CHUNK_OVERHEAD = (c.ZSTD_CHUNK >> 8) + 64 + 4


class _Nowhere:
    def write(self, data: Bytes, /) -> None:
        """Take bytes and forget them."""


def file_size(
    plans: Sequence[Plan],
    unchanged: frozenset[str],
    removed: Sequence[str],
    files: Mapping[str, bytes],
    metadata: Mapping[str, str],
    *,
    profile: str,
    seed: int,
) -> int:
    """Return the bytes of the file that plans give.

    Args:
        plans: what is done with every tensor, in order.
        unchanged: names of tensors that equal their base.
        removed: names of tensors that only the base has.
        files: the attachments.
        metadata: of the file.
        profile: ``hot``, or ``cold`` for an upper bound.
        seed: of the file.

    Raises:
        UsageError: the size of a term depends on the data.
    """
    writer = ContainerWriter(_Nowhere())
    entries = []
    for plan in plans:
        entries.append(_entry(writer, plan, seed, same=plan.tensor.name in unchanged))
        writer.boundary()
    attachments = {name: writer.attach(data) for name, data in files.items()}
    writer.finish(entries, removed=removed, attachments=attachments, metadata=dict(metadata))
    if profile == "hot":
        return writer.position
    stored = [section for section in writer.sections if section.codec == c.CODEC_STORED]
    chunks = sum(-(-section.length // c.ZSTD_CHUNK) for section in stored)
    return writer.position + chunks * _CHUNK_OVERHEAD + len(stored) * c.SECTION_ALIGNMENT


def tensor_size(plan: Plan, seed: int) -> int:
    """Return about what a tensor takes in a file that has others: its buffers, aligned, and its entry in the index."""
    writer = ContainerWriter(_Nowhere())
    entry = _entry(writer, plan, seed, same=False)
    payload = sum(c.align(ref.length, c.BUFFER_ALIGNMENT) for _, ref in entry.refs())
    before = writer.position
    writer.finish([entry])
    return payload + writer.position - c.align(before, c.SECTION_ALIGNMENT)


def _entry(writer: ContainerWriter, plan: Plan, seed: int, *, same: bool) -> TensorEntry:
    tensor, base = plan.tensor, plan.base
    if plan.alias is not None:
        return TensorEntry(tensor.name, "alias", tensor.dtype, tensor.shape, target=plan.alias)
    reference = None if base is None else BaseRef(_DIGEST, base.dtype, base.shape)
    if same:
        return TensorEntry(tensor.name, "same", tensor.dtype, tensor.shape, reference)
    layouts = plan_layouts(plan)
    if not layouts or base is None:
        data = writer.add(_zeros(tensor.nbytes))
        return TensorEntry(tensor.name, "replace", tensor.dtype, tensor.shape, digest=_DIGEST, data=data)
    terms = []
    for layout in layouts:
        lengths = layout.buffer_lengths(plan.shared_rows, tensor.columns)
        refs = {name: writer.add(_zeros(length)) for name, length in lengths.items()}
        drawn = tensor_seed(seed, tensor.name) if layout.seeded else 0
        terms.append(Term(writer.layout_number(layout), layout, drawn, refs))
    new_bytes = tensor.nbytes - shared_bytes(tensor, base)
    new_rows = writer.add(_zeros(new_bytes)) if new_bytes else None
    return TensorEntry(tensor.name, "add", tensor.dtype, tensor.shape, reference, _DIGEST, new_rows, tuple(terms))


def plan_layouts(plan: Plan) -> tuple[TermLayout, ...]:
    """Return the layouts of the terms that a tensor becomes.

    Raises:
        UsageError: the delta decides the size of one.
    """
    layouts = plan.layouts()
    method = plan.method
    if method is not None and (not method.fixed_rank or any(layout.has_slots for layout in layouts)):
        raise UsageError(f"the bytes of {method.describe()!r} depend on the delta, so no size can be promised")
    return layouts


def _zeros(length: int) -> Iterator[memoryview]:
    for start in range(0, length, len(_BLOCK)):
        yield _BLOCK[: length - start]
