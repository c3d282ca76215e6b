"""``deltafmt.verify``: every check that a delta file, and a base for it, can be put to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.weight_names import WeightNames
from deltafmt.container.reader import Container
from deltafmt.container.served import ServedPart, check_served
from deltafmt.delta import DeltaFile, codec_of
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.format import constants as c
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.sections import BufferRef
from deltafmt.pipeline.bases import BaseTensors, compare_bases, open_base
from deltafmt.pipeline.chain import check_links, open_chain, open_links
from deltafmt.pipeline.digests import check_content_id, check_payload_digest, digest_of
from deltafmt.pipeline.exact_tensors import ExactTensor
from deltafmt.pipeline.read_as_values import Dequantized, dequantized
from deltafmt.pipeline.restored_files import check_restored, read_files
from deltafmt.pipeline.workers import thread_count


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was checked and found right.

    Attributes:
        sections: number of sections whose checksums were compared.
        tensors: number of entries whose buffers were decoded and whose digests were compared.
        base_tensors: number of base tensors whose fingerprints were compared; None without a base.
        content_id: the content id, computed anew, hexadecimal.
        removed: names of tensors that only the base has; an unpacked folder lacks them.
        attached: names of the attached files.
        names: what differs between the names that the file records for its base and those of this base.
        dequantized: how many tensors of either side were 8-bit floats that were read as the values that they mean.
        restored: names of the weight files and indexes that this base and the delta give byte for byte; none without
            a base.
        served: the served part of a progressive file; None for other files.
    """

    sections: int
    tensors: int
    base_tensors: int | None
    content_id: str
    removed: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    names: list[NameChange] = field(default_factory=list)
    dequantized: Dequantized = field(default_factory=Dequantized)
    restored: tuple[str, ...] = ()
    served: ServedPart | None = None


def verify(
    delta: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    before: Sequence[str | os.PathLike[str]] = (),
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[str, int], None] | None = None,
) -> VerifyResult:
    """Check a delta file completely: structure, checksums, canonical packing, digests, content id.

    Args:
        delta: the delta file.
        base: the checkpoint whose tensors are compared with the fingerprints in the file, if given.
        before: the delta files of a chain that come before the delta, in their order; ``base`` is then the base of the
            first one. Of each, what the next one needs is checked.
        rename: rules FROM=TO that say what a name that the file records is in this base. FROM is how the name begins,
            or a pattern with ``*``. Bases whose names differ in a known way are recognized without rules.
        strip_prefix: beginnings of names that do not count, on either side.
        threads: worker threads for the base's fingerprints.
        limits: how much memory and output the file may ask for.
        progress: called with a tensor's name and bytes as each is done.

    Raises:
        UsageError: the number of threads is below 1, or there are deltas before this one and no base.
        InvalidFileError: the file is not valid; names the first fault and its place.
        WrongBaseError: names the first tensor of the base that differs.
        StorageError: reading failed.
    """
    workers, renames = thread_count(threads), Renames.parse(rename, strip_prefix)
    if before and base is None:
        raise UsageError("there are deltas before this one, and no base for the first of them")
    with DeltaFile(delta, limits=limits) as opened:
        container = opened.container
        try:
            entries = list(container.entries())
            for number in range(len(container.sections)):
                container.touch(number, force=True)
            check_coverage(container, entries)
        except InvalidFileError as error:
            raise _named(container, error) from error
        _check_decoded(opened, entries)
        for entry in entries:
            _check_payload(opened, entry)
            if base is None:
                _check_chunks(opened, entry)
            container.release(entry)
            if progress:
                progress(entry.name, entry.nbytes)
        for name in container.attachments:
            check_attachment(container, name)
        check_content_id(container, entries)
        served = check_served_part(container, entries)
        read_files(opened, entries)
        checked, changes = None, list[NameChange]()
        restored: tuple[str, ...] = ()
        if base is not None:
            try:
                with _open_base(base, before, opened, entries, renames) as (tensors, changes):
                    checked = check_base(tensors, entries, workers)
                    # Whatever can be known of chunks without the base is checked when they are restored.
                    restored = check_restored(opened, tensors, entries, workers)
            except WrongBaseError:
                for entry in entries:
                    _check_chunks(opened, entry)
                raise
        WeightNames.from_metadata(container.metadata, container.name)
        rest = tuple(container.removed), tuple(container.attachments), changes
        said = dequantized(container.scaled(), container.metadata)
        identity = container.content_id.hex()
        return VerifyResult(len(container.sections), len(entries), checked, identity, *rest, said, restored, served)


