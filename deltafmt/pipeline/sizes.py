"""The size of the file that ``pack`` would write, known from shapes and layouts before a delta is compressed.

The writers of entries and containers run on zeros, so sections, alignment and index have the sizes that they will have.
For a ``cold`` file the size is an upper bound: its sections are counted as if zstd saved nothing. Attachments are
compressed as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence

from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry
from deltafmt.index.scaled import ScaledRef
from deltafmt.index.sections import DIGEST_BYTES
from deltafmt.methods.base import Method
from deltafmt.output import Bytes
from deltafmt.pipeline.entry_writer import EntryWriter, TermBytes, base_ref
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
    scaled: Mapping[str, ScaledRef] | None = None,
    parent: bytes | None = None,
) -> int:
    """Return the bytes of the file that plans give.

    Args:
        plans: what is done with every tensor, in order.
        unchanged: names of tensors that equal their base.
        removed: names of tensors that only the base has.
        files: the attachments.
        metadata: the file's metadata.
        profile: ``hot``, or ``cold`` for an upper bound.
        seed: the file's seed.
        scaled: what the file says of base tensors that are read as values.
        parent: the content id of the delta that gives the base, if one does.

    Raises:
        UsageError: the size of a term depends on the data.
    """
    container = ContainerWriter(_Nowhere())
    writer = EntryWriter(container)
    entries = []
    for plan in plans:
        entries.append(_entry(writer, plan, seed, same=plan.tensor.name in unchanged))
        container.boundary()
    attachments = {name: container.attach(data) for name, data in files.items()}
    container.finish(
        entries, removed=removed, attachments=attachments, metadata=dict(metadata), scaled=scaled, parent=parent
    )
    if profile == "hot":
        return container.position
    stored = [section for section in container.sections if section.codec == c.CODEC_STORED]
    chunks = sum(-(-section.length // c.ZSTD_CHUNK) for section in stored)
    return container.position + chunks * _CHUNK_OVERHEAD + len(stored) * c.SECTION_ALIGNMENT


def tensor_size(plan: Plan, seed: int) -> int:
    """Return about how many bytes a tensor adds to a file: its buffers, aligned, and its entry in the index."""
    container = ContainerWriter(_Nowhere())
    entry = _entry(EntryWriter(container), plan, seed, same=False)
    payload = sum(c.align(ref.length, c.BUFFER_ALIGNMENT) for _, ref in entry.refs())
    before = container.position
    container.finish([entry])
    return payload + container.position - c.align(before, c.SECTION_ALIGNMENT)


class TensorSizes:
    """The sizes of many tensors, each of :func:`tensor_size`; tensors that are alike are counted once.

    Args:
        seed: the file's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[Hashable, int] = {}

    def of(self, plan: Plan) -> int:
        """Return about how many bytes a tensor adds to a file."""
        tensor, base = plan.tensor, plan.base
        assert base is not None
        # An entry has the tensor's name, and where its base lies unless that has the same name.
        own = not base_ref(base, _DIGEST, tensor.name).parts
        name: Hashable = len(tensor.name.encode()) if own else tensor.name
        key = name, tensor.dtype, tensor.shape, tensor.leading, base.dtype, base.shape, plan.method
        if key not in self._known:
            self._known[key] = tensor_size(plan, self._seed)
        return self._known[key]


def _entry(writer: EntryWriter, plan: Plan, seed: int, *, same: bool) -> TensorEntry:
    """Write zeros in place of a tensor's buffers, and return its entry."""
    tensor, base = plan.tensor, plan.base
    if plan.alias is not None:
        return writer.alias(tensor, plan.alias)
    layouts = () if same else plan_layouts(plan)
    if base is None or not (same or layouts):
        return writer.replace(tensor, _zeros(tensor.nbytes), _DIGEST)
    reference = base_ref(base, _DIGEST, plan.tensor.name)
    if same:
        return writer.same(tensor, reference)
    terms = []
    for layout in layouts:
        lengths = layout.buffer_lengths(plan.shared_rows, tensor.columns)
        buffers = {name: _zeros(length) for name, length in lengths.items()}
        terms.append(TermBytes(layout, tensor_seed(seed, tensor.name) if layout.seeded else 0, 0, buffers))
    new_bytes = tensor.nbytes - shared_bytes(tensor, base)
    return writer.add(tensor, reference, terms, _zeros(new_bytes) if new_bytes else None, _DIGEST, tensor.leading)


def plan_layouts(plan: Plan) -> tuple[TermLayout, ...]:
    """Return the layouts of the terms that a tensor becomes.

    Raises:
        UsageError: the delta decides the size of one.
    """
    if plan.method is None or plan.base is None:
        return ()
    return promised_layouts(plan.method, plan.shared_rows, plan.tensor.columns)


@functools.lru_cache(4096)
def promised_layouts(method: Method, rows: int, columns: int) -> tuple[TermLayout, ...]:
    """Return the layouts that every delta of a shape becomes; most models have few shapes, and some many tensors.

    Raises:
        UsageError: the options do not fit the shape, or the delta decides the size of a layout.
    """
    layouts = method.layouts(rows, columns)
    if not method.fixed_rank or any(layout.has_slots for layout in layouts):
        raise UsageError(f"the bytes of {method.spelling()!r} depend on the delta, so no size can be promised")
    return layouts


def _zeros(length: int) -> Iterator[memoryview]:
    for start in range(0, length, len(_BLOCK)):
        yield _BLOCK[: length - start]
