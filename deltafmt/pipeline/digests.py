"""The digests that a delta file's meaning rests on, computed anew (spec/deltafmt-v1.md, section 7.6)."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

from deltafmt.container.content import content_id
from deltafmt.container.reader import Container
from deltafmt.delta import DeltaFile, codec_of
from deltafmt.errors import InvalidFileError
from deltafmt.index.entries import TensorEntry
from deltafmt.terms.buffers import raw_bytes


def check_content_id(container: Container, entries: Iterable[TensorEntry]) -> None:
    """Compute the content id anew from all entries, and compare it with the trailer's.

    With it and the digests of what is used, the content id stands for what is used.

    Raises:
        InvalidFileError: it differs.
    """
    about = container.removed, container.attachments, container.metadata, container.scaled_key()
    found = content_id(entries, *about, container.files, container.parent)
    if found != container.content_id:
        raise InvalidFileError(f"{container.name}: the content id is not that of the content")


def check_payload_digest(delta: DeltaFile, entry: TensorEntry) -> None:
    """Compare the digest of a tensor's payload with its entry, if it has a payload.

    Raises:
        InvalidFileError: the digest differs.
    """
    if entry.digest is not None and payload_digest(delta, entry) != entry.digest:
        raise InvalidFileError(f'{delta.container.name}: tensors["{entry.name}"]: the payload has another digest')


def payload_digest(delta: DeltaFile, entry: TensorEntry) -> bytes:
    """Return the BLAKE3 of a tensor's payload: its buffers in order, with a ``rank`` index in its ``fixed`` form."""
    digest = blake3()
    for term in entry.terms:
        codec = codec_of(entry, term)
        limits, size = delta.container.limits, delta.container.size
        limits.check_memory(codec.piece_bytes, size, f'{delta.container.name}: an index of "{entry.name}" takes')
        for name, array in delta.term_views(entry, term).items():
            for piece in codec.digested_pieces(name, array):
                digest.update(raw_bytes(piece))
    if entry.data is not None:
        for data in delta.container.pieces(entry.data):
            digest.update(data)
    return digest.digest()


def digest_of(pieces: Iterable[memoryview]) -> bytes:
    """Return the BLAKE3 of some pieces."""
    digest = blake3()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
