"""One profile to the other without loss: zstd and rank indexes for archives, stored and fixed for kernels."""

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
from deltafmt.index.entries import TensorEntry, Term
from deltafmt.index.sections import Attachment
from deltafmt.terms.buffers import raw_bytes


@dataclass(frozen=True, slots=True)
class RepackResult:
    """What a repack did: the file, its size, the size before, and the content id, which stays."""

    path: Path
    size: int
    old_size: int
    content_id: str


def repack(
    delta: str | os.PathLike[str], out: str | os.PathLike[str], *, profile: str, force: bool = False
) -> RepackResult:
    """Write a delta file in another profile; tensors, digests and content id stay the same.

    Args:
        delta: the file.
        out: the file to make.
        profile: ``hot`` or ``cold``.
        force: replace ``out`` if it exists.

    Raises:
        UsageError: the output exists or is the input, or the profile is unknown.
        InvalidFileError: the input is not valid.
        StorageError: reading or writing failed.
    """
    if profile not in c.PROFILES:
        raise UsageError(f"profile {profile!r} is not one of {', '.join(c.PROFILES)}")
    path = Path(out)
    with DeltaFile(delta) as opened:
        if path.exists() and os.path.samefile(path, delta):
            raise UsageError(f"the output {path} is itself the input")
        container = opened.container
        # An interrupted repack starts over: it runs at the speed of the disk.
        sink = PartialFile(path, None, force=force)
        try:
            writer = ContainerWriter(sink, profile)
            entries = sorted(container.entries(), key=lambda entry: natural_key(entry.name))
            moved = [_move(opened, writer, entry) for entry in entries]
            attachments = {
                name: Attachment(writer.add(container.buffer(old.data), c.SECTION_KIND_ATTACHMENTS), old.digest)
                for name, old in container.attachments.items()
            }
            identity = writer.finish(
                moved,
                removed=container.removed,
                attachments=attachments,
                metadata=dict(container.metadata),
            )
            if identity != container.content_id:
                raise InvalidFileError(f"{container.name}: the content id is not that of the content")
            sink.commit()
        except BaseException:
            sink.abandon()
            raise
        return RepackResult(path, path.stat().st_size, container.size, identity.hex())


def _move(delta: DeltaFile, writer: ContainerWriter, entry: TensorEntry) -> TensorEntry:
    """Copy one tensor's buffers, with its indexes in the form that the profile uses."""
    terms = []
    for term in entry.terms:
        target = term.layout.for_profile(writer.profile)
        arrays = codec_of(entry, term).converted(delta.term_views(entry, term), target)
        refs = {name: writer.add(raw_bytes(array)) for name, array in arrays.items()}
        terms.append(Term(writer.layout_number(target), target, term.seed, refs, term.slots))
    data = None if entry.data is None else writer.add(delta.container.buffer(entry.data))
    writer.boundary()
    return TensorEntry(
        entry.name,
        entry.action,
        entry.dtype,
        entry.shape,
        entry.base,
        entry.digest,
        data,
        tuple(terms),
        entry.target,
    )
