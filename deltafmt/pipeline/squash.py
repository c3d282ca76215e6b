"""``deltafmt.squash``: one delta file that gives what a chain of them gives (spec/deltafmt-v1.md, section 18).

A tensor that one link alone changes keeps the bytes that this link has for it. A tensor that several links change is
restored, and made exact anew against the base of the chain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from deltafmt import core
from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.container.partial import PartialFile, check_output_file
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.exact.coding import CHUNK_UNITS, assemble
from deltafmt.format import constants as c
from deltafmt.format.choices import check_list
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import BaseRef, TensorEntry, predicts
from deltafmt.index.scaled import ScaledRef
from deltafmt.output import check_path
from deltafmt.pipeline.chain import Chain, LinkState, open_chain, open_links
from deltafmt.pipeline.convert_options import metadata_of_chain
from deltafmt.pipeline.entry_writer import EntryWriter
from deltafmt.pipeline.exact_tensors import chunk_spans, pack_chunk
from deltafmt.pipeline.repack import check_converted, copied_attachments, copied_files, moved
from deltafmt.pipeline.trails import Trail, base_is_needed, is_copied, trail_of
from deltafmt.pipeline.workers import Progress, thread_count, worker_pool


@dataclass(slots=True)
class SquashResult:
    """What a squash did.

    Attributes:
        path: the file.
        size: its bytes.
        content_id: its content id, hexadecimal.
        old_size: the bytes of all links.
        parent: the content id of the first link's parent, hexadecimal, which is the file's; empty if it has none.
        copied: number of tensors that one link says all of.
        restored: names of the tensors that were restored and made exact anew.
    """

    path: Path
    size: int = 0
    content_id: str = ""
    old_size: int = 0
    parent: str = ""
    copied: int = 0
    restored: list[str] = field(default_factory=list)


def squash(
    deltas: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> SquashResult:
    """Make one delta file of a chain. It gives the same tensors, bit for bit, the same attachments and the same files.

    Args:
        deltas: the delta files in their order; each is the parent of the next.
        out: the file to make.
        base: what the first delta was made on. It is needed if several links change one tensor exactly.
        force: True to replace ``out`` if it exists.
        threads: worker threads; one for each processor if not given.
        limits: how much memory, work and output a delta file may ask for.
        progress: called with a tensor's name and bytes as each is done.

    Raises:
        UsageError: the output exists or is a link, the base is needed and not given, or no delta gives what the chain
            gives: lossy terms of two links round one after the other.
        InvalidFileError: a delta, or the base, is not valid.
        WrongBaseError: a link of the chain is missing or stands in another place, or the base is another one.
        StorageError: reading or writing failed.
    """
    core.warn_if_missing()
    path, workers = Path(out), thread_count(threads)
    check_list("deltas", deltas)
    check_path(path)
    if path.is_file() and any(os.path.exists(delta) and os.path.samefile(path, delta) for delta in deltas):
        raise UsageError(f"the output {path} is itself an input")
    check_output_file(path, force=force)
    if len(deltas) == 1:
        raise UsageError(f"{deltas[0]} alone is no chain; name all of its links")
    with contextlib.ExitStack() as stack:
        links = stack.enter_context(open_links(deltas, limits))
        trails = {name: trail_of(links, name) for name in links[-1] if links[-1][name].target is None}
        restored = [name for name, trail in trails.items() if not is_copied(links, name, trail)]
        if restored and base is None:
            raise base_is_needed(links, restored[0], trails[restored[0]])
        chain = None if base is None else stack.enter_context(open_chain(base, links))
        for link in links:
            check_converted(link, links[-1].container.profile)
        result = SquashResult(path, old_size=sum(link.container.size for link in links), restored=restored)
        return _Squash(links, trails, chain, result, workers, progress).run(force)


class _Squash:
    """One run of squash."""

    def __init__(
        self,
        links: Sequence[DeltaFile],
        trails: Mapping[str, Trail],
        chain: Chain | None,
        result: SquashResult,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._links = links
        self._trails = trails
        self._chain = chain
        self._state: LinkState | None = None if chain is None else chain.result()
        self._result = result
        self._restored = frozenset(result.restored)
        self._used = {source for name, trail in trails.items() for source in _sources(name, trail.base)}
        self._threads = threads
        self._progress = progress

    def run(self, force: bool) -> SquashResult:
        """Write the file."""
        first, last, result = self._links[0].container, self._links[-1].container, self._result
        scaled = self._scaled()
        sink = PartialFile(result.path, None, force=force)
        with worker_pool(self._threads, "squash") as pool:
            try:
                target = ContainerWriter(sink, last.profile, features=self._features(scaled))
                writer = EntryWriter(target)
                # Sections of exact tensors lie behind all others.
                order = sorted(last.entries(), key=lambda entry: (self._is_exact(entry), natural_key(entry.name)))
                entries = []
                for entry in order:
                    entries.append(self._written(entry, writer, pool))
                    target.boundary()
                    if self._progress:
                        self._progress(entry.name, entry.nbytes)
                attachments, files = copied_attachments(last, target), copied_files(last, target)
                identity = target.finish(
                    entries,
                    removed=self._removed(entries),
                    attachments=attachments,
                    metadata=self._metadata(),
                    scaled=scaled or None,
                    files=files,
                    parent=first.parent,
                )
                for link in self._links:
                    link.container.check_unchanged()
                if self._chain is not None:
                    self._chain.model.check_unchanged()
                sink.commit()
            except BaseException:
                sink.abandon()
                raise
        result.size, result.content_id = result.path.stat().st_size, identity.hex()
        result.parent = "" if first.parent is None else first.parent.hex()
        return result

    def _is_exact(self, entry: TensorEntry) -> bool:
        """Tell whether a tensor of the last link is exact in the file."""
        if entry.target is not None:
            return False
        changes = self._trails[entry.name].changes
        return entry.name in self._restored or (len(changes) == 1 and changes[0].entry.exact is not None)

    def _written(self, entry: TensorEntry, writer: EntryWriter, pool: ThreadPoolExecutor) -> TensorEntry:
        """Write one tensor, and return its entry."""
        if entry.target is not None:
            return writer.alias(entry, entry.target)
        trail, name = self._trails[entry.name], entry.name
        if name in self._restored:
            return self._restored_entry(entry, trail, writer, pool)
        self._result.copied += 1
        changes = trail.changes
        if not changes:
            assert trail.base is not None
            return writer.same(entry, trail.base)
        step = changes[0]
        base = trail.base if step.entry.base is not None else None
        profile = self._links[-1].container.profile
        return moved(self._links[step.link], replace(step.entry, name=name, base=base), writer, profile)

    def _restored_entry(
        self, entry: TensorEntry, trail: Trail, writer: EntryWriter, pool: ThreadPoolExecutor
    ) -> TensorEntry:
        """Restore a tensor, and write it exactly against the base of the chain."""
        assert self._state is not None
        assert self._chain is not None
        tensor = self._state.tensors[entry.name]
        digest = tensor.fingerprint()
        changed = trail.changes[-1].entry
        if changed.exact is not None and digest != changed.exact.digest:
            name = self._links[trail.changes[-1].link].container.name
            raise InvalidFileError(f'{name}: tensors["{changed.name}"]: what is restored is not what was packed')
        ref: BaseRef | None = trail.base
        base = None if ref is None else self._chain.bases[0].find(trail.steps[0].entry)
        if ref is not None and (ref.digest, ref.dtype, ref.shape) == (digest, entry.dtype, entry.shape):
            tensor.forget()
            return writer.same(entry, ref)
        if ref is not None and not predicts(ref.dtype, ref.shape, entry.dtype, entry.shape):
            ref = base = None
        spans = chunk_spans(entry.dtype, entry.shape)
        coded = partial(pack_chunk, tensor, base, level="default")
        chunks = list(pool.map(lambda span: coded(*span), spans))
        tensor.forget()
        return writer.exact(entry, ref, CHUNK_UNITS, assemble(chunks), digest)

    def _features(self, scaled: Mapping[str, ScaledRef]) -> int:
        """Return the incompatible features of the file's header."""
        copied = [trail.changes for name, trail in self._trails.items() if name not in self._restored]
        kept = [changes[0].entry for changes in copied if changes]
        parts = any(trail.base is not None and trail.base.parts for trail in self._trails.values())
        leads = any(entry.leading is not None for entry in kept)
        exact = any(entry.exact is not None for entry in kept)
        first, last = self._links[0].container, self._links[-1].container
        return (
            (c.FEATURE_PARTS if parts else 0)
            | (c.FEATURE_LEADING if leads else 0)
            | (c.FEATURE_SCALED if scaled else 0)
            | (c.FEATURE_EXACT if exact or self._restored or last.files else 0)
            | (c.FEATURE_PARENT if first.parent is not None else 0)
        )

    def _scaled(self) -> dict[str, ScaledRef]:
        """Return how the base of the chain keeps the tensors that are read as values."""
        told = self._links[0].container.scaled()
        return {name: ref for name, ref in told.items() if name in self._used}

    def _removed(self, entries: Sequence[TensorEntry]) -> list[str]:
        """Return the names of the tensors that the base of the chain has and the last link does not give."""
        first = self._links[0].container
        has = set(first.removed)
        for entry in first.entries():
            has.update(_sources(entry.name, entry.base))
        return sorted(has - self._used - {entry.name for entry in entries})

    def _metadata(self) -> dict[str, str]:
        """Return the last link's metadata, with what the first one says of its base."""
        first, last = self._links[0].metadata, metadata_of_chain(self._links[0], self._links[-1])
        of_base = (c.METADATA_BASE, METADATA_VARIANT)
        found = {key: value for key, value in last.items() if key not in of_base}
        return found | {key: first[key] for key in of_base if key in first}


def _sources(name: str, base: BaseRef | None) -> list[str]:
    """Return the names of the base's tensors that a tensor is made from."""
    return [] if base is None else [part.name for part in base.parts] or [name]
