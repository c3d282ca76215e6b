"""A delta file in the other profile, without loss.

A ``cold`` file, for archives, is compressed by zstd and has ``rank`` indexes. A ``hot`` file, for kernels, is stored as
it is and has ``fixed`` indexes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from deltafmt.checkpoint.folder import natural_key
from deltafmt.container.partial import PartialFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile, codec_of
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.sections import Attachment
from deltafmt.pipeline.entry_writer import EntryWriter, TermBytes
from deltafmt.terms.buffers import raw_bytes


@dataclass(frozen=True, slots=True)
class RepackResult:
    """What a repack did: the new file, its size, the old file's size, and the content id, which both files have."""

    path: Path
    size: int
    old_size: int
    content_id: str


def repack(
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    profile: str,
    force: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> RepackResult:
    """Write a delta file in another profile; tensors, digests and content id stay the same.

    Args:
        delta: the file.
        out: the file to make.
        profile: ``hot`` or ``cold``.
        force: replace ``out`` if it exists.
        limits: how much memory and output the file may ask for.

    Raises:
        UsageError: the output exists or is the input, or the profile is unknown.
        InvalidFileError: the input is not valid.
        StorageError: reading or writing failed.
    """
    if profile not in c.PROFILES:
        raise UsageError(f"profile {profile!r} is not one of {', '.join(c.PROFILES)}")
    path = Path(out)
    with DeltaFile(delta, limits=limits) as opened:
        check_converted(opened, profile)
        if path.exists() and os.path.samefile(path, delta):
            raise UsageError(f"the output {path} is itself the input")
        container = opened.container
        # An interrupted repack starts over: it runs at the speed of the disk.
        sink = PartialFile(path, None, force=force)
        try:
            target = ContainerWriter(sink, profile, features=container.features)
            writer = EntryWriter(target)
            entries = []
            # Sections of exact tensors lie behind all others.
            order = sorted(container.entries(), key=lambda entry: (entry.action == "exact", natural_key(entry.name)))
            for entry in order:
                entries.append(moved(opened, entry, writer, profile))
                target.boundary()
            attachments = {
                name: Attachment(target.add(container.buffer(old.data), c.SECTION_KIND_ATTACHMENTS), old.digest)
                for name, old in container.attachments.items()
            }
            files = {
                name: FileRef(old.digest, target.add(container.buffer(old.head), c.SECTION_KIND_ATTACHMENTS))
                for name, old in container.files.items()
            }
            identity = target.finish(
                entries,
                removed=container.removed,
                attachments=attachments,
                metadata=dict(container.metadata),
                scaled=container.scaled(),
                files=files,
                parent=container.parent,
            )
            if identity != container.content_id:
                raise InvalidFileError(f"{container.name}: the content id is not that of the content")
            sink.commit()
        except BaseException:
            sink.abandon()
            raise
        return RepackResult(path, path.stat().st_size, container.size, identity.hex())


def check_converted(delta: DeltaFile, profile: str) -> None:
    """Refuse a file whose indexes are much larger in another profile.

    Raises:
        InvalidFileError: names the limit.
    """
    container, total = delta.container, 0
    for entry in container.entries():
        for term in entry.terms:
            layout = term.layout.for_profile(profile)
            lengths = layout.buffer_lengths(entry.delta_rows, entry.columns, term.slots)
            total += sum(lengths.values())
            if layout != term.layout:
                needed = max(lengths.values()) + codec_of(entry, term).piece_bytes
                what = f'{container.name}: an index of "{entry.name}" takes'
                container.limits.check_memory(needed, container.size, what)
    container.limits.check_output(total, container.size, 0, f"{container.name}: the terms take")


def moved(delta: DeltaFile, entry: TensorEntry, writer: EntryWriter, profile: str) -> TensorEntry:
    """Write one tensor's buffers, with its indexes in the form that the profile uses, and return its entry."""
    if entry.target is not None:
        return writer.alias(entry, entry.target)
    if entry.exact is not None:
        old = entry.exact
        return writer.exact(entry, entry.base, old.chunk, delta.container.buffer(old.data), old.digest)
    data = None if entry.data is None else delta.container.buffer(entry.data)
    if entry.base is None:
        assert data is not None
        return writer.replace(entry, data, entry.digest)
    if not entry.terms:
        return writer.same(entry, entry.base)
    terms = []
    for term in entry.terms:
        layout = term.layout.for_profile(profile)
        arrays = codec_of(entry, term).converted(delta.term_views(entry, term), layout)
        buffers = {name: raw_bytes(array) for name, array in arrays.items()}
        terms.append(TermBytes(layout, term.seed, term.slots, buffers))
    return writer.add(entry, entry.base, terms, data, entry.digest, entry.leading)