@contextlib.contextmanager
def _open_base(
    base: str | os.PathLike[str],
    before: Sequence[str | os.PathLike[str]],
    delta: DeltaFile,
    entries: list[TensorEntry],
    renames: Renames,
) -> Iterator[tuple[BaseTensors, list[NameChange]]]:
    """Open what a delta is applied to; give its tensors, and what differs in the names of the chain's base."""
    if not before:
        with open_base(base, delta.container) as checkpoint:
            tensors = BaseTensors(checkpoint, entries, delta.container, renames)
            yield tensors, tensors.changes
        return
    with open_links(before, delta.container.limits) as links:
        check_links([*links, delta])
        with open_chain(base, [*links, delta], renames) as chain:
            yield chain.bases[-1], chain.bases[0].changes


def _check_decoded(delta: DeltaFile, entries: Iterable[TensorEntry]) -> None:
    """Refuse chunks of exact tensors that become many more bytes than the file has.

    Raises:
        InvalidFileError: names the limit.
    """
    container = delta.container
    total = sum(ExactTensor(delta, entry, None).decoded for entry in entries if entry.exact is not None)
    container.limits.check_output(total, container.size, 0, f"{container.name}: the chunks of exact tensors become")


def _check_payload(delta: DeltaFile, entry: TensorEntry) -> None:
    """Check that a tensor's terms are packed canonically, and compare the payload's digest; no matrix is made."""
    for number, term in enumerate(entry.terms):
        try:
            codec_of(entry, term).check(delta.term_views(entry, term))
        except InvalidFileError as error:
            prefix = f"terms[{number}]: " if len(entry.terms) > 1 else ""
            raise InvalidFileError(f'{delta.container.name}: tensors["{entry.name}"]: {prefix}{error}') from error
    check_payload_digest(delta, entry)


def _check_chunks(delta: DeltaFile, entry: TensorEntry) -> None:
    """Check what can be known without the base of the chunks of an exact tensor."""
    if entry.exact is not None:
        ExactTensor(delta, entry, None).check()


def check_attachment(container: Container, name: str) -> None:
    """Compare the digest of an attached file with the index.

    Raises:
        InvalidFileError: the digest differs.
    """
    attachment = container.attachments[name]
    if digest_of(container.pieces(attachment.data)) != attachment.digest:
        raise _named(container, InvalidFileError(f'attachments["{name}"]: the bytes have another digest'))


def check_served_part(container: Container, entries: Iterable[TensorEntry]) -> ServedPart | None:
    """Return the served part, after checking that the beginning of a progressive file is the one of the file's index.

    Raises:
        InvalidFileError: it is another one.
    """
    try:
        return check_served(container, entries)
    except InvalidFileError as error:
        raise _named(container, error) from error


def check_base(base: BaseTensors, entries: list[TensorEntry], threads: int) -> int:
    """Compare a base with the fingerprints in the entries; return the number of tensors compared.

    Raises:
        WrongBaseError: names the first tensor that differs.
    """
    count = 0
    for name, equal in compare_bases(base, entries, threads):
        if not equal:
            raise base.differs(name)
        count += 1
    return count


def check_coverage(container: Container, entries: list[TensorEntry]) -> None:
    """Check that the buffers of every section follow each other, with nothing but zero padding between them.

    Raises:
        InvalidFileError: buffers overlap, leave a gap, or bytes between them are not zero.
    """
    used: dict[int, list[BufferRef]] = {number: [] for number in range(len(container.sections))}
    for entry in entries:
        for _, ref in entry.refs():
            used[ref.section].append(ref)
    for attachment in container.attachments.values():
        used[attachment.data.section].append(attachment.data)
    for file in container.files.values():
        used[file.head.section].append(file.head)
    for number, refs in used.items():
        if number == container.served:
            continue
        if not refs:
            raise InvalidFileError(f"section {number}: no buffer lies in it")
        position = 0
        for ref in sorted(refs, key=lambda ref: (ref.offset, ref.length)):
            start = c.align(position, c.buffer_alignment(container.sections[number].kind))
            if ref.offset != start:
                raise InvalidFileError(f"section {number}: a buffer starts at {ref.offset}, where {start} is next")
            padding = BufferRef(number, position, start - position)
            if any(map(any, container.pieces(padding))):
                raise InvalidFileError(f"section {number}: the padding at {position} is not zero")
            position = ref.offset + ref.length
        if position != container.sections[number].raw_length:
            raise InvalidFileError(f"section {number}: no buffer holds the bytes from {position} on")


def _named(container: Container, error: InvalidFileError) -> InvalidFileError:
    """Return an error with the file's name in front, unless the name stands there already."""
    return error if str(error).startswith(f"{container.name}: ") else error.located(container.name)
