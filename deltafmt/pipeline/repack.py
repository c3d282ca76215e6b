"""A delta file in the other profile, or without its exact parts.

A ``cold`` file, for archives, is compressed by zstd and has ``rank`` indexes. A ``hot`` file, for kernels, is stored as
it is and has ``fixed`` indexes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltafmt.checkpoint.folder import natural_key
from deltafmt.container.partial import PartialFile
from deltafmt.container.reader import Container
from deltafmt.container.writer import About, ContainerWriter
from deltafmt.delta import DeltaFile, codec_of
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c
from deltafmt.format.choices import check_choice
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.sections import Attachment
from deltafmt.output import check_path
from deltafmt.pipeline.digests import check_content_id
from deltafmt.pipeline.entry_writer import EntryWriter, TermBytes
from deltafmt.pipeline.verify import check_served_part
from deltafmt.terms.buffers import raw_bytes

# What can be dropped from a file.
EXACT: Final = "exact"


@dataclass(frozen=True, slots=True)
class RepackResult:
    """What a repack did: the new file, its size, the old file's size, and the new file's content id."""

    path: Path
    size: int
    old_size: int
    content_id: str


def repack(
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    profile: str | None = None,
    drop: str | None = None,
    force: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> RepackResult:
    """Write a delta file in another profile, or without its exact parts; what is left says the same.

    Args:
        delta: the file.
        out: the file to make.
        profile: ``hot`` or ``cold``; that of the file if not given.
        drop: ``exact`` leaves the served part of a progressive file. Its content id is the one that the served part
            has in the progressive file; without ``drop``, the content id stays that of the whole file.
        force: replace ``out`` if it exists.
        limits: how much memory and output the file may ask for.

    Raises:
        UsageError: the output exists or is the input, the profile is unknown, or there are no exact parts to drop.
        InvalidFileError: the input is not valid.
        StorageError: reading or writing failed.
    """
    if profile is None and drop is None:
        raise UsageError("nothing to do: give a profile, hot or cold, or drop exact")
    if profile is not None:
        check_choice("profile", profile, c.PROFILES)
    if drop is not None and drop != EXACT:
        raise UsageError(f"drop {drop!r} is not {EXACT}")
    path = Path(out)
    with DeltaFile(delta, limits=limits) as opened:
        container = opened.container
        profile = profile or container.profile
        check_converted(opened, profile)
        check_path(path)
        if path.exists() and os.path.samefile(path, delta):
            raise UsageError(f"the output {path} is itself the input")
        entries = sorted(container.entries(), key=lambda entry: natural_key(entry.name))
        if drop is not None:
            _check_droppable(container, entries)
        # An interrupted repack starts over: it runs at the speed of the disk.
        sink = PartialFile(path, None, force=force)
        try:
            identity = _Mover(opened, entries, sink, profile, drop=drop is not None).run()
            sink.commit()
        except BaseException:
            sink.abandon()
            raise
        return RepackResult(path, path.stat().st_size, container.size, identity.hex())


def _check_droppable(container: Container, entries: list[TensorEntry]) -> None:
    """Check that a file is a progressive one, and says what it claims to say.

    Raises:
        UsageError: it is none.
        InvalidFileError: its content id, or its served part, is not what its index gives.
    """
    if container.served is None:
        archive = any(entry.exact is not None for entry in entries)
        why = "; it is an archive, and without its exact tensors nothing would be left" if archive else ""
        raise UsageError(f"{container.name} has no exact parts to drop{why}")
    check_content_id(container, entries)
    check_served_part(container, entries)


class _Mover:
    """One run of repack.

    Args:
        delta: the input.
        entries: its entries, in the order of the output.
        sink: takes the output.
        profile: the output's.
        drop: True to leave exact parts out.
    """

    def __init__(
        self, delta: DeltaFile, entries: list[TensorEntry], sink: PartialFile, profile: str, *, drop: bool
    ) -> None:
        self._delta = delta
        self._source = delta.container
        self._entries = entries
        self._drop = drop
        dropped = c.FEATURE_EXACT | c.FEATURE_PROGRESSIVE if drop else 0
        self._target = ContainerWriter(sink, profile, features=self._source.features & ~dropped)
        self._writer = EntryWriter(self._target)

    def run(self) -> bytes:
        """Write everything, and return the content id.

        Raises:
            InvalidFileError: it is not the input's, although nothing was left out.
        """
        source, target = self._source, self._target
        # Sections of exact tensors lie behind all others.
        written = {}
        for entry in sorted(self._entries, key=lambda entry: entry.action == "exact"):
            written[entry.name] = moved(self._delta, entry, self._writer, target.profile)
            target.boundary()
        about = About(
            removed=source.removed, metadata=source.metadata, scaled=source.scaled_key(), parent=source.parent
        )
        about["attachments"] = copied_attachments(source, target)
        if self._drop:
            dropped = target.finish(written.values(), **about)
            source.check_unchanged()
            return dropped
        if source.served is not None:
            target.serve(written.values(), **about)
            for entry in self._entries:
                if entry.terms and entry.exact is not None:
                    data = source.buffer(entry.exact.data)
                    written[entry.name] = self._writer.with_exact(written[entry.name], entry.exact, data)
                    target.boundary()
        about["files"] = copied_files(source, target)
        identity = target.finish(written.values(), **about)
        source.check_unchanged()
        if identity != source.content_id:
            raise InvalidFileError(f"{source.name}: the content id is not that of the content")
        return identity


def copied_attachments(source: Container, target: ContainerWriter) -> dict[str, Attachment]:
    """Write the attached files of a delta file into another one."""
    return {
        name: Attachment(target.add(source.buffer(old.data), c.SECTION_KIND_ATTACHMENTS), old.digest)
        for name, old in source.attachments.items()
    }


def copied_files(source: Container, target: ContainerWriter) -> dict[str, FileRef]:
    """Write the heads of the restored files of a delta file into another one."""
    return {
        name: FileRef(old.digest, target.add(source.buffer(old.head), c.SECTION_KIND_ATTACHMENTS))
        for name, old in source.files.items()
    }


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
    if entry.exact is not None and not entry.terms:
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
