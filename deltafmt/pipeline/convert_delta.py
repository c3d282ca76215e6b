"""A patch of another program as a delta file of exact tensors, which restores the new checkpoint byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from blake3 import blake3

from deltafmt.checkpoint.base_name import base_name
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.restored import read_heads
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.container.partial import PartialFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.exact.coding import CHUNK_UNITS, EncodedChunk, assemble, encode_chunk
from deltafmt.exact.units import unit_of
from deltafmt.format.constants import FEATURE_EXACT, FEATURE_PARENT, SECTION_KIND_ATTACHMENTS
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.exact import FileRef, is_index
from deltafmt.methods.exact import Exact
from deltafmt.output import Bytes
from deltafmt.pipeline.changes import Bytes as NewBytes
from deltafmt.pipeline.changes import Changes
from deltafmt.pipeline.entry_writer import EntryWriter
from deltafmt.pipeline.exact_tensors import chunk_spans, predicted
from deltafmt.pipeline.plan import file_metadata
from deltafmt.pipeline.workers import Progress, in_order, worker_pool


@dataclass(slots=True)
class WrittenDelta:
    """A delta file that was written.

    Attributes:
        tensors: the tensors that it changes.
        content_id: in hexadecimal.
        restored: the weight files that it restores.
        attached: the files that travel with it.
    """

    tensors: int = 0
    content_id: str = ""
    restored: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)


def write_delta(
    changes: Changes,
    path: Path,
    about: Mapping[str, str],
    parent: bytes | None,
    *,
    force: bool,
    threads: int,
    progress: Progress | None = None,
) -> WrittenDelta:
    """Write a delta file that gives what a patch gives on its base: the base's files with other tensors in them.

    Args:
        changes: the patch.
        path: the file to make.
        about: metadata that it has beside the usual ones.
        parent: the content id of the delta that gives the base; None without one.
        force: True to replace ``path`` if it exists.
        threads: worker threads.
        progress: called with a tensor's name and bytes as each is done.
    """
    base = changes.base
    heads, files = read_heads(base), dict(base.files.items())
    sink = PartialFile(path, None, force=force)
    result = WrittenDelta(restored=list(heads), attached=list(files))
    try:
        container = ContainerWriter(sink, features=FEATURE_EXACT | (0 if parent is None else FEATURE_PARENT))
        writer = EntryWriter(container)
        digests = {name: blake3(head.head) for name, head in heads.items() if not is_index(name)}
        entries: list[TensorEntry] = []
        with worker_pool(threads, "convert") as pool:
            for name, shard in base.weight_files():
                # A component's tensors have its folder in front of their names; a shard does not know it.
                component = name.rpartition("/")[0]
                tensors = [base.tensors[f"{component}/{each}" if component else each] for each in shard.tensors]
                tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
                submit = partial(_begin, changes, pool)
                for tensor, new in in_order(tensors, submit, lambda tensor: tensor.nbytes):
                    entries.append(_written(tensor, new, digests[name], writer, pool))
                    result.tensors += entries[-1].exact is not None
                    container.boundary()
                    if progress:
                        progress(tensor.name, tensor.nbytes)
        metadata = file_metadata(Exact().describe(), 0, base, base_name(base))
        attachments = {name: container.attach(base.attachment(name)) for name in files}
        found = {}
        for name, head in heads.items():
            digest = head.digest() if is_index(name) else digests[name].digest()
            found[name] = FileRef(digest, container.add(head.head, SECTION_KIND_ATTACHMENTS))
        identity = container.finish(
            entries,
            attachments=attachments,
            metadata={**metadata, **base.names.metadata(), **about},
            files=found,
            parent=parent,
        )
        changes.check_unchanged()
        sink.commit()
    except BaseException:
        sink.abandon()
        raise
    result.content_id = identity.hex()
    return result


def _begin(changes: Changes, pool: ThreadPoolExecutor, tensor: Tensor) -> Future[NewBytes | None] | None:
    """Begin to compute the new bytes of a tensor, if a patch names it."""
    tensor.will_need()
    return pool.submit(changes.new_bytes, tensor.name) if tensor.name in changes.names else None


def _written(
    tensor: Tensor,
    computed: Future[NewBytes | None] | None,
    file: blake3,
    writer: EntryWriter,
    pool: ThreadPoolExecutor,
) -> TensorEntry:
    """Write a tensor, add its new bytes to the digest of its file, and return its entry."""
    new = None if computed is None else computed.result()
    before = hasher(tensor.dtype, tensor.shape)
    if new is None:
        for piece in tensor.pieces():
            before.update(piece)
            file.update(piece)
        return writer.same(tensor, BaseRef(before.digest(), tensor.dtype, tensor.shape))
    unit = unit_of(tensor.dtype)
    units = new.view(unit.dtype)

    def encoded(span: tuple[int, int]) -> EncodedChunk:
        with predicted(tensor, tensor.dtype, *span) as prediction:
            return encode_chunk(units[slice(*span)], prediction, unit)

    chunks = [pool.submit(encoded, span) for span in chunk_spans(tensor.dtype, tensor.shape)]
    after = hasher(tensor.dtype, tensor.shape)
    data: Bytes = np.ascontiguousarray(new).data
    after.update(data)
    file.update(data)
    base = BaseRef(tensor.fingerprint(), tensor.dtype, tensor.shape)
    if after.digest() == base.digest:
        for chunk in chunks:
            chunk.cancel()
        return writer.same(tensor, base)
    pieces = assemble([chunk.result() for chunk in chunks])
    return writer.exact(tensor, base, CHUNK_UNITS, pieces, after.digest())
